"""How large everything is, on a device and in a rehearsal."""

from dataclasses import dataclass

from benches.shapes import SHAPES, ModelShape, TensorShape


@dataclass(frozen=True)
class Iteration:
    """A model of `SHAPES` and what it reads at a time; None: all layers, and the usual tokens."""

    model: str
    batch: int
    tokens: int | None = None
    layers: int | None = None


@dataclass(frozen=True)
class Sizes:
    """One of each; where there are several the most telling or usual one is first."""

    rounds: int
    """Of a timing; each is long enough for the clock."""
    copy_bytes: int
    matrix_width: int
    shapes: tuple[ModelShape, ...]
    """Of the step."""
    densities: tuple[float, ...]
    """Of the step."""
    iterations: tuple[Iteration, ...]
    """Of the table of methods, and of scored batches."""
    smaller: Iteration
    """For the method that may not fit at the usual batch."""
    layer: tuple[int, int]
    """Rows and columns of the layer that the scoring kernel scores."""
    samples: int
    """Of that layer."""
    tokens: tuple[int, ...]
    """Of a sample of that layer."""
    threshold: int
    """Scores."""
    histogram: int
    """Of them, in the first pass alone."""
    calibrated: Iteration
    """The model of a whole calibration, of four rounds."""
    calibration_samples: int
    queued: Iteration
    """A batch of a model whose small layers share launches when they are scored."""
    chunks: tuple[int, ...]
    """Entries that a Triton program takes at a time, beside the usual number."""
    numerics: tuple[int, int]
    """Runs of each op with one seed, and steps of the trainings whose errors are measured."""
    processes: int
    """Of the tests."""
    tests: tuple[str, ...]
    """Arguments of pytest: the tests in which a device computes, without the references there."""
    other_tests: tuple[str, ...]
    """Those of all others that are run where time is left."""


# What a device cannot change, what compiles for minutes, and what `tests` has run.
_NO_DEVICE = (
    *("app", "house", "benches"),
    *(f"kernels/test_{name}.py" for name in ("aot", "csrc", "csrc_cuda")),
    *(f"kernels/test_{name}.py" for name in ("triton", "triton_primitives", "ops")),
)

FULL = Sizes(
    rounds=20,
    copy_bytes=2 * 2**30,
    matrix_width=8192,
    shapes=(SHAPES["vit-l-14"], SHAPES["t5-large"], SHAPES["vit-b-32"]),
    densities=(0.6, 0.1, 0.01, 0.3, 1.0),
    iterations=(
        Iteration("vit-l-14", 128),
        Iteration("t5-large", 64, tokens=128),
        Iteration("vit-b-32", 128),
    ),
    smaller=Iteration("vit-l-14", 64),
    layer=(1024, 1024),
    samples=128,
    tokens=(257, 50, 128, 1),
    threshold=300_000_000,
    histogram=85_000_000,
    calibrated=Iteration("vit-l-14", 128),
    calibration_samples=5000,
    queued=Iteration("minilm", 16),
    chunks=(256, 1024),
    numerics=(10, 1000),
    processes=12,
    tests=(
        "tests/gpu",
        "tests/kernels/test_triton.py",
        "tests/kernels/test_triton_primitives.py",
        "tests/kernels/test_ops.py",
        "tests/kernels/test_fisher_diag.py",
        "tests/kernels/test_sddmm.py",
        "tests/task_vectors/test_resident_vectors.py",
        "tests/task_vectors/test_task_vectors.py",
        *("-k", "gpu or triton or cuda and not reference", "-m", "not slow"),
    ),
    other_tests=(
        "tests",
        "--ignore=tests/gpu",
        *(f"--ignore=tests/{name}" for name in _NO_DEVICE),
        *("-m", "not slow"),
    ),
)

_TINY_SHAPE = ModelShape(
    "tiny",
    (
        TensorShape("attn.in_proj_weight", (192, 64), 128),
        TensorShape("q.weight", (64, 64), 64),
        TensorShape("bias", (64,)),
    ),
    layers=1,
    tokens=5,
)

TINY = Sizes(
    rounds=2,
    copy_bytes=2**20,
    matrix_width=64,
    shapes=(_TINY_SHAPE,),
    densities=(0.6, 0.1, 0.01, 0.3, 1.0),
    iterations=(Iteration("vit-b-32", 1, layers=1), Iteration("minilm", 2, tokens=4, layers=1)),
    smaller=Iteration("minilm", 1, tokens=4, layers=1),
    layer=(24, 16),
    samples=2,
    tokens=(5, 1),
    threshold=10_000,
    histogram=5_000,
    calibrated=Iteration("minilm", 4, layers=1),
    calibration_samples=8,
    queued=Iteration("minilm", 2, layers=1),
    chunks=(256,),
    numerics=(1, 1),
    processes=1,
    tests=("tests/task_vectors/test_resident_vectors.py", "-k", "what_is_held or tied_weights"),
    other_tests=("tests/kernels/test_index.py", "-k", "empty"),
)
