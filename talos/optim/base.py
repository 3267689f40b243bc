"""The initial weights at the selected entries, from which `task_vector` measures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError
from talos.masks.parts import Parts
from talos.optim.buckets import Bucket
from talos.optim.states import State
from talos.task_vectors.fingerprints import fingerprint

__all__ = ["Base"]


@dataclass
class Base:
    """Initial weights by name.

    Attributes:
        weights: flat `[nnz]` of this rank's entries, on the CPU, in the parameters' dtype or a
            checkpoint's.
        fingerprints: of the whole tensors.
        known: False after loading state that does not hold them.
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
                "the initial weights are not known: the loaded state does not hold them; use "
                "TaskVector.from_models(base, model, mask), or call mark() where patches begin"
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

    @classmethod
    def loaded(cls, states: Mapping[str, State]) -> "Base":
        """Return the initial weights that the checked states of all parameters hold."""
        weights = {
            name: state["base"].to("cpu", copy=True)
            for name, state in states.items()
            if "base" in state
        }
        fingerprints = {
            name: int(state["fingerprint"]).to_bytes(8, "big", signed=True).hex()
            for name, state in states.items()
            if "fingerprint" in state
        }
        return cls(weights, fingerprints, known=len(weights) == len(states))

    def state(self, name: str) -> dict[str, Tensor]:
        """Return what a parameter's state holds of its initial weights.

        That is `base`, and `fingerprint` if it is known: the 16 hex digits as an int64 0-dim
        tensor, because distributed checkpoints know no text in a state.
        """
        if not self.known:
            return {}
        found = {"base": self.weights[name]}
        if name in self.fingerprints:
            number = int.from_bytes(bytes.fromhex(self.fingerprints[name]), "big", signed=True)
            found["fingerprint"] = torch.tensor(number, dtype=torch.int64, device="cpu")
        return found

    def deltas(self, buckets: Iterable[Bucket], parts: Parts) -> dict[str, Tensor]:
        """Return current minus initial weights by name, in the mask's order: float32, on the CPU.

        All ranks call this.
        """
        return {
            name: parts.join(name, (weights.cpu() - self.weights[name].to(weights.dtype)).float())
            for bucket in buckets
            for name, weights in bucket.weights_by_name().items()
        }

    def change(self, buckets: Iterable[Bucket], parts: Parts) -> Tensor:
        """Return the deltas in the mask's rank order; see `SparseAdam.task_vector`."""
        self.check_known()
        empty = torch.zeros(0, dtype=torch.float32, device="cpu")
        deltas = self.deltas(buckets, parts)
        return torch.cat([deltas.get(name, empty) for name in parts.mask.names])

    def cast(self, params: Mapping[str, Tensor], buckets: Sequence[Bucket], parts: Parts) -> None:
        """Follow parameters that were cast; those that were only cast are new bases."""
        self.weights |= {name: self.weights[name].to(param.dtype) for name, param in params.items()}
        deltas = self.deltas(buckets, parts)
        unchanged = {name: param for name, param in params.items() if not deltas[name].any()}
        kept = {name: each for name, each in self.fingerprints.items() if name not in params}
        self.fingerprints = kept | {name: fingerprint(param) for name, param in unchanged.items()}
