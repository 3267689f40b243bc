"""The compiled library's CUDA ops without a CUDA device: built for the CPU, see cuda_on_cpu.h.

Their arithmetic, dispatch and checks are what a device runs. What is left to a device: its own
compiler, its memory, its streams; tests/gpu runs the same tests there.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension
from torch import Tensor

from talos_kernels import Index, TensorIndex, _ops, gather_grad_
from talos_kernels.add_delta import add_delta_reference
from talos_kernels.sparse_adam import sparse_adam_reference
from tests.cases import CASES, DTYPES, MANY, ONE_ENTRY, Case, assert_bit_equal
from tests.kernels.test_csrc import DAMAGES, REFUSED, Problem, all_bit_equal, all_close, damage

TESTS = Path(__file__).parent
CXX = "c++"
BF16 = torch.bfloat16
MAX_TENSORS = 512  # of a launch, csrc/cuda/launch.h

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
]


Ops = Callable[[str], Callable[..., None]]


def build(source: Path, target: Path, *flags: str) -> None:
    """Compiles for the CPU what includes cuda_on_cpu.h."""
    for header in ("cuda_bf16.h", "cuda_fp16.h"):  # what is wanted of them is in cuda_on_cpu.h
        (target.parent / header).touch()
    command = [CXX, "-O1", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
    command += ["-U_FORTIFY_SOURCE", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{target.parent}", f"-I{TESTS}", str(source), "-o", str(target), *flags]
    command += [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library, whose ops are talos_cuda_on_cpu's."""
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "library.so"
    folders = [f"-L{folder}" for folder in torch.utils.cpp_extension.library_paths()]
    build(TESTS / "cuda_on_cpu.cpp", path, "-shared", "-fPIC", *folders, "-ltorch_cpu")
    torch.ops.load_library(path)
    return path


@pytest.fixture
def op(library: Path) -> Ops:
    return lambda name: getattr(torch.ops.talos_cuda_on_cpu, name)


def with_bf16_moments(problem: Problem) -> Problem:
    problem.exp_avg, problem.exp_avg_sq = problem.exp_avg.to(BF16), problem.exp_avg_sq.to(BF16)
    return problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_adam_is_the_references(op: Ops, case: Case, dtype: torch.dtype) -> None:
    ours, theirs = Problem(case, dtype), Problem(case, dtype)
    actual = ours.adam(op("sparse_adam_"), steps=1)
    all_close(actual, theirs.adam(sparse_adam_reference, steps=1))
    for mask, param, before in zip(case.masks(), ours.params, case.tensors(dtype), strict=True):
        assert_bit_equal(param[~mask], before[~mask])


@pytest.mark.parametrize("moment_dtype", [torch.float32, BF16], ids=str)
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
            if moment_dtype == BF16:
                with_bf16_moments(ours), with_bf16_moments(theirs)
            results = [
                problem.adam(step, 1, master=problem.master if masters else None, **options)
                for problem, step in (
                    (ours, op("sparse_adam_")),
                    (theirs, sparse_adam_reference),
                )
            ]
            all_close(*results)


