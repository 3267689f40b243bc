"""Clipping of the gradients' norm: at once, or by the next step as it reads the gradients."""

import math
from collections.abc import Sequence
from operator import attrgetter, is_

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError, TalosValueError
from talos.optim.buckets import Bucket

__all__ = ["Clipping"]

_version = attrgetter("_version")


class Clipping:
    """Clips the gradients of buckets and remembers the factor of a deferred clipping.

    The factor is right only for the gradients it was computed from, so those and their versions are
    kept with it.

    Args:
        buckets: the optimizer's.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self.drop()

    def drop(self) -> None:
        """Forget a deferred clipping."""
        self._factor: Tensor | None = None
        self._grads: list[Tensor] = []
        self._versions: list[int] = []

    @property
    def pending(self) -> bool:
        """Whether a deferred clipping was not done yet."""
        return self._factor is not None

    def clip(self, max_norm: float, *, error_if_nonfinite: bool, defer: bool) -> Tensor:
        """Do what `SparseAdam.clip_grad_norm_` documents."""
        if not max_norm > 0:
            raise TalosValueError(f"max_norm must be positive, got {max_norm}")
        checked = self.settle()
        squares = [
            bucket.squared_norm(grads) for bucket, grads in zip(self._buckets, checked, strict=True)
        ]
        device = squares[0].device
        norm = torch.stack([square.to(device) for square in squares]).sum().sqrt()
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise TalosRuntimeError(
                f"the gradient norm is {float(norm)}; "
                "lower the learning rate, or pass error_if_nonfinite=False to go on"
            )
        if max_norm == math.inf:
            return norm
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if defer:
            self._factor, self._grads = factor, self._given(checked)
            self._versions = list(map(_version, self._grads))
        else:
            self._scale(checked, factor)
        return norm

    def take(self, checked: Sequence[list[Tensor]]) -> Tensor | None:
        """Return the deferred factor, once.

        Args:
            checked: each bucket's gradients, from `Bucket.check`.

        Returns:
            0-dim; None if nothing was deferred, or if all gradients are new.

        Raises:
            TalosRuntimeError: some gradients changed since, so that no factor is right for them.
        """
        if self._factor is None:
            return None
        factor, kept, versions = self._factor, self._grads, self._versions
        grads = self._given(checked)
        same = len(grads) == len(kept) and all(map(is_, grads, kept))
        same = same and list(map(_version, grads)) == versions
        if not same and not set(map(id, grads)).isdisjoint(map(id, kept)):
            raise TalosRuntimeError(
                "gradients must not change between clip_grad_norm_(defer=True) and step(), got "
                "changed ones; clip after the last change, or call zero_grad() first"
            )
        self.drop()
        return factor if same else None

    @torch.no_grad()
    def settle(self) -> list[list[Tensor]]:
        """Do a deferred clipping now; return each bucket's gradients, from `Bucket.check`."""
        checked = [bucket.check() for bucket in self._buckets]
        if (factor := self.take(checked)) is not None:
            self._scale(checked, factor)
        return checked

    def _scale(self, checked: Sequence[list[Tensor]], factor: Tensor) -> None:
        for bucket, grads in zip(self._buckets, checked, strict=True):
            bucket.scale_gradients(grads, factor)

    def _given(self, checked: Sequence[list[Tensor]]) -> list[Tensor]:
        """Return the gradients of all buckets without the missing ones."""
        pairs = zip(self._buckets, checked, strict=True)
        return [grad for bucket, grads in pairs for grad in grads if grad is not bucket.absent]
