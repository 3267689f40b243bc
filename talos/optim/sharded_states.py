"""States of sharded parameters on their way into state dicts and out, and masks that agree.

Each rank keeps state for the selected entries that it holds. A state dict is for any number of
ranks: it has the values of all entries.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from talos.distributed import (
    check_same,
    errors_on_all_ranks,
    is_sharded,
    local,
    reduced,
    several_processes,
    sharding,
    whole,
    world_size,
)
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.masks.parts import Parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["agreement", "mesh_of_copies", "spread", "take"]

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
    number of ranks.
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
        every = parts.join(name, found[key])
        found[key] = distribute_tensor(every, mesh, evenly, src_data_rank=None)
    found["step"] = reduced(found["step"], "max", over)  # a rank without an entry counts none
    return found


def mesh_of_copies(shard_state: bool, params: Mapping[str, Tensor]) -> "DeviceMesh | None":
    """Return the ranks that are to share an optimizer's state; None: each has its own.

    Raises:
        TalosValueError: the parameters are sharded, or on several kinds of devices.
    """
    if not shard_state:
        return None
    kinds = {param.device.type for param in params.values()}
    if len(kinds) > 1 or any(map(is_sharded, params.values())):
        found = "several kinds of devices" if len(kinds) > 1 else "sharded parameters"
        raise TalosValueError(
            f"shard_state must be False with {found}, got True; the state of sharded parameters "
            "is sharded as they are"
        )
    if not several_processes():
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kinds.pop(), (world_size(),))


@contextmanager
def agreement(
    mask: Mask, params: Iterable[Tensor], mesh: "DeviceMesh | None" = None
) -> Iterator[None]:
    """Run the checks of an optimizer's arguments; ranks that share tensors fail together.

    Args:
        mask: the selection; those ranks must all have the same.
        params: of the model, sharded or not.
        mesh: ranks that share the state of whole parameters.

    Raises:
        TalosValueError: the masks differ.
    """
    mesh = next((found[0] for found in map(sharding, params) if found), mesh)
    if mesh is None:
        yield
        return
    with errors_on_all_ranks(mesh):
        yield
    remedy = "calibrate on all ranks together, or load one file on every rank"
    check_same({"mask": mask.fingerprint}, remedy, mesh)
