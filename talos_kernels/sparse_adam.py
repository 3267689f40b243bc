"""One AdamW step on the selected entries of many tensors.

For every selected entry, in float32, with bias corrections in float64 (Loshchilov & Hutter 2019,
algorithm 2; the order of operations is that of `torch.optim.AdamW`):

    step       <- step + 1                                of a tensor with a gradient
    g          <- g / grad_scale * clip_factor
    w          <- w * (1 - lr * weight_decay)
    exp_avg    <- exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2
    denom      <- sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps
    w          <- w - lr / (1 - beta1^step) * exp_avg / denom

The value of an unselected entry is neither used nor changed, whatever its gradient. A gradient is
dense, or compact: its selected entries in rank order.

bf16 moments are computed in float32 and rounded up or down at random, with noise that depends on
(seed, step, rank), so that small changes survive on average. bf16 and fp16 weights are rounded from
a float32 master of the selected entries. If a stored weight is not its master's rounding, other
code wrote it, and the master restarts from it.

Bytes moved at least, N entries in the touched tensors, f the share of 32-byte sectors touched:
2 N f b_param + [N f | compact: nnz] b_grad + nnz (4 b_moment + index [+ 8 master])
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._checks import check_flat, check_params, contiguous, dense_gradients, write_back
from ._ops import define, op_for
from .errors import TalosValueError
from .index import Index

__all__ = ["sparse_adam_", "sparse_adam_reference"]

SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor[] index, Tensor(b!) exp_avg, "
    "Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor(e!) steps, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? clip_factor, int seed) -> ()"
)


def sparse_adam_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    index: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    steps: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_factor: Tensor | None,
    seed: int,
) -> None:
    """Define the op by torch's elementwise operations, one tensor after another."""
    if found_inf is not None and found_inf.item() != 0:
        return
    packed = Index.from_buffers(index)
    for tensor, (part, entries) in enumerate(zip(packed.unpack(), packed.slices, strict=True)):
        param, grad = params[tensor].view(-1), grads[tensor].view(-1)
        if grad.numel() == 0:
            continue
        steps[tensor] += 1
        where = part.positions_int64().to(param.device)
        compact = grad.numel() < param.numel()
        wide = torch.promote_types(param.dtype, torch.float32)
        g = (grad if compact else grad[where]).to(wide)
        if grad_scale is not None:
            g = g / grad_scale
        if clip_factor is not None:
            g = g * clip_factor
        if maximize:
            g = -g
        stored = param[where]
        w = stored.to(wide)
        if master is not None:
            ours = master[entries].to(param.dtype) == stored
            w = torch.where(ours, master[entries], w)
        m, v = exp_avg[entries].to(wide), exp_avg_sq[entries].to(wide)
        step, rate = steps[tensor].item(), lr.item()
        if weight_decay != 0:
            w.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # In float64, which rounds it correctly: torch's float32 root on x86 is MKL's, and does not.
        root = v.double().sqrt().to(wide)
        denominator = (root / (1 - beta2**step) ** 0.5).add_(eps)
        w.addcdiv_(m, denominator, value=-rate / (1 - beta1**step))
        if exp_avg.dtype == torch.bfloat16:
            noise = _noise(seed, int(step), entries, w.device)
            m, v = _rounded(m, noise & 0xFFFF), _rounded(v, noise >> 16)
        exp_avg[entries], exp_avg_sq[entries] = m, v
        if master is not None:
            master[entries] = w
        param[where] = w.to(param.dtype)


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits, held in int64, by a bijection ("lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _noise(seed: int, step: int, entries: slice, device: torch.device) -> Tensor:
    """Return 32 bits of noise for each rank in `entries`: int64, the same on every device."""
    ranks = torch.arange(entries.start, entries.stop, device=device, dtype=torch.int64)
    key = _mix(torch.tensor(seed & 0xFFFFFFFF, dtype=torch.int64, device=device)) + step
    key = _mix(key & 0xFFFFFFFF)
    return _mix(_mix((key + (ranks >> 32)) & 0xFFFFFFFF) ^ (ranks & 0xFFFFFFFF))


def _rounded(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, whose mean over the noise is `x`; infinities and NaN stay."""
    bits = ((x.view(torch.int32).long() & 0xFFFFFFFF) + noise >> 16).to(torch.int16)
    return torch.where(x.isfinite(), bits.view(torch.bfloat16), x.bfloat16())


define("sparse_adam_", SCHEMA, sparse_adam_reference)


def sparse_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    index: Index,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    master: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_factor: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One AdamW step, in place, on the selected entries of many tensors, in one launch.

    Args:
        params: float32, bfloat16, float16 or float64, one dtype and device, any shapes.
        grads: the gradients, each shaped as its param, or flat `[nnz of the tensor]`: compact, as
            `gather_grad_` makes it; None leaves the tensor and its state as they are.
        index: the selection in `params`, on their device.
        exp_avg: float32 or bfloat16 `[nnz]`, for float64 weights float64: first moment in rank
            order, updated.
        exp_avg_sq: `[nnz]` of the same dtype, second moment in rank order, updated.
        steps: float32 `[len(params)]`, the steps of each tensor; increased where there is a
            gradient.
        lr: learning rate; a float64 0-dim tensor on the device is read without a sync.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, of the selected entries only.
        maximize: ascend instead of descend.
        master: float32 `[nnz]`, the weights before rounding; for bfloat16 and float16, updated.
        grad_scale: 0-dim or `[1]`; gradients are divided by it.
        found_inf: 0-dim or `[1]`; nothing changes if it is not 0.
        clip_factor: 0-dim or `[1]`; gradients are multiplied by it.
        seed: seed of the noise that rounds bfloat16 moments.

    Raises:
        TalosValueError: a shape, number, device or layout does not fit the index.
        TalosTypeError: a dtype is not supported or not shared.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> w, g = torch.zeros(4), torch.ones(4)
        >>> index = Index.pack([TensorIndex.encode(torch.tensor([True, False, False, True]))])
        >>> m, v, steps = torch.zeros(2), torch.zeros(2), torch.zeros(1)
        >>> sparse_adam_([w], [g], index, m, v, steps, lr=0.5)
        >>> w, steps
        (tensor([-0.5000,  0.0000,  0.0000, -0.5000]), tensor([1.]))
    """
    check_params("params", params, index)
    for i, (param, grad, nnz) in enumerate(zip(params, grads, index.nnzs, strict=False)):
        if grad is not None and grad.shape != param.shape and grad.shape != (nnz,):
            raise TalosValueError(
                f"grads[{i}] must be shaped as its parameter, {tuple(param.shape)}, or compact, "
                f"({nnz},), got {tuple(grad.shape)}"
            )
    double = len(params) > 0 and params[0].dtype == torch.float64
    kinds = (torch.float64,) if double else (torch.float32, torch.bfloat16)
    check_flat("exp_avg", exp_avg, index, kinds)
    check_flat("exp_avg_sq", exp_avg_sq, index, (exp_avg.dtype,))
    if master is not None:
        check_flat("master", master, index, (torch.float32,))
    for name, scalar in (
        ("lr", lr),
        ("grad_scale", grad_scale),
        ("found_inf", found_inf),
        ("clip_factor", clip_factor),
    ):
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise TalosValueError(f"{name} must have one element, got {tuple(scalar.shape)}")
    if steps.shape != (len(params),) or steps.dtype != torch.float32 or steps.stride() != (1,):
        raise TalosValueError(
            f"steps must be float32 of shape ({len(params)},), one count a tensor, "
            f"got {steps.dtype} of shape {tuple(steps.shape)}"
        )
    if not params or index.nnz == 0:
        return
    rows = contiguous(params)
    dense = dense_gradients(grads, index, params[0].dtype, compact=True)
    rate = torch.as_tensor(lr, dtype=torch.float64, device=index.device)
    sparse_adam_rows_(
        rows, dense, index, exp_avg, exp_avg_sq, master, steps, rate, *betas, eps, weight_decay,
        maximize, grad_scale, found_inf, clip_factor, seed,
    )  # fmt: skip
    write_back(params, rows)


def sparse_adam_rows_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    index: Index,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    steps: Tensor,
    *numbers: Any,
) -> None:
    """Run the op on checked arguments; `numbers` are the schema's from `lr` on.

    All tensors are row-major. The gradients share one dtype, the weights' or float32; an empty one
    stands for None. `lr` is float64 on the device.
    """
    placed = [
        each.to(index.device, torch.float32) if number and isinstance(each, Tensor) else each
        for number, each in enumerate(numbers)
    ]
    op_for("sparse_adam_", params[0].dtype)(
        params, grads, index.buffers, exp_avg, exp_avg_sq, master, steps, *placed
    )
    increment_version([*params, exp_avg, exp_avg_sq, steps])
