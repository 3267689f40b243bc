"""Small helpers for tensors: which are one memory, nested ones, shared casts, a model's buffers.

Tied weights are one memory: the same address, dtype, shape and strides, whatever objects they are.
To share only a part is no tie: what is written to the one changes the other in places that nobody
selected.

A forward may write a buffer (`running_mean.add_`) or put another tensor in its place
(`self.average = .9 * self.average + ...`), so both are kept: the tensor and what it holds.
"""

import warnings
import weakref
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import TensorWeakRef

from talos.errors import TalosValueError

__all__ = [
    "KeptBuffers",
    "SharedCast",
    "WatchedBuffers",
    "check_separate",
    "equal_bits",
    "moved_buffers",
    "place",
    "tensors_in",
    "warn_of_moved",
]


def place(tensor: Tensor) -> Hashable:
    """Tell where a tensor lies: equal for two tensors if they are one memory.

    Args:
        tensor: any; one without values, or without memory of its own, is only itself.

    Returns:
        A key for dictionaries, good as long as the tensor lives.

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


def check_separate(
    tensors: Mapping[str, Tensor], what: str, chosen: Collection[str] | None = None
) -> None:
    """Refuse tensors that share a part of their memory; the same memory whole is allowed.

    Args:
        tensors: by name.
        what: they are, for the message.
        chosen: the names of which one must be in an overlap that is refused; None: all.

    Raises:
        TalosValueError: two of them overlap, or entries of one are one memory (`expand`).

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
    """The addresses from a tensor's first byte to behind its last."""
    last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _crosses_itself(tensor: Tensor) -> bool:
    """Whether entries may share memory: a dimension steps by less than the smaller ones span."""
    span = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for by, size in sorted((by, size) for by, size in pairs if size > 1):
        if by < span:
            return True
        span += by * (size - 1)
    return False


def _check_cluster(tensors: Mapping[str, Tensor], what: str, chosen: Collection[str]) -> None:
    """Refuse an overlap among tensors whose runs of addresses touch, by marking their bytes."""
    if len(tensors) < 2 or not any(name in chosen for name in tensors):
        return
    first = min(_run(tensor)[0] for tensor in tensors.values())
    size = max(_run(tensor)[1] for tensor in tensors.values()) - first
    owners = torch.zeros(size, dtype=torch.int32, device="cpu")  # 0: nobody
    names = ["", *sorted(tensors, key=lambda name: name not in chosen)]  # the chosen are first
    for number, name in enumerate(names[1:], 1):
        tensor = tensors[name]
        width = tensor.element_size()
        strides = (*(by * width for by in tensor.stride()), 1)
        own = owners.as_strided((*tensor.shape, width), strides, tensor.data_ptr() - first)
        other = names[int(own.max())]
        if other and (other in chosen or name in chosen):
            raise _overlap(what, f"{other} and {name}")
        if name in chosen:  # what two others share is theirs
            own.fill_(number)


def _overlap(what: str, which: str) -> TalosValueError:
    return TalosValueError(
        f"{what} must not share a part of their memory, got {which}; give each its own (clone), or "
        "tie them as one parameter"
    )


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples.

    Args:
        tree: any; what is none of these holds no tensor.

    Yields:
        Each, in order.

    Example:
        >>> import torch
        >>> [each.numel() for each in tensors_in({"a": [torch.zeros(2)], "b": (3, torch.ones(1))})]
        [2, 1]
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from tensors_in(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from tensors_in(each)


class SharedCast:
    """The last input without its history in another dtype: layers that share it share the cast.

    Neither is kept alive by it: the cast lives as long as a layer keeps it for its backward.
    """

    def __init__(self) -> None:
        self._last: tuple[TensorWeakRef, int, TensorWeakRef] | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Casts `x`, or finds that this was done before."""
        if self._last is not None:
            source, version, kept = self._last
            cast: Tensor | None = kept()
            same = source() is x and version == x._version
            if same and cast is not None and cast.dtype == dtype:
                return cast
        cast = x.detach().to(dtype)
        self._last = (TensorWeakRef(x), x._version, TensorWeakRef(cast))
        return cast


class KeptBuffers:
    """Copies of all buffers of a model.

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
        """Put each tensor back into its place with what it held; of the others none is written."""
        for module, name, buffer in self._places:
            module._buffers[name] = buffer
            if buffer is not None and not equal_bits(buffer, self._copies[id(buffer)]):
                buffer.copy_(self._copies[id(buffer)])


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits.

    Args:
        a: of any shape and dtype.
        b: on the same device.

    Returns:
        Whether they do; NaN equals NaN, 0 does not equal -0.

    Example:
        >>> equal_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
        True
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (each.detach().to_dense().reshape(-1).view(torch.uint8) for each in (a, b))
    return torch.equal(a, b)


class WatchedBuffers:
    """The buffers of a model's state dict as they are now, to tell later which have moved.

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
        self._before = {name: each.detach().clone() for name, each in _kept(model).items()}

    def moved(self) -> list[str]:
        """Name the buffers that hold something else now; see `moved_buffers`."""
        model = self._model()
        return [] if model is None else moved_buffers(self._before, _kept(model))

    def tell(self, stacklevel: int) -> dict[str, list[str]]:
        """Warn of those that have moved.

        Args:
            stacklevel: as of `warnings.warn`, from the caller of this method.

        Returns:
            Metadata of a task vector that does not hold them: `moved_buffers`, or nothing.
        """
        moved = self.moved()
        warn_of_moved(moved, stacklevel + 1)
        return {"moved_buffers": moved} if moved else {}


def moved_buffers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Name the buffers that differ; a count of batches, which computes nothing, is not looked at.

    Args:
        before: by name.
        after: the same later, or of another model.

    Returns:
        Names, of those that both have with values.
    """
    return [
        name
        for name, old in before.items()
        if name in after
        and not name.endswith("num_batches_tracked")
        and not (old.is_meta or after[name].is_meta)
        and not equal_bits(old, after[name].to(old.device))
    ]


def warn_of_moved(names: Sequence[str], stacklevel: int) -> None:
    """Say that a task vector does not hold what has moved.

    Args:
        names: of the buffers; none: nothing is said.
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


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
