"""Small tensor helpers: tensors that share memory, buffers to restore, a cast, sizes as text.

Tied weights are one memory: the same address, dtype, shape and strides, in one object or several.
Tensors that share only a part of their memory are not tied: a write to one of them changes the
other at places that nobody selected.
"""

import ctypes
import sys
import warnings
import weakref
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import TensorWeakRef

from talos.errors import TalosValueError

__all__ = [
    "INTEGERS",
    "KeptBuffers",
    "SharedCast",
    "WatchedBuffers",
    "check_separate",
    "equal_bits",
    "first_names",
    "moved_buffers",
    "place",
    "readable_size",
    "sums_of_bits",
    "trim_heap",
    "true_places",
    "warn_of_moved",
]


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype that holds the bits of an element, by its bytes."""


def place(tensor: Tensor) -> Hashable:
    """Return a key that is equal for two tensors if they are one memory.

    Args:
        tensor: any; one without values or without memory of its own equals only itself.

    Returns:
        A key for dictionaries, valid as long as the tensor lives.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> place(x) == place(x.view(2, 3)), place(x) == place(x.t())
        (True, False)
    """
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return id(tensor)
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a fake tensor, or a wrapper of others
        return id(tensor)
    if address == 0:
        return id(tensor)
    shape = tuple(tensor.shape)
    strides = tuple(by for by, size in zip(tensor.stride(), shape, strict=True) if size > 1)
    return tensor.device, address, tensor.dtype, shape, strides


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first name of the same memory."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(place(each), name) for name, each in tensors.items()}


def check_separate(
    tensors: Mapping[str, Tensor], what: str, chosen: Collection[str] | None = None
) -> None:
    """Refuse tensors that share a part of their memory; tied tensors are allowed.

    Args:
        tensors: by name.
        what: the word for them in the message.
        chosen: refuse only overlaps with one of these names; None: all.

    Raises:
        TalosValueError: two tensors overlap, or entries of one are one memory (`expand`).

    Example:
        >>> rows = torch.zeros(4, 3)
        >>> check_separate({"a": rows[:2], "b": rows[2:]}, "weights")
        >>> try:
        ...     check_separate({"a": rows[:3], "b": rows[2:]}, "weights")
        ... except TalosValueError as error:
        ...     print(str(error).split(";")[0])
        weights must not share a part of their memory, got a and b
    """
    chosen = tensors if chosen is None else chosen
    placed: dict[Hashable, str] = {}
    for name in sorted(tensors, key=lambda name: name not in chosen):
        tensor = tensors[name]
        where = place(tensor)
        if isinstance(where, tuple):
            placed.setdefault(where, name)
            if name in chosen and _crosses_itself(tensor):
                raise _overlap(what, f"{name}, whose entries are one memory (expand)")
    runs = sorted(
        (str(tensors[name].device), *_run(tensors[name]), name) for name in placed.values()
    )
    cluster: list[str] = []
    device, reach = "", 0
    for where, begin, end, name in runs:
        if where != device or begin >= reach:
            _check_cluster({each: tensors[each] for each in cluster}, what, chosen)
            cluster, device, reach = [], where, end
        cluster.append(name)
        reach = max(reach, end)
    _check_cluster({each: tensors[each] for each in cluster}, what, chosen)


def _run(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte behind its last."""
    last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _crosses_itself(tensor: Tensor) -> bool:
    """Return whether a dimension steps by less than the smaller ones span."""
    span = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for by, size in sorted((by, size) for by, size in pairs if size > 1):
        if by < span:
            return True
        span += by * (size - 1)
    return False


def _check_cluster(tensors: Mapping[str, Tensor], what: str, chosen: Collection[str]) -> None:
    """Refuse an overlap among tensors whose runs of addresses touch: mark the bytes of each."""
    if len(tensors) < 2 or not any(name in chosen for name in tensors):
        return
    first = min(_run(tensor)[0] for tensor in tensors.values())
    size = max(_run(tensor)[1] for tensor in tensors.values()) - first
    owners = torch.zeros(size, dtype=torch.int32, device="cpu")  # 0: nobody
    names = ["", *sorted(tensors, key=lambda name: name not in chosen)]  # the chosen come first
    for number, name in enumerate(names[1:], 1):
        tensor = tensors[name]
        width = tensor.element_size()
        strides = (*(by * width for by in tensor.stride()), 1)
        own = owners.as_strided((*tensor.shape, width), strides, tensor.data_ptr() - first)
        other = names[int(own.max())]
        if other and (other in chosen or name in chosen):
            raise _overlap(what, f"{other} and {name}")
        if name in chosen:  # an overlap of two others is allowed
            own.fill_(number)


def _overlap(what: str, which: str) -> TalosValueError:
    return TalosValueError(
        f"{what} must not share a part of their memory, got {which}; give each its own (clone), or "
        "tie them as one parameter"
    )


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one device have the same shape, dtype and bits.

    NaN equals NaN, and 0 does not equal -0.

    Example:
        >>> equal_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
        True
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (each.detach().to_dense().reshape(-1).view(torch.uint8) for each in (a, b))
    return torch.equal(a, b)


