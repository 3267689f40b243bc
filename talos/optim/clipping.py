"""Clipping of the gradients' norm, at once or by the next step on its way through them."""

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
    """Clips what buckets hold, and keeps the factor of a clipping that was deferred.

    With the factor it keeps the gradients that it was computed from, and their versions: of others
    it would be wrong.

    Args:
        buckets: whose gradients.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self.drop()

    def drop(self) -> None:
        """Forget a clipping that was deferred."""
        self._factor: Tensor | None = None
        self._grads: list[Tensor] = []
        self._versions: list[int] = []

    @property
    def pending(self) -> bool:
        """Whether a clipping was deferred and not done yet."""
        return self._factor is not None

    def clip(self, max_norm: float, *, error_if_nonfinite: bool, defer: bool) -> Tensor:
        """See `SparseAdam.clip_grad_norm_`."""
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
        """What these gradients are still to be multiplied by, which is told once.

        Args:
            checked: what each bucket's `check` has returned.

        Returns:
            0-dim; None: they are as they should be, or all of them are new.

        Raises:
            TalosRuntimeError: they changed since, so that no factor is right for them.
        """
        factor, kept = self._factor, self._grads
        if factor is None:
            return None
        grads = self._given(checked)
        same = len(grads) == len(kept) and all(map(is_, grads, kept))
        if same and list(map(_version, grads)) == self._versions:
            self.drop()
            return factor
        if not set(map(id, grads)).isdisjoint(map(id, kept)):
            raise TalosRuntimeError(
                "gradients must stay as they were between clip_grad_norm_(defer=True) and step(), "
                "got others; clip behind the last change, or call zero_grad() to begin anew"
            )
        self.drop()
        return None

    @torch.no_grad()
    def settle(self) -> list[list[Tensor]]:
        """Scale the gradients if that was deferred; returns what each bucket's `check` does."""
        checked = [bucket.check() for bucket in self._buckets]
        if (factor := self.take(checked)) is not None:
            self._scale(checked, factor)
        return checked

    def _scale(self, checked: Sequence[list[Tensor]], factor: Tensor) -> None:
        for bucket, grads in zip(self._buckets, checked, strict=True):
            bucket.scale_gradients(grads, factor)

    def _given(self, checked: Sequence[list[Tensor]]) -> list[Tensor]:
        """The gradients of all buckets without those that are None."""
        return [
            grad
            for bucket, grads in zip(self._buckets, checked, strict=True)
            for grad in grads
            if grad is not bucket.absent
        ]
