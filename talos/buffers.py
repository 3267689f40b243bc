"""The buffers of a model as they are at one time, to give it back later.

A forward may write a buffer (`running_mean.add_`) or put another tensor in its place
(`self.average = .9 * self.average + ...`), so both are kept: the tensor and what it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["KeptBuffers", "equal_bits"]


class KeptBuffers:
    """Copies of all buffers of a model.

    Args:
        model: any module.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> kept = KeptBuffers(norm)
        >>> _ = norm(torch.randn(3, 2))
        >>> norm.running_mean = torch.ones(2)
        >>> kept.restore()
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._copies = {
            id(buffer): buffer.detach().clone()
            for _, _, buffer in self._places
            if buffer is not None
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put each tensor back into its place with what it held; of the others none is written."""
        for module, name, buffer in self._places:
            module._buffers[name] = buffer
            if buffer is not None and not equal_bits(buffer, self._copies[id(buffer)]):
                buffer.copy_(self._copies[id(buffer)])


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits.

    Args:
        a: of any shape and dtype.
        b: on the same device.

    Returns:
        Whether they do; NaN equals NaN, 0 does not equal -0.

    Example:
        >>> equal_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
        True
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (each.detach().to_dense().reshape(-1).view(torch.uint8) for each in (a, b))
    return torch.equal(a, b)
