"""The selected entries of each tensor that this rank holds, and the values of all ranks.

A parameter that FSDP2 sharded is a DTensor: each rank holds a part of the weight, and with it some
of the selected entries. Ranks that all hold the whole weight may share its entries, too: each takes
as many that follow one another.

Values of all entries are `[nnz]` in the order of the mask, on any number of ranks. They are put
together one tensor at a time, so that DTensor alone knows who holds what.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Size, Tensor

from talos.distributed import is_sharded, local, part_of, sharding, whole
from talos.masks.mask import Mask
from talos_kernels import TensorIndex

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Parts"]


class Parts:
    """Parts of the selected entries of named parameters.

    Attributes:
        mask: the selection.
        params: the parameters by name.
        mesh: the ranks that share the entries of whole parameters; None: each has all.
        indices: by name the selected entries that this rank holds, within its part.

    Args:
        mask: the selection, the same on all ranks.
        params: the parameters by their names in the mask.
        mesh: one-dimensional, or None.
    """

    def __init__(
        self, mask: Mask, params: Mapping[str, Tensor], mesh: "DeviceMesh | None" = None
    ) -> None:
        self.mask, self.mesh = mask, mesh
        self.params = dict(params)
        self.indices = {name: self._own(name) for name in self.params}

    def _own(self, name: str) -> TensorIndex:
        if is_sharded(self.params[name]):
            return TensorIndex.encode(part_of(self.mask.to_dense(name), self.params[name]))
        if self.mesh is None:
            return self.mask.indices[name]
        return self.share(name, self.mesh.get_local_rank())

    def share(self, name: str, rank: int) -> TensorIndex:
        """Return the entries of a whole tensor that one rank of `mesh` has."""
        assert self.mesh is not None
        index = self.mask.indices[name]
        positions = index.positions_int64()[self._range(name, rank)]
        return TensorIndex.from_positions(positions, index.numel)

    def _range(self, name: str, rank: int) -> slice:
        assert self.mesh is not None
        each = -(-self.mask.indices[name].nnz // self.mesh.size())  # as DTensor divides
        return slice(each * rank, each * (rank + 1))

    @property
    def sharded(self) -> list[str]:
        """Names of the tensors that ranks hold parts of."""
        return [name for name, param in self.params.items() if is_sharded(param)]

    @property
    def several(self) -> bool:
        """Whether several ranks have the entries of a tensor."""
        return self.mesh is not None or any(map(is_sharded, self.params.values()))

    def over(self, name: str) -> "tuple[DeviceMesh, tuple[Any, ...]] | None":
        """Return the mesh and placements by which ranks have a tensor's entries; None: all."""
        if self.mesh is None or is_sharded(self.params[name]):
            return sharding(self.params[name])
        from torch.distributed.tensor import Shard

        return self.mesh, (Shard(0),)

    def join(self, name: str, values: Tensor) -> Tensor:
        """Return the values of all ranks' entries of a tensor, on every rank; all call this.

        Args:
            name: of the tensor.
            values: `[nnz]` of this rank's entries.

        Returns:
            `[nnz]` in the mask's order, on the same device; `values` if this rank has all.
        """
        param, index = self.params[name], self.mask.indices[name]
        if is_sharded(param):
            dense = values.new_zeros(local(param).shape)
            dense.view(-1)[self.indices[name].positions_int64().to(values.device)] = values
            every = whole(dense, param).reshape(-1)
            return every[index.positions_int64().to(every.device)].to(values.device)
        if self.mesh is None:
            return values
        from torch.distributed.tensor import DTensor, Shard

        shared = DTensor.from_local(
            values, self.mesh, [Shard(0)], run_check=False, shape=Size((index.nnz,)), stride=(1,)
        )
        return shared.full_tensor().to(values.device)

    def part(self, name: str, values: Tensor) -> Tensor:
        """Return this rank's part of the values of a tensor's selected entries.

        Args:
            name: of the tensor.
            values: `[nnz]` in the mask's order.

        Returns:
            `[nnz]` of this rank's entries, on the same device; `values` if it has all of them.
        """
        param, index = self.params[name], self.mask.indices[name]
        if is_sharded(param):
            dense = values.new_zeros(param.shape)
            dense.view(-1)[index.positions_int64().to(values.device)] = values
            held = part_of(dense, param).reshape(-1)
            return held[self.indices[name].positions_int64().to(held.device)].to(values.device)
        if self.mesh is None:
            return values
        return values[self._range(name, self.mesh.get_local_rank())]
