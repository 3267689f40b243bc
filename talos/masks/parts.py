"""The selected entries of each tensor that this rank holds, and the values of all ranks.

A parameter that FSDP2 sharded is a DTensor: each rank holds a part of the weight, and with it some
of the selected entries. Values of all entries are `[nnz]` in the order of the mask, on any number
of ranks. They are put together from the dense parts of one tensor at a time, so that DTensor alone
knows who holds what.
"""

from collections.abc import Mapping

from torch import Tensor

from talos.distributed import is_sharded, local, part_of, whole
from talos.masks.mask import Mask
from talos_kernels import TensorIndex

__all__ = ["Parts"]


class Parts:
    """Parts of the selected entries of named parameters.

    Attributes:
        mask: the selection.
        params: the parameters by name.
        indices: by name the selected entries that this rank holds, within its part.

    Args:
        mask: the selection, the same on all ranks.
        params: the parameters by their names in the mask.
    """

    def __init__(self, mask: Mask, params: Mapping[str, Tensor]) -> None:
        self.mask = mask
        self.params = dict(params)
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
