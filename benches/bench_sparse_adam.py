"""One optimizer step on the entries of Q and K, ours beside three strong baselines.

All take dense gradients and no weight decay, with which (b) could not keep the unselected weights.

- (a) fused AdamW over every tensor of the model: what dense fine-tuning does.
- (b) every untouched tensor frozen; the gradients of the others multiplied by the mask, then fused
  AdamW on them: the best that torch does by itself.
- (c) the step of the method's released code, one elementwise operation after the other, with dense
  moments and the mask multiplied into the learning rate: 17 passes, 160 bytes an entry.

Every form is checked before it is timed: its selected weights after three steps against torch's
AdamW in float64, its unselected ones bit for bit against what they were. The forms take turns, so
that what slows the machine slows them all.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import talos
from benches import measure
from benches.results import OURS, Record
from benches.shapes import QK_DENSITY, ModelShape, TensorShape
from benches.work import (
    Work,
    backend,
    dense_step,
    masked_step,
    parameters,
    selected,
    selection,
    sparse_step,
)
from talos_kernels._ops import cuda_backends
from tests.cases import assert_bit_equal, assert_close

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
CHECKED_STEPS = 3
ROUNDS = 20
CSRC = f"{OURS}, CUDA C++"
COMPACT = f"{OURS}, compact gradients"
MOMENTS = f"{OURS}, compact, bf16 moments"
BF16 = f"{OURS}, bf16 weights"

Make = Callable[[ModelShape, torch.device], Work]
Compare = Callable[[Tensor, Tensor, Tensor], None]
"""Takes selected weights after the checked steps, those wanted, and those before."""


def nbytes(tree: object) -> int:
    """Return the bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(nbytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(nbytes, tree))
    return 0


def close(found: Tensor, wanted: Tensor, before: Tensor) -> None:
    assert_close(found, wanted)


def nearly(found: Tensor, wanted: Tensor, before: Tensor) -> None:
    """Compare what bf16 moments lead to: each is up to a bf16 unit off, so is the quotient."""
    assert (found - wanted).abs().max() < 0.05 * (wanted - before).abs().max()


def moved(found: Tensor, wanted: Tensor, before: Tensor) -> None:
    """Check bf16 weights, which start from other values: only that they change."""
    assert not torch.equal(found, before)


def checked(
    step: Callable[[], object],
    weights: dict[str, Tensor],
    masks: dict[str, Tensor],
    *,
    compare: Compare = close,
    keeps_others: bool = True,
    **about: object,
) -> Work:
    """Return a step's work, checked against AdamW on the selected entries alone.

    A second check does nothing: it would begin from other weights.
    """
    fresh = True

    def check() -> None:
        nonlocal fresh
        if not fresh:
            return
        fresh = False
        before = {name: weights[name].clone() for name in masks}
        for _ in range(CHECKED_STEPS):
            step()
        for name, mask in masks.items():
            wanted = expected(name, mask)
            compare(weights[name][mask], wanted, before[name][mask])
            if keeps_others:
                assert_bit_equal(weights[name][~mask], before[name][~mask])

    def expected(name: str, mask: Tensor) -> Tensor:
        shape = TensorShape(name, tuple(mask.shape))
        start = parameters([shape], mask.device)[name]
        weight = nn.Parameter(start.detach()[mask].double())
        weight.grad = start.grad[mask].double()
        optimizer = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
        return weight.detach()

    return Work(step, check, **about)


def ours(
    shape: ModelShape,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    compact: bool = False,
    moment_dtype: torch.dtype = torch.float32,
    density: float = QK_DENSITY,
    compare: Compare = close,
) -> Work:
    named = parameters(shape.touched, device, dtype)
    mask = selection(shape, density)
    optimizer = talos.SparseAdam(
        list(named.items()), mask, lr=LR, betas=BETAS, eps=EPS, moment_dtype=moment_dtype
    )
    if compact:
        optimizer.compact_gradients()
        for parameter in named.values():
            gradient, parameter.grad = parameter.grad, None
            (parameter * gradient).sum().backward()  # whose gradient this is
    parts = [(tensor.query_key_numel, mask.indices[tensor.name].nnz) for tensor in shape.touched]
    return checked(
        optimizer.step,
        {name: parameter.data for name, parameter in named.items()},
        selected(shape, device, density),
        compare=compare,
        bytes_moved=sparse_step(
            parts,
            mask.nbytes,
            compact=compact,
            itemsize=dtype.itemsize,
            moment=moment_dtype.itemsize,
        ),
        state_bytes=lambda: optimizer.nbytes,
    )


