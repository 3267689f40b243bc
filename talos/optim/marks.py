"""A mark of the weights at the selected entries, and the patch of what changed since it.

A mark is a copy: `[nnz]` of each tensor in the weights' own dtype, on their device. Neither a mark
nor a patch reads an entry that is not selected.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from talos.masks.parts import Parts
from talos.optim.base import Base
from talos.optim.buckets import Bucket
from talos.task_vectors import Patch
from talos.task_vectors.patches import changed_bits

__all__ = ["Mark"]


@dataclass
class Mark:
    """The weights that replicas have.

    Attributes:
        weights: flat `[nnz]` of this rank's entries by name; none before the first patch, which
            counts from the base.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(each.nbytes for each in self.weights.values())

    def move(self, buckets: Iterable[Bucket]) -> None:
        """Take the weights as they are now."""
        self.weights = _weights(buckets)

    def patch(self, base: Base, buckets: Iterable[Bucket], parts: Parts) -> Patch:
        """Return what changed since the mark, and move it; see `SparseAdam.patch`."""
        mask = parts.mask
        if not self.weights:
            base.check_known()
        before, now = self.weights or base.weights, _weights(buckets)
        positions, values = {}, {}
        for name in mask.names:
            if name in now:
                weights = now[name]  # a model that was cast or moved has replicas that were, too
                old = before[name].to(weights.device, weights.dtype)
                weights = parts.join(name, weights)
                ranks = changed_bits(parts.join(name, old), weights)
                if len(ranks):
                    positions[name] = mask.indices[name].select(ranks.cpu())
                    values[name] = weights[ranks].cpu()
        patch = Patch({name: mask.shapes[name] for name in positions}, positions, values)
        self.weights = now
        return patch


def _weights(buckets: Iterable[Bucket]) -> dict[str, Tensor]:
    return {name: each for bucket in buckets for name, each in bucket.own_weights_by_name().items()}
