"""How large everything is, on a device and in a rehearsal, in one place."""

from dataclasses import dataclass

from benches.shapes import SHAPES, ModelShape, TensorShape


@dataclass(frozen=True)
class Iteration:
    """A whole training iteration: a model of `talos.app.costs.MODELS` and what it reads."""

    model: str
    batch: int
    tokens: int | None = None
    layers: int | None = None
    """None: all."""


@dataclass(frozen=True)
class Scoring:
    """A layer's product [samples, T, O] and [samples, T, I] as the scoring kernel takes them."""

    samples: int
    rows: int
    columns: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """A whole calibration by a model's own batches."""

    model: str
    samples: int
    batch: int
    rounds: int
    layers: int | None = None


@dataclass(frozen=True)
class Sizes:
    rounds: int
    """Of a timing; each is long enough for the clock."""
    copy_bytes: int
    matrix_width: int
    shapes: tuple[ModelShape, ...]
    """Of the step, the most telling first."""
    densities: tuple[float, ...]
    """Of the step, the usual first."""
    iterations: tuple[Iteration, ...]
    """Of the table of methods, and of scored batches."""
    smaller: Iteration
    """For the method that may not hold the usual batch."""
    scoring: Scoring
    threshold: int
    """Scores."""
    histogram: int
    """Of them, in the first pass alone."""
    calibration: Calibration
    queued: Iteration
    """A batch of a model whose small layers share launches when they are scored."""
    chunks: tuple[int, ...]
    """Entries that a Triton program takes at a time, beside those it does."""
    processes: int
    """Of the tests."""
    tests: tuple[str, ...]
    """What pytest is given: those in which a device computes, the references there left out."""
    other_tests: tuple[str, ...]
    """Those of all others that are run where time is left."""


# What a device cannot change, what compiles for minutes, and what `tests` has run.
_NO_DEVICE = (
    *("app", "house", "benches"),
    *(f"kernels/test_{name}.py" for name in ("aot", "csrc", "csrc_cuda", "nvcc", "sass")),
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
    scoring=Scoring(samples=128, rows=1024, columns=1024, tokens=(257, 50, 128, 1)),
    threshold=300_000_000,
    histogram=85_000_000,
    calibration=Calibration("vit-l-14", samples=5000, batch=128, rounds=4),
    queued=Iteration("minilm", 16),
    chunks=(256, 1024),
    processes=12,
    tests=(
        "tests/gpu",
        "--ignore=tests/gpu/test_steps.py",  # the stage runs its checks by itself, one by one
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
    scoring=Scoring(samples=2, rows=24, columns=16, tokens=(5, 1)),
    threshold=10_000,
    histogram=5_000,
    calibration=Calibration("minilm", samples=8, batch=4, rounds=2, layers=1),
    queued=Iteration("minilm", 2, layers=1),
    chunks=(256,),
    processes=1,
    tests=("tests/task_vectors/test_resident_vectors.py", "-k", "what_is_held or tied_weights"),
    other_tests=("tests/kernels/test_index.py", "-k", "empty"),
)
