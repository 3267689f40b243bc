"""Many processes: who they are, their parts of sharded tensors, and errors that all of them raise.

torch.distributed does the work. A sharded tensor is a `DTensor`, as FSDP2's `fully_shard` makes
its parameters. Each rank holds a part of it; several placements and uneven or empty parts are
DTensor's own business, so nothing here computes with offsets.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.errors import TalosRuntimeError, TalosValueError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "as_part",
    "check_same",
    "errors_on_all_ranks",
    "is_sharded",
    "local",
    "mesh_of",
    "part_of",
    "rank",
    "reduced",
    "reshard",
    "several_processes",
    "sharding",
    "whole",
    "world_size",
]

_SENT = "_talos_sent_to_all_ranks"  # set on an error that all ranks know of, in an outer block
_open: list[int] = []  # one of each block of `errors_on_all_ranks` that has not ended


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return how many processes torch.distributed runs; 1 where it is not initialised.

    Example:
        >>> world_size(), rank(), several_processes()
        (1, 0, False)
    """
    running = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if running else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def several_processes() -> bool:
    """Return whether torch.distributed runs more than this process."""
    return world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ranks hold parts of this tensor."""
    made_by = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second
    return made_by is not None and isinstance(tensor, made_by.DTensor)


def sharding(tensor: Any) -> "tuple[DeviceMesh, tuple[Any, ...]] | None":
    """Return the mesh and the placements of a sharded tensor; None of another one."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def mesh_of(tensors: Iterable[Tensor]) -> "DeviceMesh | None":
    """Return the mesh of the first tensor that is sharded; None where none is."""
    return next((found[0] for found in map(sharding, tensors) if found), None)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: the memory itself, without autograd."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        part: Tensor = sharded.to_local()
    return part


def part_of(dense: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor that this rank would hold if it were sharded like another.

    Args:
        dense: in the whole shape of `like`, the same on every rank; any dtype and device.
        like: a parameter, sharded or not.

    Returns:
        The part; `dense` itself if `like` is not sharded. It may be a view of `dense`.
    """
    if not is_sharded(like):
        return dense
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    there = dense.to(like.device)
    return distribute_tensor(there, mesh, placements, src_data_rank=None).to_local()


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor from the parts of all ranks, which all call this.

    Args:
        part: what this rank holds, shaped as `local(like)`; any dtype.
        like: a parameter, sharded or not.

    Returns:
        The same on every rank, in the whole shape of `like`; `part` itself if it is not sharded.
    """
    if not is_sharded(like):
        return part
    sharded: Any = as_part(part, like)
    found: Tensor = sharded.full_tensor()
    return found


def as_part(part: Tensor, like: Tensor) -> Tensor:
    """Return the sharded tensor that the parts of all ranks are.

    Args:
        part: what this rank holds, shaped as `local(like)`; any dtype.
        like: a tensor, sharded or not.

    Returns:
        A tensor sharded as `like`, of the same memory; `part` itself if `like` is not sharded.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def reduced(
    number: Tensor, how: Literal["sum", "max"], over: "tuple[DeviceMesh, Sequence[Any]] | None"
) -> Tensor:
    """Return the sum or the largest of what the parts of a tensor gave; all ranks call this.

    Args:
        number: what this rank's part gave, any shape; every part counts once, however many ranks
            hold it.
        how: "sum" or "max".
        over: the tensor's `sharding`.

    Returns:
        The same on every rank; `number` itself if the tensor is not sharded.
    """
    if over is None:
        return number
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = over
    kinds = [Replicate() if each.is_replicate() else Partial(how) for each in placements]
    found = DTensor.from_local(number, mesh, kinds, run_check=False)
    total: Tensor = found.full_tensor()
    return total.to(number.device)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 modules hold their parts again, where a forward left whole weights.

    What reads or writes weights must see the parameters, not the whole copies that a forward used.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _gathered(value: object, group: "dist.ProcessGroup | DeviceMesh | None") -> list[Any]:
    """Return the values of all ranks of a group or mesh, in their order; all of them call this."""
    found = [value]
    plain = group is None or isinstance(group, dist.ProcessGroup)
    groups: Any = [group] if plain else cast("DeviceMesh", group).get_all_groups()
    for one in groups:
        parts: list[Any] = [None] * world_size(one)
        dist.all_gather_object(parts, found, group=one)
        found = [each for part in parts for each in part]
    return found


@contextmanager
def errors_on_all_ranks(
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
) -> Iterator[list[Any]]:
    """Run a block without collectives; if a rank raises in it, all ranks raise.

    The ranks that did not fail would otherwise wait for the one that did in their next collective.
    Where these blocks lie in one another, an error is sent once: ranks in an inner block receive
    the error of a rank that failed in the outer one.

    Args:
        group: the ranks that all run the block, or a mesh of them; None: all there are.

    Yields:
        A list. What the ranks append to it in the block is there after it on every rank, in the
        order of the ranks.

    Raises:
        TalosRuntimeError: another rank raised; the message holds its error.

    Example:
        >>> with errors_on_all_ranks() as sizes:
        ...     sizes.append(3)
        >>> sizes  # of all ranks
        [3]
    """
    error: Exception | None = None
    values: list[Any] = []
    _open.append(len(_open))
    try:
        yield values
    except Exception as raised:
        error = raised
    finally:
        _open.pop()
    if world_size() > 1 and not _was_sent(error):
        text = None if error is None else f"rank {rank()} raised {type(error).__name__}: {error}"
        found = _gathered((text, values), group)
        failed = [text for text, _ in found if text is not None]
        if error is None and failed:
            error = TalosRuntimeError(failed[0])
        values[:] = [each for _, own in found for each in own]
        if error is not None and _open:
            setattr(error, _SENT, True)
    if error is not None:
        if not _open:  # the same error may be raised again
            for each in _causes(error):
                vars(each).pop(_SENT, None)
        raise error


def _was_sent(error: BaseException | None) -> bool:
    """Return whether all ranks know of an error, or of the one that it was made from."""
    return any(_SENT in vars(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Go through an error, the one that it was made from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def check_same(
    values: Mapping[str, Any], remedy: str, group: "dist.ProcessGroup | DeviceMesh | None" = None
) -> None:
    """Refuse values that differ between ranks, which all call this.

    Args:
        values: what must be the same, by the names that an error shows.
        remedy: what the error proposes.
        group: the ranks, or a mesh of them; None: all there are.

    Raises:
        TalosValueError: a value differs from that of rank 0; every rank raises the same error.

    Example:
        >>> check_same({"lr": 0.1}, "pass the same lr to each")
    """
    with errors_on_all_ranks(group) as found:
        found.append(dict(values))
    first = found[0]
    for number, each in enumerate(found):
        for name in first | each:
            if first.get(name) != each.get(name):
                raise TalosValueError(
                    f"{name} must be the same on all ranks, got {first.get(name)!r} on rank 0 and "
                    f"{each.get(name)!r} on rank {number}; {remedy}"
                )
