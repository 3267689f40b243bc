"""The ops on every device, against oracles from outside: torch's AdamW, indexing, float64.

Where the compiled library was built it serves the CPU, so each op is also run as its reference.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from talos_kernels import (
    Index,
    TalosTypeError,
    TalosValueError,
    TensorIndex,
    add_delta_,
    gather_grad_,
    revert_delta_,
    scatter_,
    sparse_adam_,
)
from talos_kernels import _ops as ops
from talos_kernels.add_delta import add_delta_reference
from talos_kernels.gather_grad import gather_grad_reference, scatter_reference
from talos_kernels.sparse_adam import sparse_adam_reference
from tests.cases import CASES, DTYPES, MANY, Case, assert_bit_equal, assert_close

REFERENCES: dict[str, Callable[..., Any]] = {
    "sparse_adam_": sparse_adam_reference,
    "gather_grad_": gather_grad_reference,
    "scatter_": scatter_reference,
    "add_delta_": add_delta_reference,
}


@pytest.fixture(params=["op", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs behind the public functions: the device's own implementation, or the reference."""
    if request.param == "reference":

        class References:
            def __getattr__(self, name: str) -> Callable[..., Any]:
                return REFERENCES[name]

        monkeypatch.setattr(torch.ops, "talos", References())
    return str(request.param)


def packed(case: Case, device: torch.device) -> tuple[Index, list[Tensor]]:
    masks = [mask.to(device) for mask in case.masks()]
    return Index.pack([TensorIndex.encode(mask) for mask in masks], device), masks


