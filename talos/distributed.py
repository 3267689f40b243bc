"""Many processes: who they are, their parts of sharded tensors, and errors that all of them raise.

torch.distributed does the work. A sharded tensor is a `DTensor`, as FSDP2's `fully_shard` makes
its parameters. Each rank holds a part of it; several placements and uneven or empty parts are
DTensor's own business, so nothing here computes with offsets.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from talos.errors import TalosRuntimeError, TalosValueError

__all__ = [
    "check_same",
    "errors_on_all_ranks",
    "is_sharded",
    "local",
    "part_of",
    "rank",
    "several_processes",
    "whole",
    "world_size",
]


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


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: the memory itself, without autograd."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
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
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    sharded = DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    found: Tensor = sharded.full_tensor()
    return found


@contextmanager
def errors_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block without collectives; if a rank raises in it, all ranks raise.

    The ranks that did not fail would otherwise wait for the one that did in their next collective.

    Raises:
        TalosRuntimeError: another rank raised; the message holds its error.

    Example:
        >>> with errors_on_all_ranks():
        ...     checked = True
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if world_size(group) > 1:
        found: list[Any] = [None] * world_size(group)
        text = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(found, text, group=group)
        failed = [(number, each) for number, each in enumerate(found) if each is not None]
        if error is None and failed:
            number, text = failed[0]
            raise TalosRuntimeError(f"rank {number} raised {text}")
    if error is not None:
        raise error


def check_same(
    values: Mapping[str, Any], remedy: str, group: dist.ProcessGroup | None = None
) -> None:
    """Refuse values that differ between ranks, which all call this.

    Args:
        values: what must be the same, by the names that an error shows.
        remedy: what the error proposes.
        group: the ranks; None: all.

    Raises:
        TalosValueError: a value differs from that of rank 0; every rank raises the same error.

    Example:
        >>> check_same({"lr": 0.1}, "pass the same lr to each")
    """
    if world_size(group) == 1:
        return
    found: list[Any] = [None] * world_size(group)
    dist.all_gather_object(found, dict(values), group=group)
    first = found[0]
    for number, each in enumerate(found):
        for name in first | each:
            if first.get(name) != each.get(name):
                raise TalosValueError(
                    f"{name} must be the same on all ranks, got {first.get(name)} on rank 0 and "
                    f"{each.get(name)} on rank {number}; {remedy}"
                )
