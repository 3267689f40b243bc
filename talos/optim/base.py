"""The initial weights at the selected entries, from which `task_vector` measures."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError
from talos.masks import Mask
from talos.optim.buckets import Bucket
from talos.task_vectors.fingerprints import fingerprint

__all__ = ["Base"]


@dataclass
class Base:
    """Initial weights by name.

    Attributes:
        weights: flat `[nnz]`, on the CPU, in the parameters' dtype or a checkpoint's.
        fingerprints: of the whole tensors.
        known: False after loading state that belongs to other initial weights.
    """

    weights: dict[str, Tensor]
    fingerprints: dict[str, str]
    known: bool = True

    def check_known(self) -> None:
        """Refuse to measure from initial weights that are not known.

        Raises:
            TalosRuntimeError: they are not.
        """
        if not self.known:
            raise TalosRuntimeError(
                "the initial weights are not known: the loaded state belongs to other ones and "
                "does not hold them; use TaskVector.from_models(base, model, mask), or call "
                "mark() where patches begin"
            )

    @classmethod
    def of(cls, buckets: Iterable[Bucket]) -> "Base":
        """Return the weights as they are now."""
        params = {name: param for bucket in buckets for name, param in bucket.params.items()}
        weights = {
            name: entries.to("cpu", params[name].dtype, copy=True)
            for bucket in buckets
            for name, entries in bucket.weights_by_name().items()
        }
        return cls(weights, {name: fingerprint(param) for name, param in params.items()})

    def digest(self, names: Iterable[str]) -> str:
        """Return a hash of the weights of these tensors, whatever their order."""
        every = "".join(fingerprint(self.weights[name]) for name in sorted(names))
        return hashlib.sha256(every.encode()).hexdigest()[:16]

    def deltas(self, buckets: Iterable[Bucket]) -> dict[str, Tensor]:
        """Return current minus initial weights by name: float32, on the CPU."""
        return {
            name: (weights.cpu() - self.weights[name].to(weights.dtype)).float()
            for bucket in buckets
            for name, weights in bucket.weights_by_name().items()
        }

    def change(self, buckets: Iterable[Bucket], mask: Mask) -> Tensor:
        """Return the deltas in the mask's rank order; see `SparseAdam.task_vector`."""
        self.check_known()
        deltas, empty = self.deltas(buckets), torch.zeros(0, dtype=torch.float32, device="cpu")
        return torch.cat([deltas.get(name, empty) for name in mask.names])

    def cast(self, params: Mapping[str, Tensor], buckets: Sequence[Bucket]) -> None:
        """Follow parameters that were cast; those that were only cast are new bases."""
        self.weights |= {name: self.weights[name].to(param.dtype) for name, param in params.items()}
        deltas = self.deltas(buckets)
        unchanged = {name: param for name, param in params.items() if not deltas[name].any()}
        kept = {name: each for name, each in self.fingerprints.items() if name not in params}
        self.fingerprints = kept | {name: fingerprint(param) for name, param in unchanged.items()}
