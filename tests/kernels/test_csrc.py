"""The compiled library: its ops against the references, its argument checks, its build."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from talos_kernels import Index, TensorIndex, _ops, gather_grad_
from talos_kernels.add_delta import add_delta_reference
from talos_kernels.gather_grad import gather_grad_reference, scatter_reference
from talos_kernels.sparse_adam import sparse_adam_reference
from tests.cases import CASES, DTYPES, MANY, Case, assert_bit_equal, assert_close

ROOT = Path(__file__).parents[2]
MAX_TENSORS = 512  # of a launch, csrc/cuda/launch.h
NAMES = (
    "sparse_adam_",
    "gather_grad_",
    "scatter_",
    "add_delta_",
    "score_histogram",
)
# On these torch fuses as csrc/adam.h does; its kernels for older processors do not.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

needs_library = pytest.mark.skipif(
    _ops.compiled_library is None,
    reason="talos_kernels/_C was not built: no C++ compiler at install time",
)


class Problem:
    """One case's tensors; what is not selected has NaN gradients."""

    def __init__(self, case: Case, dtype: torch.dtype, grad_dtype: torch.dtype | None = None):
        masks = case.masks()
        self.index = Index.pack([TensorIndex.encode(mask) for mask in masks])
        self.params = case.tensors(dtype, seed=1)
        self.grads = [
            torch.where(mask, grad, float("nan")).to(grad_dtype or dtype)
            for mask, grad in zip(masks, case.tensors(seed=2), strict=True)
        ]
        self.exp_avg, values = torch.zeros(2, self.index.nnz).unbind()
        self.exp_avg_sq = values.clone()
        self.steps = torch.zeros(len(self.params))
        self.values = torch.randn(self.index.nnz, generator=torch.Generator().manual_seed(3))
        selected = [p[mask] for p, mask in zip(self.params, masks, strict=True)]
        noise = self.values / 4096
        self.master = torch.cat(selected).float() * (1 + noise) if selected else noise

    def adam(self, op: Callable[..., None], steps: int = 3, **changes: object) -> list[Tensor]:
        arguments = {
            "master": None, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1,
            "maximize": False, "grad_scale": None, "found_inf": None, "clip_factor": None,
            "seed": 0,
        } | changes  # fmt: skip
        self.steps.zero_()
        for _ in range(steps):
            op(
                params=self.params,
                grads=self.grads,
                index=self.index.buffers,
                exp_avg=self.exp_avg,
                exp_avg_sq=self.exp_avg_sq,
                steps=self.steps,
                lr=torch.tensor(1e-3, dtype=torch.float64),
                **arguments,
            )
        return self.written()

    def written(self) -> list[Tensor]:
        return [*self.params, self.exp_avg, self.exp_avg_sq, self.master, self.steps]


def compiled(name: str) -> Callable[..., object]:
    return getattr(torch.ops.talos_C, name)


def with_bf16_moments(problem: Problem) -> Problem:
    problem.exp_avg, problem.exp_avg_sq = problem.exp_avg.bfloat16(), problem.exp_avg_sq.bfloat16()
    return problem


def all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right)


def all_bit_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert_bit_equal(left, right)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


Ops = Callable[[str], Callable[..., Any]]