@pytest.mark.skipif(_ops.compiled_library is None, reason="talos_kernels/_C was not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_several_steps_have_the_bits_of_the_cpus_kernels(
    op: Ops, case: Case, dtype: torch.dtype
) -> None:
    ours, theirs = with_bf16_moments(Problem(case, dtype)), with_bf16_moments(Problem(case, dtype))
    actual = ours.adam(op("sparse_adam_"), 5, master=ours.master, seed=3)
    all_bit_equal(
        actual, theirs.adam(torch.ops.talos_C.sparse_adam_, 5, master=theirs.master, seed=3)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_warps_and_lanes_run_in_any_order(
    op: Ops, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = MANY[0]

    def results() -> list[Tensor]:
        problem = Problem(case, dtype)
        saved = torch.zeros(problem.index.nnz, dtype=dtype)
        problem.adam(op("sparse_adam_"), master=problem.master)
        op("add_delta_")(problem.params, problem.index.buffers, problem.values, 0.7, saved)
        return [*problem.written(), saved]

    forwards = results()
    monkeypatch.setenv("CUDA_ON_CPU_BACKWARDS", "1")
    all_bit_equal(results(), forwards)


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


@pytest.mark.parametrize(("buffer", "where", "value"), DAMAGES)
def test_a_damaged_index_reaches_no_other_memory(
    op: Ops, buffer: int, where: int, value: int
) -> None:
    case = Case("two", (3000, 70000), (0.5, 0.01))
    index = Index.pack([TensorIndex.encode(mask) for mask in case.masks()])
    buffers = damage(index, buffer, where, value)
    memory = torch.full((80000,), 7.0)
    state = torch.full((3, index.nnz + 2000), 7.0)
    params, grads = [memory[1000:4000], memory[5000:75000]], [torch.ones(3000), torch.ones(70000)]
    exp_avg, exp_avg_sq, master = (row[1000:-1000] for row in state)
    op("sparse_adam_")(
        params, grads, buffers, exp_avg, exp_avg_sq, master, torch.zeros(2),
        torch.tensor(0.1, dtype=torch.float64), 0.9, 0.999, 1e-8, 0.0, False, None, None, None, 0,
    )  # fmt: skip
    op("add_delta_")(params, buffers, torch.ones(index.nnz), 1.0, None)
    outside = [memory[:1000], memory[4000:5000], memory[75000:], state[:, :1000], state[:, -1000:]]
    assert all(bool((part == 7.0).all()) for part in outside)


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_arguments_are_refused_as_on_the_cpu(
    op: Ops, spoil: Callable[[Problem], None], message: str
) -> None:
    problem = Problem(MANY[0], torch.float32)
    spoil(problem)
    before = [tensor.clone() for tensor in problem.written()]
    with pytest.raises(RuntimeError, match=message):
        problem.adam(op("sparse_adam_"))
    all_bit_equal(problem.written(), before)


def test_no_entry_that_is_not_selected_takes_a_slow_path(op: Ops, library: Path) -> None:
    """Of 0 a device's root and quotients are subroutines: an entry that is not selected is 1."""
    case = Case("some", (3000, 70000, 97), (0.5, 0.01, ONE_ENTRY))
    problem = Problem(case, torch.float32)
    problem.exp_avg.fill_(1), problem.exp_avg_sq.fill_(1)
    slow_roots = ctypes.c_long.in_dll(ctypes.CDLL(str(library)), "slow_roots")
    slow_roots.value = 0
    problem.adam(op("sparse_adam_"))
    assert slow_roots.value == 0
    problem.exp_avg_sq[0], problem.grads[0][problem.grads[0].isfinite()] = 0, 0
    problem.adam(op("sparse_adam_"), 1)
    assert slow_roots.value == 1  # the selected one that is 0


def test_a_lane_that_leaves_its_warp_early_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "leaves.cpp"
    source.write_text(
        '#include "cuda_on_cpu.h"\n'
        "void kernel(int last) {\n"
        "  if (static_cast<int>(threadIdx.x) > last) return;\n"
        "  __shfl_sync(~0u, 1, 0);\n"
        "}\n"
        "int main(int n, char**) {\n"
        "  cudaLaunchConfig_t config{dim3(2), dim3(64), nullptr};\n"
        "  return cudaLaunchKernelEx(&config, kernel, n == 1 ? 63 : 62);\n"
        "}\n"
    )
    build(source, tmp_path / "leaves")
    whole, without_one = (
        subprocess.run([tmp_path / "leaves", *more], capture_output=True, text=True)
        for more in ([], ["without one"])
    )
    assert whole.returncode == 0
    assert "did not come to the same exchanges" in without_one.stderr
    assert without_one.returncode != 0
