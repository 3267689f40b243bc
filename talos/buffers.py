"""The buffers of a model as they are at one time, to give it back later.

A forward may write a buffer (`running_mean.add_`) or put another tensor in its place
(`self.average = .9 * self.average + ...`), so both are kept: the tensor and what it holds.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["KeptBuffers", "WatchedBuffers", "equal_bits", "moved_buffers", "warn_of_moved"]


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


class WatchedBuffers:
    """The buffers of a model's state dict as they are now, to tell later which have moved.

    Args:
        model: any module; it is not kept alive.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> watched = WatchedBuffers(norm)
        >>> _ = norm(torch.randn(3, 2))
        >>> watched.moved()
        ['running_mean', 'running_var']
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._before = {name: each.detach().clone() for name, each in _kept(model).items()}

    def moved(self) -> list[str]:
        """Name the buffers that hold something else now; see `moved_buffers`."""
        model = self._model()
        return [] if model is None else moved_buffers(self._before, _kept(model))

    def tell(self, stacklevel: int) -> dict[str, list[str]]:
        """Warn of those that have moved.

        Args:
            stacklevel: as of `warnings.warn`, from the caller of this method.

        Returns:
            Metadata of a task vector that does not hold them: `moved_buffers`, or nothing.
        """
        moved = self.moved()
        warn_of_moved(moved, stacklevel + 1)
        return {"moved_buffers": moved} if moved else {}


def moved_buffers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Name the buffers that differ; a count of batches, which computes nothing, is not looked at.

    Args:
        before: by name.
        after: the same later, or of another model.

    Returns:
        Names, of those that both have with values.
    """
    return [
        name
        for name, old in before.items()
        if name in after
        and not name.endswith("num_batches_tracked")
        and not (old.is_meta or after[name].is_meta)
        and not equal_bits(old, after[name].to(old.device))
    ]


def warn_of_moved(names: Sequence[str], stacklevel: int) -> None:
    """Say that a task vector does not hold what has moved.

    Args:
        names: of the buffers; none: nothing is said.
        stacklevel: as of `warnings.warn`, from the caller of this function.
    """
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"buffers moved and are not in the task vector: {', '.join(names[:3])}{more}; base + "
            "vector computes what the tuned model does only if they stay (module.eval() while it "
            "is trained) or are copied along",
            stacklevel=stacklevel + 1,
        )


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