@pytest.fixture(params=["cpu", "cuda on cpu"])
def op(request: pytest.FixtureRequest) -> Ops:
    """The compiled library's ops: the CPU's, and CUDA's built for the CPU (see cuda_on_cpu.h)."""
    if request.param == "cpu":
        if _ops.compiled_library is None:
            pytest.skip("talos_kernels/_C was not built: no C++ compiler at install time")
        return compiled
    request.getfixturevalue("cuda_on_cpu")
    return lambda name: getattr(torch.ops.talos_cuda_on_cpu, name)


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_schema_is_that_of_the_op(name: str) -> None:
    ours = str(compiled(name).default._schema)
    assert ours.replace("talos_C::", "talos::") == str(
        getattr(torch.ops.talos, name).default._schema
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_adam_is_the_references(op: Ops, case: Case, dtype: torch.dtype) -> None:
    ours, theirs = Problem(case, dtype), Problem(case, dtype)
    actual = ours.adam(op("sparse_adam_"), steps=1)
    all_close(actual, theirs.adam(sparse_adam_reference, steps=1))
    for mask, param, before in zip(case.masks(), ours.params, case.tensors(dtype), strict=True):
        assert_bit_equal(param[~mask], before[~mask])


@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_dtype", ["param", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_instance_is_the_references(
    op: Ops,
    case: Case,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | str,
    moment_dtype: torch.dtype,
) -> None:
    scale = torch.tensor([512.0])
    for options in (
        {"maximize": True, "grad_scale": scale, "found_inf": torch.zeros(())},
        {"weight_decay": 0.0, "beta1": 0.4, "eps": 1e-3, "seed": 2**33 + 7},
        {"clip_factor": torch.tensor(0.3), "grad_scale": scale},
    ):
        for masters in (False, True):
            ours, theirs = (
                Problem(case, dtype, None if grad_dtype == "param" else grad_dtype) for _ in "12"
            )
            if moment_dtype == torch.bfloat16:
                with_bf16_moments(ours), with_bf16_moments(theirs)
            results = [
                problem.adam(step, 1, master=problem.master if masters else None, **options)
                for problem, step in (
                    (ours, op("sparse_adam_")),
                    (theirs, sparse_adam_reference),
                )
            ]
            all_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_compact_gradients_beside_dense_ones(op: Ops, case: Case, dtype: torch.dtype) -> None:
    ours, theirs = Problem(case, dtype), Problem(case, dtype)
    compact = torch.empty(ours.index.nnz)
    gather_grad_(compact, ours.grads, ours.index)
    for i, entries in enumerate(ours.index.slices):
        if i % 2 == 0:
            ours.grads[i] = theirs.grads[i] = compact[entries].clone()
        else:
            ours.grads[i] = theirs.grads[i] = ours.grads[i].float()
    all_close(
        ours.adam(op("sparse_adam_"), 2, master=ours.master),
        theirs.adam(sparse_adam_reference, 2, master=theirs.master),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_no_gradient_is_not_counted_and_nothing_is_on_inf(
    op: Ops, dtype: torch.dtype
) -> None:
    problem, untouched = Problem(MANY[0], dtype), Problem(MANY[0], dtype)
    found = problem.adam(op("sparse_adam_"), found_inf=torch.ones(1), master=problem.master)
    all_bit_equal(found, untouched.written())

    problem.grads[1] = torch.empty(0)
    problem.adam(op("sparse_adam_"), 2, master=problem.master)
    assert problem.steps.tolist() == [2, 0, 2]
    skipped = problem.index.slices[1]
    assert_bit_equal(problem.params[1], untouched.params[1])
    for name in ("exp_avg", "exp_avg_sq", "master"):
        assert_bit_equal(getattr(problem, name)[skipped], getattr(untouched, name)[skipped])
    assert not torch.equal(problem.params[0], untouched.params[0])
    assert not torch.equal(problem.params[2], untouched.params[2])


def test_steps_count_where_nothing_is_selected(op: Ops) -> None:
    problem = Problem(Case("none", (97, 2048), (0.0, 0.0)), torch.float32)
    problem.adam(op("sparse_adam_"), 3)
    assert problem.steps.tolist() == [3, 3]


def test_more_tensors_than_a_launch_takes(op: Ops) -> None:
    sizes = tuple(1 + i % 3 for i in range(MAX_TENSORS + 2))
    case = Case("many", sizes, tuple(1.0 for _ in sizes))
    ours, theirs = Problem(case, torch.float32), Problem(case, torch.float32)
    for problem in (ours, theirs):
        problem.grads[MAX_TENSORS] = torch.empty(0)
    all_close(ours.adam(op("sparse_adam_")), theirs.adam(sparse_adam_reference))
    assert ours.steps[-3:].tolist() == [3, 0, 3]
    op("add_delta_")(ours.params, ours.index.buffers, ours.values, 2.0, None)
    add_delta_reference(theirs.params, theirs.index.buffers, theirs.values, 2.0, None)
    all_close(ours.params, theirs.params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_delta_is_the_references(op: Ops, case: Case, dtype: torch.dtype) -> None:
    for value_dtype in DTYPES:
        ours, theirs = Problem(case, dtype), Problem(case, dtype)
        buffers, values = ours.index.buffers, ours.values.to(value_dtype)
        saved, expected = torch.empty(2, ours.index.nnz, dtype=dtype).unbind()
        op("add_delta_")(ours.params, buffers, values, 0.3, saved)
        add_delta_reference(theirs.params, buffers, values, 0.3, expected)
        all_bit_equal([*ours.params, saved], [*theirs.params, expected])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scatter_is_the_references(case: Case, dtype: torch.dtype) -> None:
    for value_dtype in DTYPES:
        ours, theirs = Problem(case, dtype), Problem(case, dtype)
        buffers, values = ours.index.buffers, ours.values.to(value_dtype)
        compiled("scatter_")(ours.params, buffers, values)
        scatter_reference(theirs.params, buffers, values)
        all_bit_equal(ours.params, theirs.params)


@needs_library
def test_a_damaged_index_does_not_reach_another_tensors_compact_gradient() -> None:
    mask = torch.arange(2048) % 4 == 0
    index = Index.pack([TensorIndex.encode(mask)] * 2)
    n = index.nnzs[0]
    buffers = index.buffers
    buffers[2] = torch.tensor([n, 2 * n, n, 2 * n])  # the first tensor's ranks are the second's
    params, state = [torch.zeros(2048), torch.zeros(2048)], torch.zeros(2, 2 * n)
    with pytest.raises(RuntimeError, match="contradict each other"):
        compiled("sparse_adam_")(
            params, [torch.ones(n), torch.ones(n)], buffers, *state.unbind(), None,
            torch.ones(2), torch.tensor(0.1, dtype=torch.float64), 0.9, 0.999, 1e-8, 0.0,
            False, None, None, None, 0,
        )  # fmt: skip
    assert not params[0].any()


@needs_library
def test_a_compact_gradient_of_another_length_is_refused() -> None:
    problem = Problem(MANY[0], torch.float32)
    numels, nnzs = problem.index.numels, problem.index.nnzs
    some = next(i for i, nnz in enumerate(nnzs) if 0 < nnz < numels[i] - 1)
    problem.grads[some] = torch.zeros(nnzs[some] + 1)
    before = [tensor.clone() for tensor in problem.written()]
    with pytest.raises(RuntimeError, match=r"must have .* or, of the selected entries"):
        problem.adam(compiled("sparse_adam_"))
    all_bit_equal(problem.written(), before)


def forty_steps(
    beta1: float, weight_decay: float
) -> tuple[Problem, list[Tensor], torch.optim.Optimizer]:
    problem = Problem(Case("full", (384 * 64 + 5, 97), (1.0, 1.0)), torch.float32)
    theirs = [param.clone().requires_grad_() for param in problem.params]
    optimizer = torch.optim.AdamW(
        theirs, 1e-3, (beta1, 0.999), weight_decay=weight_decay, foreach=False, fused=False
    )
    steps = torch.zeros(2)
    for _ in range(40):
        problem.grads = [torch.randn_like(param) for param in problem.params]
        for param, grad in zip(theirs, problem.grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        compiled("sparse_adam_")(
            problem.params, problem.grads, problem.index.buffers,
            problem.exp_avg, problem.exp_avg_sq, None, steps,
            torch.tensor(1e-3, dtype=torch.float64), beta1, 0.999, 1e-8, weight_decay,
            False, None, None, None, 0,
        )  # fmt: skip
    return problem, theirs, optimizer


@needs_library
def test_a_full_mask_is_torch_adamw_within_two_ulp() -> None:
    problem, theirs, _ = forty_steps(0.9, 0.1)
    for param, mine in zip(problem.params, theirs, strict=True):
        # A weight that came near zero keeps the rounding of where it was: what it moved, .04 at
        # most, bounds that from below.
        ulp = 2.0**-23 * param.abs().clamp(min=0.04)
        assert bool(((param - mine.detach()).abs() <= 2 * ulp).all())


@needs_library
@pytest.mark.skipif(not FUSES, reason="torch's kernels for this processor fuse nothing")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.2])
def test_a_full_mask_has_the_bits_of_torch_adamw(
    beta1: float, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = torch.Tensor.sqrt
    # torch's own is MKL's on x86: the one operation of the step that is not rounded correctly.
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))
    problem, theirs, optimizer = forty_steps(beta1, weight_decay)
    for i, (mine, entries) in enumerate(zip(theirs, problem.index.slices, strict=True)):
        assert_bit_equal(problem.params[i], mine.detach())
        assert_bit_equal(problem.exp_avg[entries], optimizer.state[mine]["exp_avg"])
        assert_bit_equal(problem.exp_avg_sq[entries], optimizer.state[mine]["exp_avg_sq"])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_grad_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(case, dtype)
    if len(problem.grads) > 2:
        problem.grads[0] = torch.empty(0)  # no gradient: counts as zero
    actual, expected = problem.values.clone(), problem.values.clone()
    for accumulate in (False, True):
        arguments = (problem.grads, problem.index.buffers, accumulate)
        compiled("gather_grad_")(actual, *arguments)
        gather_grad_reference(expected, *arguments)
        assert_bit_equal(actual, expected)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_survives_a_swap(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    param = patterns.clone()
    index = Index.pack([TensorIndex.encode(torch.arange(1 << 16) % 3 > 0)])
    saved = torch.empty(index.nnz, dtype=dtype)
    compiled("add_delta_")([param], index.buffers, torch.ones(index.nnz), 1.0, saved)
    ordinary = patterns.float() < 100
    assert not torch.equal(param[ordinary], patterns[ordinary])
    compiled("scatter_")([param], index.buffers, saved)
    assert_bit_equal(param, patterns)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_float_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 31), 1 << 31, 10007).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[~values.isnan()]
    param = torch.zeros(values.numel(), dtype=dtype)
    index = Index.pack([TensorIndex.encode(torch.ones(values.numel(), dtype=torch.bool))])
    compiled("scatter_")([param], index.buffers, values)
    assert_bit_equal(param, values.to(dtype))


