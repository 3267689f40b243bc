"""All buckets of an optimizer: its state, flat, made anew where its parameters or its state are."""

import hashlib
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError
from talos.masks import Mask
from talos.optim.buckets import Bucket
from talos.optim.states import State
from talos.params import check_one_memory
from talos.task_vectors.fingerprints import fingerprint

__all__ = ["FlatState"]


class FlatState(list[Bucket]):
    """Buckets, one a param group, device and dtype.

    Args:
        mask: what is selected.
        moment_dtype: of the moments.
    """

    def __init__(self, mask: Mask, moment_dtype: torch.dtype) -> None:
        super().__init__()
        self.mask = mask
        self.moment_dtype = moment_dtype
        self.grouped: list[list[Tensor]] = []

    def __reduce__(self) -> tuple[object, ...]:
        """For copies and pickles: a list is filled before its attributes are there."""
        grouped = {"grouped": self.grouped}
        return type(self), (self.mask, self.moment_dtype), grouped, iter(self)

    def add_group(self, number: int, params: Mapping[str, Tensor]) -> None:
        """State of zeros for the parameters of a group, by name, as they are now."""
        self.grouped.append(list(params.values()))
        alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, param in params.items():
            alike.setdefault((param.device, param.dtype), {})[name] = param
        self += [
            Bucket.create(number, members, self.mask, self.moment_dtype)
            for members in alike.values()
        ]

    def rebuild(
        self,
        groups: Sequence[Mapping[str, Tensor]],
        states: Mapping[Tensor, State],
        bases: Mapping[str, Tensor],
    ) -> None:
        """Make all buckets anew with this state; what was handed out before stays as it was.

        Args:
            groups: the parameters of each group by name.
            states: by parameter; none: zeros.
            bases: the initial weights by name.
        """
        compacted = {name: each for bucket in self for name, each in bucket.compacted.items()}
        self.clear()
        self.grouped = []
        for number, params in enumerate(groups):
            self.add_group(number, params)
        for bucket in self:
            bucket.fill(states)
            bucket.base = torch.cat([bases[name] for name in bucket.params])
            bucket.compacted = {n: compacted[n] for n in bucket.params if n in compacted}

    def regrouped(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether somebody has grouped or ordered the parameters anew; names them anew then.

        Args:
            groups: the optimizer's, as they are now.

        Raises:
            TalosRuntimeError: they hold other parameters.
        """
        now = [group["params"] for group in groups]
        if list(map(len, now)) == list(map(len, self.grouped)) and all(
            all(map(is_, *pair)) for pair in zip(now, self.grouped, strict=True)
        ):
            return False
        names = {param: name for bucket in self for name, param in bucket.params.items()}
        every = [param for params in now for param in params]
        strange = [tuple(param.shape) for param in every if param not in names]
        lost = [name for param, name in names.items() if param not in set(every)]
        if strange or lost or len(every) != len(names):
            raise TalosRuntimeError(
                "param_groups must hold the parameters that the optimizer was made with, each "
                f"once, lacks {', '.join(lost[:5]) or 'none'}, got others of shapes "
                f"{strange[:5] or 'none'}; make a new optimizer, or call requires_grad_(False) on "
                "what is to rest"
            )
        for group in groups:
            group["param_names"] = [names[param] for param in group["params"]]
            group.setdefault("mask", self.mask.fingerprint)
        return True

    def have_moved(self, others: Mapping[str, Tensor]) -> bool:
        """Whether a weight has another device or dtype than the state was made for.

        Args:
            others: the parameters of the model that are not trained, by name.

        Raises:
            TalosValueError: a weight was tied to another parameter since, by its memory.
        """
        own = {name: param for bucket in self for name, param in bucket.params.items()}
        check_one_memory({**others, **own}, own)
        return any(bucket.is_moved for bucket in self)

    def have_gradients(self, checked: Sequence[Sequence[Tensor]]) -> bool:
        """Whether one of what each bucket's `check` has returned is a gradient."""
        pairs = zip(self, checked, strict=True)
        return any(grad is not bucket.absent for bucket, grads in pairs for grad in grads)

    def bases(self) -> dict[str, Tensor]:
        """The initial weights by name, flat at the selected entries."""
        return {name: base for bucket in self for name, base in bucket.bases().items()}

    def base_of(self, number: int) -> str:
        """What tells the initial weights of a group from others, whatever order they are in."""
        bases = {
            n: b for bucket in self if bucket.group == number for n, b in bucket.bases().items()
        }
        every = "".join(fingerprint(bases[name]) for name in sorted(bases))
        return hashlib.sha256(every.encode()).hexdigest()[:16]

    def deltas(self) -> dict[str, Tensor]:
        """Current minus initial weights by name: float32, on the CPU."""
        return {name: delta for bucket in self for name, delta in bucket.deltas().items()}

    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state by parameter, as `Optimizer.state` holds it."""
        return {param: each for bucket in self for param, each in bucket.views().items()}