def selected(tensors: list[Tensor], masks: list[Tensor]) -> Tensor:
    parts = [tensor[mask] for tensor, mask in zip(tensors, masks, strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_and_scatter_are_indexing(
    case: Case, dtype: torch.dtype, device: torch.device, implementation: str
) -> None:
    index, masks = packed(case, device)
    grads = [tensor.to(device) for tensor in case.tensors(dtype)]
    for grad, mask in zip(grads, masks, strict=True):
        grad[~mask] = torch.nan
    out = torch.empty(index.nnz, device=device)
    gather_grad_(out, grads, index)
    expected = selected(grads, masks).float()
    assert_bit_equal(out, expected)
    gather_grad_(out, grads, index, accumulate=True)
    assert_bit_equal(out, expected + expected)

    params = [tensor.to(device) for tensor in case.tensors(dtype, seed=2)]
    wanted = [param.clone() for param in params]
    values = expected.to(dtype)
    scatter_(params, index, values)
    for param, mask, entries in zip(wanted, masks, index.slices, strict=True):
        param[mask] = values[entries]
    for param, expected_param in zip(params, wanted, strict=True):
        assert_bit_equal(param, expected_param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_delta_and_revert(
    case: Case, dtype: torch.dtype, device: torch.device, implementation: str
) -> None:
    index, masks = packed(case, device)
    params = [tensor.to(device) for tensor in case.tensors(dtype)]
    before = [param.clone() for param in params]
    values = torch.randn(index.nnz, device=device)
    saved = torch.empty(index.nnz, device=device, dtype=dtype)
    add_delta_(params, index, values, scale=0.3, saved=saved)
    for param, old, mask, entries in zip(params, before, masks, index.slices, strict=True):
        exact = old.double()[mask] + 0.3 * values[entries].double()
        # half a unit of the result, and float32's own rounding of the product and the sum
        spread = exact.abs() * torch.finfo(dtype).eps + (0.3 * values[entries]).abs() * 2**-22
        assert bool(((param[mask].double() - exact).abs() <= spread + 1e-7).all())
        assert_bit_equal(param[~mask], old[~mask])
    revert_delta_(params, index, saved)
    for param, old in zip(params, before, strict=True):
        assert_bit_equal(param, old)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_adam_step_against_float64(
    case: Case, dtype: torch.dtype, weight_decay: float, device: torch.device, implementation: str
) -> None:
    index, masks = packed(case, device)
    params = [tensor.to(device) for tensor in case.tensors(dtype)]
    grads = [tensor.to(device) for tensor in case.tensors(dtype, seed=3)]
    before = [param.clone() for param in params]
    m, v = torch.randn(index.nnz, device=device) * 0.1, torch.rand(index.nnz, device=device)
    old_m, old_v = m.clone(), v.clone()
    master = None if dtype == torch.float32 else selected(params, masks).float()
    steps = torch.full((len(params),), 6.0, device=device)
    for grad, mask in zip(grads, masks, strict=True):
        grad[~mask] = torch.nan
    sparse_adam_(
        params, grads, index, m, v, steps, lr=1e-2, weight_decay=weight_decay, master=master
    )
    for param, old, grad, mask, entries in zip(
        params, before, grads, masks, index.slices, strict=True
    ):
        g, w = grad[mask].double(), old[mask].double() * (1 - 1e-2 * weight_decay)
        new_m = 0.9 * old_m[entries].double() + 0.1 * g
        new_v = 0.999 * old_v[entries].double() + 0.001 * g * g
        w = w - 1e-2 * (new_m / (1 - 0.9**7)) / ((new_v / (1 - 0.999**7)).sqrt() + 1e-8)
        assert_close(param[mask].double(), w, dtype=dtype)
        if master is not None:
            assert_close(master[entries].double(), w, dtype=torch.float32)
        assert_bit_equal(param[~mask], old[~mask])
    if index.nnz:
        given = torch.tensor([grad.numel() > 0 for grad in grads], device=device)
        assert torch.equal(steps, 6.0 + given)


@pytest.mark.parametrize("case", MANY, ids=str)
def test_skipping_scaling_and_found_inf(
    case: Case, device: torch.device, implementation: str
) -> None:
    index, _ = packed(case, device)
    params = [tensor.to(device) for tensor in case.tensors()]
    grads: list[Tensor | None] = [tensor.to(device) for tensor in case.tensors(seed=3)]
    state = [torch.zeros(index.nnz, device=device) for _ in range(2)]
    state.append(torch.zeros(len(params), device=device))

    def step(grads: list[Tensor | None], **kwargs: Any) -> list[Tensor]:
        weights = [param.clone() for param in params]
        m, v, steps = (tensor.clone() for tensor in state)
        sparse_adam_(weights, grads, index, m, v, steps, lr=0.1, **kwargs)
        return [*weights, m, v, steps]

    start = [*params, *state]
    plain = step(grads)
    for found in (torch.ones((), device=device), torch.ones(1, device=device)):
        for after, before in zip(step(grads, found_inf=found), start, strict=True):
            assert_bit_equal(after, before)
    scaled = step(
        [None if grad is None else grad * 1024 for grad in grads],
        grad_scale=torch.tensor(1024.0, device=device),
        found_inf=torch.zeros((), device=device),
    )
    for after, expected in zip(scaled, plain, strict=True):
        assert_bit_equal(after, expected)
    negated = step([None if grad is None else -grad for grad in grads], maximize=True)
    for after, expected in zip(negated, plain, strict=True):
        assert_bit_equal(after, expected)
    for after, before in zip(step([None] * len(grads)), start, strict=True):
        assert_bit_equal(after, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_compact_gradients_step_as_dense_ones_do(
    case: Case, dtype: torch.dtype, device: torch.device, implementation: str
) -> None:
    index, masks = packed(case, device)
    dense = [tensor.to(device) for tensor in case.tensors(dtype, seed=3)]
    compact = [grad[mask] for grad, mask in zip(dense, masks, strict=True)]
    mixed = [compact[i] if i % 2 else grad for i, grad in enumerate(dense)]
    clip = torch.tensor(0.25, device=device)
    ends = []
    for grads, factor in (
        ([grad.float() * 0.25 for grad in dense], None),
        (dense, clip),
        (compact, clip),
        (mixed, clip),
    ):
        params = [tensor.to(device) for tensor in case.tensors(dtype)]
        m, v = torch.zeros(2, index.nnz, device=device).unbind()
        steps = torch.zeros(len(params), device=device)
        sparse_adam_(params, grads, index, m, v, steps, lr=0.1, clip_factor=factor)
        counted = steps[[nnz > 0 for nnz in index.nnzs]]  # an empty gradient tells nothing else
        ends.append([*params, m, v, counted])
    for end in ends[1:]:
        for after, expected in zip(end, ends[0], strict=True):
            assert_bit_equal(after, expected)


def test_bf16_moments_keep_small_changes_on_average(
    device: torch.device, implementation: str
) -> None:
    """A second moment of 1 that each step lowers by a tenth of half a bf16 unit still falls."""
    n, steps, beta2 = 4096, 40, 1 - 2**-12
    mask = torch.ones(n, dtype=torch.bool)
    index = Index.pack([TensorIndex.encode(mask)], device)
    zero = torch.zeros(n, device=device)
    runs = []
    for seed in (0, 1, 0):
        m = torch.zeros(n, device=device, dtype=torch.bfloat16)
        v = torch.ones(n, device=device, dtype=torch.bfloat16)
        count = torch.zeros(1, device=device)
        for _ in range(steps):
            sparse_adam_(
                [zero.clone()], [zero], index, m, v, count, lr=0.1, betas=(0.9, beta2), seed=seed
            )
        runs.append(v)
    exact = beta2**steps
    assert torch.equal(torch.ones(1).bfloat16() * beta2, torch.ones(1).bfloat16()), "rounds back"
    assert runs[0].double().mean().item() == pytest.approx(exact, abs=3e-4)
    assert_bit_equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("case", MANY, ids=str)
def test_two_runs_are_bit_equal_on_any_number_of_threads(case: Case, device: torch.device) -> None:
    index, _ = packed(case, device)
    ends = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        params = [tensor.to(device) for tensor in case.tensors()]
        grads: list[Tensor | None] = [tensor.to(device) for tensor in case.tensors(seed=3)]
        m, v = torch.zeros(index.nnz, device=device), torch.zeros(index.nnz, device=device)
        sparse_adam_(params, grads, index, m, v, torch.zeros(len(params), device=device), lr=0.1)
        out = torch.empty(index.nnz, device=device)
        gather_grad_(out, grads, index)
        ends.append([*params, m, v, out])
    torch.set_num_threads(threads)
    for first, second in zip(*ends, strict=True):
        assert_bit_equal(first, second)


@pytest.mark.slow
def test_opcheck(device: torch.device) -> None:
    case = Case("opcheck", (97, 2049), (0.6, 0.01))
    index, _ = packed(case, device)
    params = [tensor.to(device) for tensor in case.tensors()]
    grads = [tensor.to(device) for tensor in case.tensors(seed=3)]
    flat = [torch.zeros(index.nnz, device=device) for _ in range(3)]
    steps, lr = torch.zeros(2, device=device), torch.tensor(0.1, dtype=torch.float64, device=device)
    adam = (*flat[:2], None, steps, lr, 0.9, 0.999, 1e-8, 0.0, False, None, None, None, 0)
    buffers = index.buffers
    calls = {
        "sparse_adam_": (params, grads, buffers, *adam),
        "gather_grad_": (flat[0], grads, buffers, False),
        "scatter_": (params, buffers, flat[0]),
        "add_delta_": (params, buffers, flat[0], 0.5, flat[2]),
    }
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.talos, name).default, args)


def test_ops_serve_a_compiled_caller(device: torch.device) -> None:
    index, masks = packed(MANY[0], device)
    grads = [tensor.to(device) for tensor in MANY[0].tensors()]

    def gathered(grads: list[Tensor]) -> Tensor:
        out = grads[0].new_zeros(index.nnz)
        torch.ops.talos.gather_grad_(out, grads, index.buffers, False)
        return out * 2

    compiled = torch.compile(gathered, backend="eager", fullgraph=True)
    assert_bit_equal(compiled(grads), selected(grads, masks) * 2)


def test_in_place_writes_are_seen_by_autograd() -> None:
    index = Index.pack([TensorIndex.encode(torch.ones(3) > 0)])
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    add_delta_([weight], index, torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(ops.compiled_library is None, reason="talos_kernels/_C was not built")
def test_a_library_built_from_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(_schema="talos_C::scatter_(Tensor values) -> ()")
    monkeypatch.setattr(torch.ops.talos_C, "scatter_", SimpleNamespace(default=other))
    with pytest.warns(UserWarning, match=r"_C.* must be built from this .*build it again"):
        assert ops._compiled("scatter_", "CPU") is None


def test_the_table_chooses_among_two_backends_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"triton": lambda: "triton's", "csrc": lambda: "the library's"}
    monkeypatch.setitem(ops._on_cuda, "sparse_adam_", served)
    monkeypatch.setitem(ops._on_cuda, "add_delta_", {"csrc": served["csrc"]})
    for backend, implementation in served.items():
        monkeypatch.setitem(ops.CUDA_BACKENDS, "sparse_adam_", backend)
        assert ops.cuda_implementation("sparse_adam_") is implementation
    assert ops.CUDA_BACKENDS["add_delta_"] == "triton"
    assert ops.cuda_implementation("add_delta_") is served["csrc"]  # the only one there


def test_triton_serves_every_op_on_cuda() -> None:
    pytest.importorskip("talos_kernels.triton")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ops._defined:
        assert "triton" in ops._on_cuda[name]
        assert has_kernel(f"talos::{name}", "CUDA")


def step_with(**changes: Any) -> None:
    index = Index.pack([TensorIndex.encode(torch.ones(2, 3) > 0)])
    values: dict[str, Any] = {
        "params": [torch.zeros(2, 3)],
        "grads": [torch.zeros(2, 3)],
        "index": index,
        "exp_avg": torch.zeros(6),
        "exp_avg_sq": torch.zeros(6),
        "steps": torch.zeros(1),
        "lr": 0.1,
    }
    sparse_adam_(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"params": []}, TalosValueError, "params must hold 1 tensors"),
        ({"params": [torch.zeros(7)]}, TalosValueError, r"params\[0\] must have 6 entries"),
        ({"params": [torch.zeros(2, 3).int()]}, TalosTypeError, "float32, bfloat16, float16 or"),
        ({"params": [torch.zeros(2, 3).double()]}, TalosTypeError, "exp_avg must be torch.float64"),
        ({"grads": []}, TalosValueError, "grads must hold 1 entries"),
        ({"grads": [torch.zeros(3, 2)]}, TalosValueError, "shaped as its parameter"),
        ({"grads": [torch.zeros(2, 3).to_sparse()]}, TalosTypeError, r"call .to_dense\(\) first"),
        ({"grads": [torch.zeros(2, 3).int()]}, TalosTypeError, r"grads\[0\] must be float32"),
        ({"exp_avg": torch.zeros(5)}, TalosValueError, r"contiguous of shape \(6,\)"),
        ({"exp_avg": torch.zeros(12)[::2]}, TalosValueError, r"strides \(2,\)"),
        ({"exp_avg": torch.zeros(6).half()}, TalosTypeError, "exp_avg must be"),
        ({"exp_avg": torch.zeros(6).bfloat16()}, TalosTypeError, "exp_avg_sq must be"),
        ({"master": torch.zeros(7)}, TalosValueError, "master must be contiguous"),
        ({"steps": torch.zeros(2)}, TalosValueError, "steps must be float32"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        step_with(**changes)


def test_mixed_dtypes_are_refused() -> None:
    index = Index.pack([TensorIndex.encode(torch.ones(2) > 0)] * 2)
    with pytest.raises(TalosTypeError, match="make one call a dtype"):
        add_delta_([torch.zeros(2), torch.zeros(2).half()], index, torch.zeros(4))


def test_float64_is_served_by_the_reference() -> None:
    """As torch's AdamW in float64 does, and an edit exact to float64."""
    mask = torch.rand(40, 30) < 0.3
    index = Index.pack([TensorIndex.encode(mask)])
    double = {"dtype": torch.float64}
    w, g = torch.randn(40, 30, **double), torch.randn(40, 30, **double)
    theirs = torch.nn.Parameter(w[mask].clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    m, v, steps = (torch.zeros(size, dtype=kind) for size, kind in (
        (index.nnz, torch.float64), (index.nnz, torch.float64), (1, torch.float32)))  # fmt: skip
    before = w.clone()
    for _ in range(3):
        theirs.grad = g[mask]
        optimizer.step()
        sparse_adam_([w], [g], index, m, v, steps, lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(w[mask], theirs.detach(), rtol=1e-12, atol=1e-14)
    assert torch.equal(w[~mask], before[~mask])

    out, saved = torch.empty(index.nnz, **double), torch.empty(index.nnz, **double)
    gather_grad_(out, [w], index)
    assert torch.equal(out, w[mask])
    edited = w.clone()
    add_delta_([edited], index, torch.ones(index.nnz), scale=1e-9, saved=saved)
    assert torch.equal(edited[mask], w[mask] + 1e-9)
    revert_delta_([edited], index, saved)
    assert torch.equal(edited, w)
