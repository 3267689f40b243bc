"""The forms of single ops, their byte models, clocks and counters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benches import (
    bench_add_delta,
    bench_fisher_diag,
    bench_gather_grad,
    bench_merging,
    bench_sddmm,
    bench_select_threshold,
    bench_sparse_adam,
    bench_swap,
    measure,
    work,
)
from benches.shapes import ModelShape, TensorShape
from benches.work import dense_step, masked_step, sector_share, sparse_step
from talos.merging import METHODS
from talos_kernels._ops import CUDA_BACKENDS

TINY = ModelShape(
    "tiny", (TensorShape("a", (96, 32), 64), TensorShape("b", (7,))), layers=1, tokens=5
)
SMALL = ModelShape(
    "small", (TensorShape("a", (96, 320), 64), TensorShape("b", (300, 300))), layers=1, tokens=5
)
CPU = torch.device("cpu")

MAKERS = {
    "sparse_adam": (
        bench_sparse_adam,
        lambda name: bench_sparse_adam.FORMS[name](TINY, CPU),
    ),
    "add_delta": (bench_add_delta, lambda name: bench_add_delta.make(TINY, name, CPU)),
    "gather_grad": (bench_gather_grad, lambda name: bench_gather_grad.make(TINY, name, CPU)),
    "swap": (bench_swap, lambda name: bench_swap.make(TINY, name, CPU)),
    "sddmm": (bench_sddmm, lambda name: bench_sddmm.make(TINY, name, 2, CPU)),
    "select_threshold": (
        bench_select_threshold,
        lambda name: bench_select_threshold.make([torch.randn(10**5).square()], name),
    ),
}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (module, _) in MAKERS.items() for name in module.FORMS]
)
def test_every_form_of_an_op_passes_its_check(op: str, name: str) -> None:
    made = MAKERS[op][1](name)
    made.check()
    made.step()
    assert made.about["bytes_moved"] > 0


@pytest.mark.parametrize("layout", bench_merging.LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_merge_passes_its_check(layout: str, method: str) -> None:
    made = bench_merging.make(SMALL, layout, method)
    made.check()
    assert made.about["state_bytes"] > 0


def test_dense_checkpoints_are_loaded(tmp_path: Path) -> None:
    bench_merging.make_loading(SMALL, tmp_path).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", bench_fisher_diag.OPS)
def test_every_form_of_the_scoring_op(name: str, dtype: torch.dtype) -> None:
    made = bench_fisher_diag.make(name, (4, 6), samples=3, tokens=5, dtype=dtype, device=CPU)
    made.check()
    made.step()


def test_a_wrong_step_fails_its_check() -> None:
    weights = {key: each.data for key, each in work.parameters(TINY.touched, CPU).items()}
    masks = work.selected(TINY, CPU)
    wrong = bench_sparse_adam.checked(lambda: weights["a"].add_(1e-3), weights, masks)
    with pytest.raises(AssertionError):
        wrong.check()


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_ours_at_a_density(density: float) -> None:
    made = bench_sparse_adam.ours(TINY, CPU, density=density)
    made.check()
    nnz = work.selection(TINY, density).nnz
    assert nnz == pytest.approx(density * 64 * 32, rel=0.2)
    assert 8 * nnz <= made.state_bytes() <= 8 * nnz + 4096


def test_another_backend_serves_within_its_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = CUDA_BACKENDS["sparse_adam_"]
    for name in ("csrc", "triton"):
        with work.backend(name, "sparse_adam_"):
            assert CUDA_BACKENDS["sparse_adam_"] == name
    assert CUDA_BACKENDS["sparse_adam_"] == usual
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(work, "cuda_backends", lambda op: ("csrc",))
    with (
        pytest.raises(RuntimeError, match="must be one of csrc here, got triton"),
        work.backend("triton", "sparse_adam_"),
    ):
        pass


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_bytes_of_a_step_are_those_that_it_touches(density: float) -> None:
    """Sector by sector of a random selection, read and written."""
    n = 80_000
    mask = torch.rand(n, generator=torch.Generator().manual_seed(0)) < density
    nnz = int(mask.sum())
    touched = mask.view(-1, 8).any(1)
    assert sector_share(density, 4) == pytest.approx(float(touched.float().mean()), rel=0.05)
    sectors = int(touched.sum()) * 32
    moments = nnz * 4 * 2 * 2
    compact = sectors * 2 + nnz * 4 + moments + 123
    dense = sectors * 3 + moments + 123
    assert sparse_step([(n, nnz)], 123, compact=True) == pytest.approx(compact, rel=0.01)
    assert sparse_step([(n, nnz)], 123, compact=False) == pytest.approx(dense, rel=0.01)
    masters = sparse_step([(n, n)], 0, compact=True, itemsize=2)
    assert masters == n * (2 * 2 + 4 + 16 + 8)


def test_bytes_of_dense_steps() -> None:
    weight, grad, moments, mask = 8, 4, 16, 4
    assert dense_step(10) == 10 * (weight + grad + moments)
    assert masked_step(10) == 10 * (weight + 3 * grad + moments + mask)
    assert sparse_step([(10, 10)], 0, compact=False) == dense_step(10)


@pytest.mark.slow
def test_float32_is_multiplied_in_float32() -> None:
    assert not torch.backends.cudnn.allow_tf32  # in the tests, and in the benches:
    code = "import benches.conftest, torch; print(torch.backends.cudnn.allow_tf32)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("first", "kind", "calls", "rounds"),
    [
        (1e-4, "cuda", 10, 20),
        (1e-4, "cpu", 1, 20),
        (0.04, "cuda", 1, 20),  # by tens, that would be 8 seconds
        (2.0, "cuda", 1, 4),
        (4.0, "cpu", 1, 3),
        (25.0, "cuda", 1, 1),
    ],
)
def test_a_form_is_timed_for_some_seconds(first: float, kind: str, calls: int, rounds: int) -> None:
    assert measure.calls_for(first, kind) == calls
    assert measure.rounds_for(first * calls) == rounds


def test_spread_is_between_the_quartiles() -> None:
    assert measure.median_and_spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0)
    assert measure.median_and_spread([2.0]) == (2.0, 0.0)


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    def used() -> None:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # 8
        del first  # 4
        third = second * 2  # 8
        torch.ones(500, 1000)  # 10, for a moment
        del second, third

    kept: list[torch.Tensor] = []
    assert measure.peak_bytes(used) == 10_000_000
    assert measure.peak_bytes(lambda: kept.append(torch.ones(1000))) == 4000
    assert measure.peak_bytes(lambda: None) == 0


def test_launches_of_the_cpu_are_operators_and_views_hold_their_memory_once() -> None:
    x = torch.ones(3)
    assert measure.launches(lambda: x.add_(1).mul_(2)) == 2
    assert measure.held_bytes([x, x[1:], torch.ones(2)], CPU) == 12 + 8
