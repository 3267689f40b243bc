"""One cast of an input that several layers share."""

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

__all__ = ["SharedCast"]


class SharedCast:
    """The last input without its history in another dtype: layers that share it share the cast.

    Neither is kept alive by it: the cast lives as long as a layer keeps it for its backward.
    """

    def __init__(self) -> None:
        self._last: tuple[TensorWeakRef, int, TensorWeakRef] | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Casts `x`, or finds that this was done before."""
        if self._last is not None:
            source, version, kept = self._last
            cast: Tensor | None = kept()
            same = source() is x and version == x._version
            if same and cast is not None and cast.dtype == dtype:
                return cast
        cast = x.detach().to(dtype)
        self._last = (TensorWeakRef(x), x._version, TensorWeakRef(cast))
        return cast
