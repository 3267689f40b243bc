"""Linear layers that wait to be scored together: on a GPU many small ones share a launch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from talos_kernels import fisher_diag_

__all__ = ["Launches", "Layer"]

# What waits for one launch on a GPU: many small layers then share it. A launch is some microseconds
# and a layer of MiniLM has a megabyte of rows at 16 samples, so this is a few layers; unmeasured.
_QUEUE_BYTES = 32 * 2**20


@dataclass
class Layer:
    """A linear layer in one backward.

    Attributes:
        total: what its scores will be added to, float64, flat.
        scores: of this backward, float32 zeros [O, I].
        dy: the gradient of its output, as `fisher_diag_` takes it.
        x: its input.
        share: the factor of its squares.
    """

    total: Tensor
    scores: Tensor
    dy: Tensor
    x: Tensor
    share: float

    @property
    def nbytes(self) -> int:
        """Bytes that are free once it is scored."""
        return self.scores.nbytes + self.dy.nbytes + self.x.nbytes


class Launches:
    """The layers of a backward that wait for their launch."""

    def __init__(self) -> None:
        self._waiting: list[Layer] = []

    def add(self, layer: Layer) -> None:
        """Let a layer wait; launch where enough do, on a CPU at once."""
        self._waiting.append(layer)
        waiting = sum(each.nbytes for each in self._waiting)
        if not layer.total.is_cuda or waiting > _QUEUE_BYTES:
            self.launch()

    def launch(self) -> None:
        """Score the layers that wait, those of one dtype, device and share together."""
        waiting, self._waiting = self._waiting, []
        alike: dict[tuple[torch.dtype, torch.device, float], list[Layer]] = {}
        for each in waiting:
            dtype = torch.promote_types(each.dy.dtype, each.x.dtype)
            alike.setdefault((dtype, each.total.device, each.share), []).append(each)
        for (dtype, _, share), layers in alike.items():
            fisher_diag_(
                [each.scores for each in layers],
                [each.dy.to(dtype) for each in layers],
                [each.x.to(dtype) for each in layers],
                share=share,
            )
        for each in waiting:
            each.total += each.scores.view(-1)
