"""A clipping of gradients that the next step does, on its way through them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_

from torch import Tensor

from .errors import TalosRuntimeError

__all__ = ["DeferredClip"]

_version = attrgetter("_version")


class DeferredClip:
    """A factor, and the gradients that it was computed from, as they were then.

    Args:
        factor: 0-dim, what they are to be multiplied by.
        grads: what holds each of them.

    Example:
        >>> import torch
        >>> grad = torch.ones(2)
        >>> clip = DeferredClip(torch.tensor(0.5), [grad])
        >>> clip.belongs_to([grad]), clip.belongs_to([torch.ones(2)])
        (True, False)
    """

    def __init__(self, factor: Tensor, grads: Sequence[Tensor]) -> None:
        self.factor, self.grads = factor, list(grads)
        self.versions = list(map(_version, grads))

    def belongs_to(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the gradients; False: all of them are new.

        Args:
            grads: what holds each gradient now.

        Raises:
            TalosRuntimeError: some are, or they were changed, so that no factor is right for them.
        """
        same = len(grads) == len(self.grads) and all(map(is_, grads, self.grads))
        if same and list(map(_version, grads)) == self.versions:
            return True
        if set(map(id, grads)).isdisjoint(map(id, self.grads)):
            return False
        raise TalosRuntimeError(
            "gradients must stay as they were between clip_grad_norm_(defer=True) and step(), got "
            "others; clip behind the last change, or call zero_grad() to begin anew"
        )
