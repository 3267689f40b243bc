"""The selected entries that this rank trains of each tensor, and the values of all ranks.

A parameter that FSDP2 sharded is a DTensor: each rank holds a part of the weight, trains the
selected entries in it, and keeps state for these alone. Values that leave the optimizer (task
vectors, patches, saved states) are whole: `[nnz]` in the order of the mask, on any number of ranks.
They are put together from the dense parts of one tensor at a time, so that DTensor alone knows who
holds what.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from talos.distributed import (
    check_same,
    errors_on_all_ranks,
    is_sharded,
    local,
    part_of,
    reduced,
    sharding,
    whole,
)
from talos.masks import Mask
from talos_kernels import TensorIndex

__all__ = ["Parts", "agreement"]


ENTRIES = {"exp_avg", "exp_avg_sq", "master", "base"}
"""What the state of a parameter holds for each selected entry."""


class Parts:
    """Parts of the selected entries of named parameters.

    Attributes:
        mask: the selection.
        params: the parameters by name.
        indices: by name the selected entries that this rank trains, within what it holds.

    Args:
        mask: the selection, the same on all ranks.
        names: the parameters, with their names in the mask.
    """

    def __init__(self, mask: Mask, names: Mapping[Tensor, str]) -> None:
        self.mask = mask
        self.params = {name: param for param, name in names.items()}
        self.indices = {
            name: TensorIndex.encode(part_of(mask.to_dense(name), param))
            if is_sharded(param)
            else mask.indices[name]
            for name, param in self.params.items()
        }

    @property
    def sharded(self) -> list[str]:
        """Names of the tensors that ranks hold parts of."""
        return [name for name, param in self.params.items() if is_sharded(param)]

    def join(self, name: str, values: Tensor) -> Tensor:
        """Return the values of all ranks' entries of a tensor, on every rank; all call this.

        Args:
            name: of the tensor.
            values: `[nnz]` of this rank's entries.

        Returns:
            `[nnz]` in the mask's order, on the same device; `values` if the tensor is not sharded.
        """
        param = self.params[name]
        if not is_sharded(param):
            return values
        dense = values.new_zeros(local(param).shape)
        dense.view(-1)[self.indices[name].positions_int64().to(values.device)] = values
        every = whole(dense, param).reshape(-1)
        found: Tensor = every[self.mask.indices[name].positions_int64().to(every.device)]
        return found.to(values.device)

    def part(self, name: str, values: Tensor) -> Tensor:
        """Return this rank's part of the values of a tensor's selected entries.

        Args:
            name: of the tensor.
            values: `[nnz]` in the mask's order.

        Returns:
            `[nnz]` of this rank's entries, on the same device; `values` if it has all of them.
        """
        param = self.params[name]
        if not is_sharded(param):
            return values
        dense = values.new_zeros(param.shape)
        dense.view(-1)[self.mask.indices[name].positions_int64().to(values.device)] = values
        held = part_of(dense, param).reshape(-1)
        found: Tensor = held[self.indices[name].positions_int64().to(held.device)]
        return found.to(values.device)

    def take(self, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a tensor's state from a state dict; all ranks call this.

        Args:
            name: of the tensor.
            state: its arrays are `[nnz]` in the mask's order: whole, or DTensors of them.
        """
        found = dict(state)
        for key in sorted(ENTRIES & state.keys()):  # in one order on all ranks
            value = state[key]
            found[key] = self.part(name, whole(local(value), value))
        return found

    def spread(self, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tensor's state as a state dict holds it; all ranks call this.

        The arrays of a sharded tensor are DTensors of the whole `[nnz]`, spread evenly over all
        ranks. So a distributed checkpoint writes every value once and reads it on any number of
        ranks.
        """
        param, found = self.params[name], dict(state)
        if "base" in found:  # torch wants all arrays of a state dict on one device
            found["base"] = found["base"].to(param.device)
        if not is_sharded(param):
            return found
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor

        assert isinstance(param, DTensor)
        mesh = param.device_mesh
        evenly = [Shard(0)] * mesh.ndim
        for key in sorted(ENTRIES & found.keys()):  # in one order on all ranks
            every = self.join(name, found[key])
            found[key] = distribute_tensor(every, mesh, evenly, src_data_rank=None)
        found["step"] = reduced(found["step"], param, "max")  # a rank without an entry counts none
        return found


@contextmanager
def agreement(mask: Mask, params: Iterable[Tensor]) -> Iterator[None]:
    """Run the checks of an optimizer's arguments; ranks that share tensors fail together.

    Args:
        mask: the selection; those ranks must all have the same.
        params: of the model, sharded or not.

    Raises:
        TalosValueError: the masks differ.
    """
    mesh = next((found[0] for found in map(sharding, params) if found), None)
    if mesh is None:
        yield
        return
    with errors_on_all_ranks(mesh):
        yield
    remedy = "calibrate on all ranks together, or load one file on every rank"
    check_same({"mask": mask.fingerprint}, remedy, mesh)
