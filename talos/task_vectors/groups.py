"""The weights of one device and dtype, with many deltas ready to be put on them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.task_vectors.editing import check_sums, may_overflow
from talos.task_vectors.sums import slices_of
from talos.task_vectors.vector import TaskVector
from talos.tensors import place
from talos_kernels import Index, TensorIndex, add_delta_, revert_delta_

__all__ = ["Scaled", "WeightGroup", "weight_groups"]


@dataclass(frozen=True)
class Scaled:
    """A vector by its name, and the coefficient it is on with."""

    name: str
    scale: float


class WeightGroup:
    """The weights of one device and dtype, and every vector's part for them.

    Attributes:
        names: of the weights.
        params: the weights.
        largest: magnitude of the values, by the vectors' names.
        deltas: packed index and values by the vectors' names.
        saved: room for the base's bits under the vector that is on.
        on: the vector that is on.
    """

    def __init__(
        self,
        names: list[str],
        params: list[Tensor],
        deltas: dict[str, tuple[Index, Tensor]],
        largest: Mapping[str, float],
    ) -> None:
        self.names = names
        self.params = params
        self.largest = largest
        self.deltas = deltas
        most = max(index.nnz for index, _ in deltas.values())
        self.saved = torch.empty(most, dtype=params[0].dtype, device=params[0].device)
        self.on: Scaled | None = None

    def swap(self, wanted: Scaled | None) -> None:
        """Take off what is on, then put on what is wanted: at most two launches.

        Raises:
            TalosValueError: a weight would overflow; then nothing is on.

        One kernel for both was measured 11-12 % faster than the two on a CPU, and was not worth
        its size.
        """
        if self.on is not None:
            index, _ = self.deltas[self.on.name]
            revert_delta_(self.params, index, self.saved[: index.nnz])
            self.on = None
        if wanted is not None:
            index, values = self.deltas[wanted.name]
            saved = self.saved[: index.nnz]
            if may_overflow(saved.dtype, wanted.scale * self.largest[wanted.name]):
                check_sums(self.names, self.params, index, values, wanted.scale)
            add_delta_(self.params, index, values, scale=wanted.scale, saved=saved)
            self.on = wanted

    def tensors(self) -> list[Tensor]:
        """What is held on the device beside the weights."""
        parts = [[values, *index.buffers] for index, values in self.deltas.values()]
        return [tensor for part in (*parts, [self.saved]) for tensor in part]


def weight_groups(
    params: Mapping[str, Tensor],
    vectors: Mapping[str, TaskVector],
    touched: Mapping[str, Mapping[str, Tensor]],
) -> list[WeightGroup]:
    """One group a device and dtype, with the vectors' values and indices uploaded.

    Args:
        params: every weight that a vector touches, once, by name.
        vectors: the vectors by any names.
        touched: for each of them, the weights that it touches by its own names.
    """
    members: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, param in params.items():
        members.setdefault((param.device, param.dtype), {})[name] = param
    largest = {key: vector.largest for key, vector in vectors.items()}
    groups = []
    for (device, _), named in members.items():
        group = list(named.values())
        packed: dict[int, Index] = {}  # vectors of one mask share its index
        deltas = {}
        for key, vector in vectors.items():
            names = {place(param): name for name, param in touched[key].items()}
            if id(vector.mask) not in packed:
                selected = [
                    _part(vector, names.get(place(param)), param.numel()) for param in group
                ]
                packed[id(vector.mask)] = Index.pack(selected, device)
            slices = slices_of(vector.mask)
            own = [names[place(param)] for param in group if place(param) in names]
            whole = own == list(touched[key])  # no copy then, where the model is on the CPU
            parts = [vector.values[slices[name]] for name in own]
            values = vector.values if whole else torch.cat([vector.values[:0], *parts])
            deltas[key] = packed[id(vector.mask)], values.to(device)
        groups.append(WeightGroup(list(named), group, deltas, largest))
    return groups


def _part(vector: TaskVector, name: str | None, numel: int) -> TensorIndex:
    """What a vector selects of one weight: nothing where it does not name it."""
    if name is None:
        return TensorIndex.from_positions(torch.zeros(0, dtype=torch.int64, device="cpu"), numel)
    return vector.mask.indices[name]
