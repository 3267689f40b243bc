"""One form of an op, ready to be checked and timed; its tensors, and the bytes it must move.

| step | bytes |
|---|---|
| AdamW over `n` fp32 weights | 28 n: weight, both moments read and written, gradient read |
| the same with a masked gradient | 40 n: also mask and gradient read, gradient written |
| `SparseAdam` | 2 N f b + gradient + nnz (16 + masters) + index |

`N` is the entries of the rows that hold selected ones, `b` a weight's bytes, and `f` the share of
32-byte sectors with a selected entry, 1 - (1 - density)^(32 / b) if those lie at random: memory is
moved by sectors. A dense gradient is read as the weights are, N f b; a compact one is 4 nnz.
Weights narrower than fp32 have masters, 8 bytes a selected entry.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import talos
from benches.shapes import QK_DENSITY, ModelShape, TensorShape
from talos_kernels._ops import CUDA_BACKENDS, cuda_backends

SECTOR_BYTES = 32  # the smallest transfer of a GPU's memory


@dataclass(frozen=True)
class Work:
    """What is timed, and what it must move or compute at least.

    Attributes:
        step: what is timed; may be called any number of times.
        check: calls it, and raises where its result is wrong.
        bytes_moved: by the form's byte model.
        flops: of the work, the same for every form.
        state_bytes: returns what is held between calls, once `step` was called.
    """

    step: Callable[[], object]
    check: Callable[[], None]
    bytes_moved: int | None = None
    flops: int | None = None
    state_bytes: Callable[[], int] | None = None

    @property
    def about(self) -> dict[str, int | None]:
        """Return the fields of a `Record` that it knows."""
        held = None if self.state_bytes is None else self.state_bytes()
        return {"bytes_moved": self.bytes_moved, "flops": self.flops, "state_bytes": held}


def parameters(
    tensors: Iterable[TensorShape], device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Parameter]:
    """Return random weights with random gradients; a tensor's values depend on its name only."""
    named = {}
    for tensor in tensors:
        generator = torch.Generator(device).manual_seed(sum(tensor.name.encode()))
        weight = torch.randn(tensor.shape, generator=generator, device=device) * 0.02
        parameter = nn.Parameter(weight.to(dtype))
        grad = torch.randn(tensor.shape, generator=generator, device=device) * 1e-3
        parameter.grad = grad.to(dtype)
        named[tensor.name] = parameter
    return named


@lru_cache(maxsize=1)  # a large model's takes seconds, and forms of one density follow each other
def selection(shape: ModelShape, density: float = QK_DENSITY) -> talos.Mask:
    return talos.Mask.from_dense(shape.masks(density))


@lru_cache(maxsize=1)
def selected(
    shape: ModelShape, device: torch.device, density: float = QK_DENSITY
) -> dict[str, Tensor]:
    """Return the same as bool tensors on a device."""
    mask = selection(shape, density)
    return {name: mask.to_dense(name).to(device) for name in mask.names}


@contextmanager
def backend(name: str | None, op: str) -> Iterator[None]:
    """Serve an op by "triton" or by "csrc" on CUDA devices within the block; None: as usual.

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


def sector_share(density: float, itemsize: int) -> float:
    """Return the share of memory sectors that hold a selected entry, if those lie at random."""
    return 1 - (1 - density) ** (SECTOR_BYTES // itemsize)


def dense_step(numel: int) -> int:
    return 28 * numel


def masked_step(numel: int) -> int:
    return 12 * numel + dense_step(numel)


def sparse_step(
    parts: Iterable[tuple[int, int]],
    index_bytes: int,
    *,
    compact: bool,
    itemsize: int = 4,
    moment: int = 4,
) -> int:
    """Return the bytes of one step of `SparseAdam`.

    Args:
        parts: of each tensor, the entries of the rows that hold selected ones, and the selected.
        index_bytes: of the compressed selection.
        compact: whether gradients are compact.
        itemsize: bytes of a weight, and of an entry of a dense gradient.
        moment: bytes of a moment.
    """
    parts = list(parts)
    nnz = sum(selected for _, selected in parts)
    touched = sum(n * sector_share(selected / n, itemsize) for n, selected in parts if n)
    gradient = 4 * nnz if compact else touched * itemsize
    per_entry = 4 * moment + (0 if itemsize == 4 else 8)  # [and masters], read and written
    return int(2 * touched * itemsize + gradient) + nnz * per_entry + index_bytes
