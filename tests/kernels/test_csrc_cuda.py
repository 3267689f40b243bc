"""What only the CUDA ops can get wrong, built for the CPU: see cuda_on_cpu.h and test_csrc.py.

Their arithmetic, dispatch and checks are what a device runs. What is left to a device: its own
compiler, its memory, its streams; tests/gpu runs the same tests there.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from talos_kernels import Index, TensorIndex, _ops
from tests.cases import DTYPES, MANY, ONE_ENTRY, Case
from tests.kernels.conftest import CXX, build
from tests.kernels.test_csrc import (
    DAMAGES,
    Ops,
    Problem,
    all_bit_equal,
    damage,
    with_bf16_moments,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
]


@pytest.fixture
def op(cuda_on_cpu: Path) -> Ops:
    return lambda name: getattr(torch.ops.talos_cuda_on_cpu, name)


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


def test_no_entry_that_is_not_selected_takes_a_slow_path(op: Ops, cuda_on_cpu: Path) -> None:
    """Of 0 a device's root and quotients are subroutines: an entry that is not selected is 1."""
    case = Case("some", (3000, 70000, 97), (0.5, 0.01, ONE_ENTRY))
    problem = Problem(case, torch.float32)
    problem.exp_avg.fill_(1), problem.exp_avg_sq.fill_(1)
    slow_roots = ctypes.c_long.in_dll(ctypes.CDLL(str(cuda_on_cpu)), "slow_roots")
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