def ours_by_csrc(shape: ModelShape, device: torch.device) -> Work:
    """Return the same optimizer, its op served by the compiled library."""
    work = ours(shape, device)

    def step() -> None:
        with backend("csrc", "sparse_adam_"):
            work.step()

    return replace(work, step=step)


def fused_adamw(named: dict[str, nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    """Return torch's own step in one call."""
    return torch.optim.AdamW(
        named.values(),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",  # by a CUDA graph; its steps are on the device anyway
    )


def whole(shape: ModelShape, device: torch.device) -> Work:
    named = parameters(shape.tensors, device)
    optimizer = fused_adamw(named, device)
    return checked(
        optimizer.step,
        {tensor.name: named[tensor.name].data for tensor in shape.touched},
        selected(shape, device),
        keeps_others=False,
        bytes_moved=dense_step(shape.numel),
        state_bytes=lambda: nbytes(optimizer.state_dict()["state"]),
    )


def frozen(shape: ModelShape, device: torch.device) -> Work:
    named, masks = parameters(shape.touched, device), selected(shape, device)
    factors = [mask.float() for mask in masks.values()]
    grads = [parameter.grad for parameter in named.values()]
    optimizer = fused_adamw(named, device)

    def step() -> None:
        torch._foreach_mul_(grads, factors)
        optimizer.step()

    return checked(
        step,
        {name: parameter.data for name, parameter in named.items()},
        masks,
        bytes_moved=masked_step(sum(tensor.numel for tensor in shape.touched)),
        state_bytes=lambda: nbytes(optimizer.state_dict()["state"]) + nbytes(factors),
    )


def elementwise(shape: ModelShape, device: torch.device) -> Work:
    named, masks = parameters(shape.touched, device), selected(shape, device)
    factors = [mask.float() for mask in masks.values()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in named.values()]
    beta1, beta2 = BETAS
    weight_decay = 0.0
    steps = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal steps
        steps += 1
        correction1 = 1 - beta1**steps
        correction2 = math.sqrt(1 - beta2**steps)
        for param, mask, (exp_avg, exp_avg_sq) in zip(
            named.values(), factors, moments, strict=True
        ):
            grad = param.grad
            param.mul_(1 - mask * LR * weight_decay)
            exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step_size = mask * LR / correction1
            denom = (exp_avg_sq.sqrt() / correction2).add_(EPS)
            param.add_(-1 * step_size * (exp_avg / denom))

    return checked(
        step,
        {name: parameter.data for name, parameter in named.items()},
        masks,
        bytes_moved=160 * sum(tensor.numel for tensor in shape.touched),
        state_bytes=lambda: nbytes(moments) + nbytes(factors),
    )


FORMS: dict[str, Make] = {
    OURS: ours,
    CSRC: ours_by_csrc,
    COMPACT: partial(ours, compact=True),
    MOMENTS: partial(ours, compact=True, moment_dtype=torch.bfloat16, compare=nearly),
    "(a) whole model, fused": whole,
    "(b) frozen, masked, fused": frozen,
    "(c) elementwise": elementwise,
    BF16: partial(ours, dtype=torch.bfloat16, compare=moved),
}


def missing(name: str, device: torch.device) -> str | None:
    """Return why a form cannot run here."""
    if name != CSRC or "csrc" in cuda_backends("sparse_adam_"):
        return None
    return "csrc/ was built without CUDA" if device.type == "cuda" else "there is no CUDA device"


def bench_sparse_adam(
    shape: ModelShape,
    keep: Callable[[Record], dict[str, object]],
    bandwidth: float,
    request: pytest.FixtureRequest,
) -> None:
    device = measure.target_device()
    say = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    ready = {}
    for name, make in FORMS.items():
        if (why := missing(name, device)) is not None:
            say(f"{name} is left out: {why}")
            continue
        ready[name] = make(shape, device)
        ready[name].check()
    times = measure.alternated({name: work.step for name, work in ready.items()}, ROUNDS)
    for name, work in ready.items():
        middle, spread = measure.median_and_spread(times[name])
        keep(
            Record(
                op="sparse_adam_",
                shape=shape.name,
                form=name,
                seconds=middle,
                spread=spread,
                bandwidth=bandwidth,
                peak_bytes=measure.peak_bytes(work.step),
                comparable=name != BF16,
                **work.about,
            )
        )
