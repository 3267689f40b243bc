"""An image as the rows that a convolution multiplies: the layer is linear in its patches."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

__all__ = ["unfolded"]

Pair = int | Sequence[int]


def unfolded(
    images: Tensor, kernel: Sequence[int], stride: Pair, padding: str | Pair, dilation: Pair
) -> tuple[Tensor, tuple[int, int]]:
    """The patches of images under a 2-d convolution.

    Args:
        images: floating point [B, C, H, W].
        kernel: height and width of the kernel.
        stride: as `torch.nn.functional.conv2d` takes it.
        padding: as `torch.nn.functional.conv2d` takes it, "same" and "valid" too.
        dilation: as `torch.nn.functional.conv2d` takes it.

    Returns:
        [B, L, C * kh * kw], the channels of a group next to each other; height and width of the
        output, whose product is L.

    Example:
        >>> import torch
        >>> patches, grid = unfolded(torch.zeros(2, 3, 8, 8), (4, 4), 4, 0, 1)
        >>> patches.shape, grid
        (torch.Size([2, 4, 48]), (2, 2))
    """
    steps, strides = _pair(dilation), _pair(stride)
    pads = (0, 0) if isinstance(padding, str) else _pair(padding)
    if padding == "same":  # what is odd goes to the end, as in torch
        spans = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
        edges = [(span // 2, span - span // 2) for span in reversed(spans)]
        images = functional.pad(images, (*edges[0], *edges[1]))
    height, width = (
        (images.shape[2 + i] + 2 * pads[i] - steps[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i in (0, 1)
    )
    patches = functional.unfold(images, tuple(kernel), steps, pads, strides).transpose(1, 2)
    return patches, (height, width)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
