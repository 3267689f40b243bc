"""Which tensors are one memory, and which share a part of one.

Tied weights are one memory: the same address, dtype, shape and strides, whatever objects they are.
To share only a part is no tie: what is written to the one changes the other in places that nobody
selected.
"""

from collections.abc import Collection, Hashable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import TalosValueError

__all__ = ["check_separate", "place"]


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