def digest_of_everything() -> str:
    """What all ops compute over many cases, as one number; printed by a subprocess below."""
    total = 0
    for case in (*MANY, Case("real", (384 * 384,), (0.3,))):
        for dtype in DTYPES:
            problem = Problem(case, dtype)
            problem.adam(compiled("sparse_adam_"))
            problem.adam(compiled("sparse_adam_"), master=problem.master, beta1=0.3)
            gathered = torch.zeros_like(problem.exp_avg)
            compiled("gather_grad_")(gathered, problem.grads, problem.index.buffers, True)
            compiled("add_delta_")(problem.params, problem.index.buffers, gathered, 0.7, None)
            for tensor in (*problem.written(), gathered):
                data = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
                weights = torch.arange(1, data.numel() + 1)
                total = (total * 31 + int((data.long() * weights).sum())) % (1 << 61)
    return str(total)


@pytest.mark.slow
@needs_library
def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(
    threads: Callable[[int], None],
) -> None:
    expected = digest_of_everything()
    for count in (1, 2):
        threads(count)
        assert digest_of_everything() == expected
    code = "from tests.kernels.test_csrc import digest_of_everything as digest; print(digest())"
    for capability in ("avx2", "baseline"):
        environment = os.environ | {"TALOS_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


def damage(index: Index, buffer: int, where: int, value: int) -> list[Tensor]:
    buffers = [part.clone() for part in index.buffers]
    buffers[buffer].view(-1)[where] = value
    return buffers


# What may be wrong with an index: of which buffer, where, and what stands there.
DAMAGES = (
    pytest.param(0, 0, -1, id="a bitmap with more bits than its ranks"),
    pytest.param(1, -1, 65535, id="a position past the end"),
    pytest.param(2, 0, -5, id="a negative rank"),
    pytest.param(2, 1, 10**12, id="a rank past the end"),
    pytest.param(3, 1, 7, id="an unknown encoding"),
    pytest.param(3, 3, 10**12, id="words elsewhere"),
    pytest.param(3, 4, -(10**12), id="starts elsewhere"),
    pytest.param(4, 0, 9, id="a tensor that does not exist"),
    pytest.param(4, 2, -1, id="a negative tensor"),
    pytest.param(4, 1, 2, id="a block past the end"),
    pytest.param(4, 3, -1, id="a negative block"),
)


@needs_library
@pytest.mark.parametrize(("buffer", "where", "value"), DAMAGES)
def test_a_damaged_index_reaches_no_other_memory(buffer: int, where: int, value: int) -> None:
    case = Case("two", (3000, 70000), (0.5, 0.01))
    index = Index.pack([TensorIndex.encode(mask) for mask in case.masks()])
    buffers = damage(index, buffer, where, value)
    memory = torch.full((80000,), 7.0)
    params = [memory[1000:4000], memory[5000:75000]]
    with pytest.raises(RuntimeError, match=r"index must be one that Index\.pack made"):
        compiled("scatter_")(params, buffers, torch.zeros(index.nnz))
    outside = torch.cat([memory[:1000], memory[4000:5000], memory[75000:]])
    assert bool((outside == 7.0).all())


def _fp64(problem: Problem) -> None:
    problem.params = [param.double() for param in problem.params]


def _strided_param(problem: Problem) -> None:
    problem.params[1] = torch.zeros(97, 2)[:, 0]


def _short_grad(problem: Problem) -> None:
    problem.grads[1] = problem.grads[1][:-1]


def _wrong_grad_dtype(problem: Problem) -> None:
    problem.grads = [grad.half() for grad in problem.grads]


def _swapped(problem: Problem) -> None:
    problem.params.reverse()
    problem.grads.reverse()


def _missing_grad(problem: Problem) -> None:
    problem.grads.pop()


def _missing_tensor(problem: Problem) -> None:
    problem.params.pop()
    problem.grads.pop()


def _short_state(problem: Problem) -> None:
    problem.exp_avg_sq = problem.exp_avg_sq[:-1]


def _half_state(problem: Problem) -> None:
    problem.exp_avg = problem.exp_avg.half()


# Refused on every device, and where the index's table can be read before a launch.
REFUSED = (
    (_fp64, r"params\[0\] must be float32, bfloat16 or float16, got Double"),
    (_strided_param, r"params\[1\] must be contiguous"),
    (_wrong_grad_dtype, r"grads must have the dtype of params \(Float\) or Float, got Half"),
    (_missing_grad, r"grads must have one tensor per param \(3\), got 2"),
    (_missing_tensor, r"index\[3\] \(table\) must have 2 rows of 5 columns, got 15"),
    (_short_state, r"exp_avg_sq must have \d+ elements, got \d+"),
    (_half_state, r"exp_avg must be float32 or bfloat16"),
)
REFUSED_BY_TABLE = (
    (_short_grad, r"grads\[1\] must have 97 elements or, of"),
    (_swapped, r"params\[0\] must have 2049 elements as in the index, got 65537"),
)


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_arguments_are_refused_before_anything_is_written(
    op: Ops, spoil: Callable[[Problem], None], message: str
) -> None:
    problem = Problem(MANY[0], torch.float32)
    spoil(problem)
    before = [tensor.clone() for tensor in problem.written()]
    with pytest.raises(RuntimeError, match=message):
        problem.adam(op("sparse_adam_"))
    all_bit_equal(problem.written(), before)


@needs_library
@pytest.mark.parametrize(("spoil", "message"), REFUSED_BY_TABLE)
def test_arguments_that_the_table_contradicts_are_refused(
    spoil: Callable[[Problem], None], message: str
) -> None:
    problem = Problem(MANY[0], torch.float32)
    spoil(problem)
    before = [tensor.clone() for tensor in problem.written()]
    with pytest.raises(RuntimeError, match=message):
        problem.adam(compiled("sparse_adam_"))
    all_bit_equal(problem.written(), before)


@needs_library
def test_an_index_of_other_buffers_is_refused() -> None:
    problem = Problem(MANY[0], torch.float32)
    buffers, values = problem.index.buffers, problem.values
    with pytest.raises(RuntimeError, match="index must have 5 tensors, got 4"):
        compiled("scatter_")(problem.params, buffers[:4], values)
    with pytest.raises(RuntimeError, match=r"index\[0\] \(words\) must have dtype Int, got Long"):
        compiled("scatter_")(problem.params, [buffers[0].long(), *buffers[1:]], values)
    with pytest.raises(RuntimeError, match="saved must have dtype Float, got Half"):
        compiled("add_delta_")(problem.params, buffers, values, 1.0, values.half())


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_the_install_goes_on_without_a_working_compiler(compiler: str, tmp_path: Path) -> None:
    done = build(tmp_path, CXX=compiler, TALOS_CUDA="0", TALOS_REQUIRE_CSRC="0")
    assert done.returncode == 0, done.stderr
    assert "csrc/ was not built" in done.stderr
    assert list(tmp_path.rglob("_C*")) == []
    done = build(tmp_path, CXX=compiler, TALOS_CUDA="0", TALOS_REQUIRE_CSRC="1")
    assert done.returncode != 0
    assert "csrc/ was not built" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_cuda_compiles_links_and_registers(tmp_path: Path) -> None:
    done = build(
        tmp_path, TALOS_CUDA="1", TALOS_REQUIRE_CSRC="1", TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
    )
    assert done.returncode == 0, done.stderr
    (library,) = (tmp_path / "lib").rglob("_C*.so")
    code = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(*(has(f'talos_C::{op}', 'CUDA') for op in ('sparse_adam_', 'add_delta_')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.split() == ["True", "True"], loaded.stderr
