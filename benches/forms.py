"""The forms of one optimizer step that are measured beside each other.

All take float32 weights, dense gradients and no weight decay (form `frozen` could not leave the
unselected weights alone with it). The strong baselines:

- `whole`: fused AdamW over every tensor of the model, what dense fine-tuning does.
- `frozen`: every untouched tensor frozen; the gradients of the others multiplied by the mask, then
  fused AdamW on them: the best that torch does by itself.
- `elementwise`: the step of the method's released code, one elementwise operation after the other,
  with dense moments and the mask multiplied into the learning rate: 17 passes, 160 bytes an entry.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

import talos
from benches.shapes import ModelShape, TensorShape
from talos.app.costs.step_bytes import dense_step, masked_step, sparse_step
from talos.app.costs.workload import QK_DENSITY
from talos_kernels._ops import CUDA_BACKENDS, cuda_backends

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8

Named = dict[str, torch.nn.Parameter]


@dataclass
class Form:
    """One form, ready to step: its weights, its state, and the bytes that a step must move."""

    step: Callable[[], object]
    weights: dict[str, torch.Tensor]
    bytes_moved: int
    state_bytes: Callable[[], int]


def parameters(
    tensors: tuple[TensorShape, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Named:
    """Random weights with random gradients; a tensor's values depend on its name only."""
    named = {}
    for tensor in tensors:
        generator = torch.Generator(device).manual_seed(sum(tensor.name.encode()))
        weight = torch.randn(tensor.shape, generator=generator, device=device) * 0.02
        parameter = torch.nn.Parameter(weight.to(dtype))
        grad = torch.randn(tensor.shape, generator=generator, device=device) * 1e-3
        parameter.grad = grad.to(dtype)
        named[tensor.name] = parameter
    return named


@lru_cache(maxsize=1)  # a large model's takes seconds, and forms of one density follow each other
def selection(shape: ModelShape, density: float) -> talos.Mask:
    return talos.Mask.from_dense(shape.masks(density))


@lru_cache(maxsize=1)
def selected(shape: ModelShape, density: float, device: torch.device) -> dict[str, torch.Tensor]:
    """The same as bool tensors on a device."""
    mask = selection(shape, density)
    return {name: mask.to_dense(name).to(device) for name in mask.names}


@contextmanager
def backend(name: str | None, op: str) -> Iterator[None]:
    """Within it an op is Triton's ("triton") or the compiled library's ("csrc") on CUDA devices.

    With None it is the usual one.

    Raises:
        RuntimeError: that one does not serve the op there.
    """
    if name is None:
        yield
        return
    if torch.cuda.is_available() and name not in cuda_backends(op):
        raise RuntimeError(f"{op} must be one of {', '.join(cuda_backends(op))} here, got {name}")
    usual = CUDA_BACKENDS[op]
    CUDA_BACKENDS[op] = name
    try:
        yield
    finally:
        CUDA_BACKENDS[op] = usual


def nbytes(tree: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(nbytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(nbytes, tree))
    return 0


def ours(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compact: bool = False,
    moment_dtype: torch.dtype = torch.float32,
    density: float = QK_DENSITY,
) -> Form:
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
    moved = sparse_step(
        parts, mask.nbytes, compact=compact, itemsize=dtype.itemsize, moment=moment_dtype.itemsize
    )
    return Form(
        optimizer.step,
        {name: parameter.data for name, parameter in named.items()},
        moved,
        lambda: nbytes(optimizer.state_dict()["state"]) + mask.nbytes,
    )


def fused_adamw(named: Named, device: torch.device) -> torch.optim.AdamW:
    """Torch's own step in one call."""
    return torch.optim.AdamW(
        named.values(),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",  # by a CUDA graph; its steps are on the device anyway
    )


def whole(shape: ModelShape, device: torch.device) -> Form:
    named = parameters(shape.tensors, device)
    optimizer = fused_adamw(named, device)
    return Form(
        optimizer.step,
        {tensor.name: named[tensor.name].data for tensor in shape.touched},
        dense_step(shape.numel),
        lambda: nbytes(optimizer.state_dict()["state"]),
    )


def frozen(shape: ModelShape, device: torch.device) -> Form:
    named = parameters(shape.touched, device)
    masks = [mask.float() for mask in selected(shape, QK_DENSITY, device).values()]
    grads = [parameter.grad for parameter in named.values()]
    optimizer = fused_adamw(named, device)

    def step() -> None:
        torch._foreach_mul_(grads, masks)
        optimizer.step()

    return Form(
        step,
        {name: parameter.data for name, parameter in named.items()},
        masked_step(sum(tensor.numel for tensor in shape.touched)),
        lambda: nbytes(optimizer.state_dict()["state"]) + nbytes(masks),
    )


def elementwise(shape: ModelShape, device: torch.device) -> Form:
    named = parameters(shape.touched, device)
    masks = [mask.float() for mask in selected(shape, QK_DENSITY, device).values()]
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
        for param, mask, (exp_avg, exp_avg_sq) in zip(named.values(), masks, moments, strict=True):
            grad = param.grad
            param.mul_(1 - mask * LR * weight_decay)
            exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step_size = mask * LR / correction1
            denom = (exp_avg_sq.sqrt() / correction2).add_(EPS)
            param.add_(-1 * step_size * (exp_avg / denom))

    return Form(
        step,
        {name: parameter.data for name, parameter in named.items()},
        160 * sum(tensor.numel for tensor in shape.touched),
        lambda: nbytes(moments) + nbytes(masks),
    )


def expected(
    shape: ModelShape, device: torch.device, steps: int, density: float = QK_DENSITY
) -> dict[str, torch.Tensor]:
    """The selected weights after `steps`, by torch's AdamW in float64 on those alone."""
    named = parameters(shape.touched, device)
    results = {}
    for name, mask in selected(shape, density, device).items():
        weight = torch.nn.Parameter(named[name].detach()[mask].double())
        weight.grad = named[name].grad[mask].double()
        optimizer = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
        for _ in range(steps):
            optimizer.step()
        results[name] = weight.detach()
    return results
