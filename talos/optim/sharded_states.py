"""States of sharded parameters on their way into state dicts and out, and masks that agree.

Each rank keeps state for the selected entries that it holds. A state dict is for any number of
ranks: it has the values of all entries.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from talos.distributed import (
    check_same,
    errors_on_all_ranks,
    is_sharded,
    local,
    mesh_of,
    reduced,
    several_processes,
    whole,
    world_size,
)
from talos.errors import TalosValueError
from talos.files import digest
from talos.masks import Mask
from talos.masks.parts import Parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "agreement",
    "check_copies",
    "check_same_weights",
    "check_shares",
    "mesh_of_copies",
    "spread",
    "take",
]

ENTRIES = {"exp_avg", "exp_avg_sq", "master", "base"}
"""What the state of a parameter holds for each selected entry."""


def take(parts: Parts, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return this rank's part of a tensor's state from a state dict; all ranks call this.

    Args:
        parts: of the tensors.
        name: of the tensor.
        state: its arrays are `[nnz]` in the mask's order: whole, or DTensors of them.
    """
    found = dict(state)
    for key in sorted(ENTRIES & state.keys()):  # in one order on all ranks
        value = state[key]
        found[key] = parts.part(name, whole(local(value), value))
    return found


def spread(parts: Parts, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tensor's state as a state dict holds it; all ranks call this.

    The arrays of a tensor whose entries ranks share are DTensors of the whole `[nnz]`, spread
    evenly over all ranks. So a distributed checkpoint writes every value once and reads it on any
    number of ranks. Where ranks share the state of a whole parameter, the arrays are whole: what
    one rank saves is complete.
    """
    param, found = parts.params[name], dict(state)
    if "base" in found:  # torch wants all arrays of a state dict on one device
        found["base"] = found["base"].to(param.device)
    if (over := parts.over(name)) is None:
        return found
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, _ = over
    evenly = [Shard(0)] * mesh.ndim
    for key in sorted(ENTRIES & found.keys()):  # in one order on all ranks
        found[key] = every = parts.join(name, found[key])
        if is_sharded(param):
            found[key] = distribute_tensor(every, mesh, evenly, src_data_rank=None)
    found["step"] = reduced(found["step"], "max", over)  # a rank without an entry counts none
    return found


def check_shares(states: Iterable[Mapping[str, Any]]) -> None:
    """Refuse DTensors of which several ranks have one share: a file that one rank saved of its own.

    Args:
        states: from a state dict; if they hold DTensors, all ranks of these call this.

    Raises:
        TalosValueError: two ranks have the same share, and it is not one number.
    """
    every = [each[key] for each in states for key in sorted(ENTRIES & each.keys())]
    sharded = list(filter(is_sharded, every))
    if not sharded:
        return
    shares = list(map(local, sharded))
    varied = any(bool((share != share[:1]).any()) for share in shares)
    with errors_on_all_ranks(mesh_of(sharded)) as digests:
        digests.append(list(map(digest, shares)) if varied else [])
    seen = [each for each in digests if each]
    if any(each in seen[:place] for place, each in enumerate(seen)):
        raise TalosValueError(
            "state_dict must have a share of its own on each rank, got the same one on two; "
            "save sharded state with torch.distributed.checkpoint, as docs/operations.md shows"
        )


def check_copies(shard_state: bool, params: Mapping[str, Tensor]) -> None:
    """Refuse to share the state of sharded parameters, or of those on several kinds of devices."""
    kinds = {param.device.type for param in params.values()}
    if shard_state and (len(kinds) > 1 or any(map(is_sharded, params.values()))):
        found = "several kinds of devices" if len(kinds) > 1 else "sharded parameters"
        raise TalosValueError(
            f"shard_state must be False with {found}, got True; the state of sharded parameters "
            "is sharded as they are"
        )


def mesh_of_copies(shard_state: bool, params: Mapping[str, Tensor]) -> "DeviceMesh | None":
    """Return the ranks that are to share an optimizer's state; None: each has its own."""
    if not shard_state or not several_processes():
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(next(iter(params.values())).device.type, (world_size(),))


def check_same_weights(
    fingerprints: Mapping[str, str], group: "dist.ProcessGroup | DeviceMesh | None"
) -> None:
    """Refuse initial weights that differ between ranks, which all call this.

    Args:
        fingerprints: of the weights, by name.
        group: the ranks.

    Raises:
        TalosValueError: they differ.
    """
    check_same(
        {f"the initial {name}": each for name, each in fingerprints.items()},
        "load the same weights on each before the optimizer is made",
        group,
    )


@contextmanager
def agreement(mask: Mask, params: Iterable[Tensor], copies: bool = False) -> Iterator[None]:
    """Run the checks of an optimizer's arguments; ranks that share tensors fail together.

    Args:
        mask: the selection; those ranks must all have the same.
        params: of the model, sharded or not.
        copies: all ranks share the state of whole parameters.

    Raises:
        TalosValueError: the masks differ.
    """
    mesh = mesh_of(params)
    if mesh is None and not copies:
        yield
        return
    with errors_on_all_ranks(mesh):
        yield
    remedy = "calibrate on all ranks together, or load one file on every rank"
    check_same({"mask": mask.fingerprint}, remedy, mesh)