def sums_of_bits(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sum of each tensor's elements, their bits read as integers.

    Equal values have equal sums, whatever their strides and their place in memory: so processes
    compare what they hold. Tensors without values, sparse ones and subclasses are left out.

    Example:
        >>> sums_of_bits({"a": torch.ones(3, dtype=torch.int32), "b": torch.ones(2, device="meta")})
        {'a': 3}
    """
    return {
        name: int(each.detach().reshape(-1).view(INTEGERS[each.element_size()]).sum())
        for name, each in tensors.items()
        if type(each) in (Tensor, torch.nn.Parameter)
        and not each.is_meta
        and each.layout == torch.strided
        and each.element_size() in INTEGERS
    }


def true_places(dense: Tensor) -> Tensor:
    """Return where a flat bool tensor on the CPU is True: int64, ascending.

    NumPy is faster than torch's `nonzero` here.

    Example:
        >>> true_places(torch.tensor([False, True, True]))
        tensor([1, 2])
    """
    return torch.from_numpy(np.flatnonzero(dense.numpy()))


class KeptBuffers:
    """Copies of all buffers of a model, to restore them later.

    A forward may write a buffer (`running_mean.add_`) or assign another tensor
    (`self.average = .9 * self.average + ...`). So both are kept: the tensor and its values.

    Args:
        model: any module.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> kept = KeptBuffers(norm)
        >>> _ = norm(torch.randn(3, 2))
        >>> norm.running_mean = torch.ones(2)
        >>> kept.restore()
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._copies = {
            id(buffer): buffer.detach().clone()
            for _, _, buffer in self._places
            if buffer is not None
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put every buffer back, and its values where they changed."""
        for module, name, buffer in self._places:
            module._buffers[name] = buffer
            if buffer is not None and not equal_bits(buffer, self._copies[id(buffer)]):
                buffer.copy_(self._copies[id(buffer)])


class WatchedBuffers:
    """Copies of the buffers of a model's state dict, to find later those that changed.

    Args:
        model: any module; it is not kept alive.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> watched = WatchedBuffers(norm)
        >>> _ = norm(torch.randn(3, 2))
        >>> watched.moved()
        ['running_mean', 'running_var']
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._before = {name: each.detach().clone() for name, each in _persistent(model).items()}

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives."""
        return self._model()

    def moved(self) -> list[str]:
        """Return the names of the buffers that changed; see `moved_buffers`."""
        return [] if self.model is None else moved_buffers(self._before, _persistent(self.model))

    def metadata(self, stacklevel: int) -> dict[str, list[str]]:
        """Return the metadata of a task vector that lacks the changed buffers, and warn of them.

        Args:
            stacklevel: as of `warnings.warn`, from the caller of this method.

        Returns:
            `moved_buffers`, or nothing if no buffer changed.
        """
        moved = self.moved()
        warn_of_moved(moved, stacklevel + 1)
        return {"moved_buffers": moved} if moved else {}


def moved_buffers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the buffers that differ, without counts of batches.

    Args:
        before: by name.
        after: the same buffers later, or those of another model.
    """
    return [
        name
        for name, old in before.items()
        if name in after
        and not name.endswith("num_batches_tracked")  # nothing is computed from it
        and not (old.is_meta or after[name].is_meta)
        and not equal_bits(old, after[name].to(old.device))
    ]


def warn_of_moved(names: Sequence[str], stacklevel: int) -> None:
    """Warn that a task vector lacks the buffers of these names.

    Args:
        names: of the buffers; none: no warning.
        stacklevel: as of `warnings.warn`, from the caller of this function.
    """
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"buffers moved and are not in the task vector: {', '.join(names[:3])}{more}; base + "
            "vector computes what the tuned model does only if they stay (module.eval() while it "
            "is trained) or are copied along",
            stacklevel=stacklevel + 1,
        )


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict holds, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def readable_size(nbytes: float) -> str:
    """Format a number of bytes, in powers of ten.

    Example:
        >>> [readable_size(nbytes) for nbytes in (9_000, 12_000, 4_600_000, 13_500_000_000)]
        ['9000 B', '12 kB', '4.6 MB', '13.5 GB']
    """
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB" if nbytes >= 1e4 else f"{nbytes:.0f} B"


def trim_heap() -> None:
    """Give the heap's free pages back to the system, where the C library can.

    Tensors that come and go between some that stay leave holes in the heap. Without this their
    number grows with the model.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class SharedCast:
    """Casts an input once for all layers that share it.

    Only the last input and its cast are remembered, by weak references: the cast lives as long as a
    layer keeps it for its backward.
    """

    def __init__(self) -> None:
        self._last: tuple[TensorWeakRef, int, TensorWeakRef] | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in another dtype, without its history."""
        if self._last is not None:
            source, version, kept = self._last
            cast: Tensor | None = kept()
            same = source() is x and version == x._version
            if same and cast is not None and cast.dtype == dtype:
                return cast
        cast = x.detach().to(dtype)
        self._last = (TensorWeakRef(x), x._version, TensorWeakRef(cast))
        return cast
