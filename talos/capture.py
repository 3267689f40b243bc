"""Squares of per-sample weight gradients, summed over samples, from one backward of a batch.

In eval mode samples do not touch each other, so one backward of the summed per-sample losses
yields, at every linear layer y = x W^T + b, each sample's own dY. With T rows (tokens) a sample,

    S_W[o, i] += sum_b ( sum_t dY[b, t, o] X[b, t, i] )^2
    S_b[o]    += sum_b ( sum_t dY[b, t, o] )^2

and so for the gain and bias of a norm, of which `talos.routing` gives every row a copy, and for
convolutions, which it makes linear layers of. `talos.layouts` tells which rows are whose.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from .errors import TalosRuntimeError, TalosValueError
from .layouts import Layouts, Use
from .params import Selection, unwrapped
from .routing import Part, Router, Sink

__all__ = ["Capture"]

_REMEDY = "leave it out with params= or requires_grad_(False)"


@dataclass
class _Batch:
    """What the forward of the current batch has recorded, and what its backwards claim."""

    uses: list[Use] = field(default_factory=list)
    half: bool | None = None  # whether its gradients are fp16 anywhere on their way
    samples: int = 0
    share: float = 1.0
    phase: str = "forward"  # then "probe" where there is one, then "score"
    claimed: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


class Capture:
    """While active, scores the selected parameters in the backwards that `backward` runs.

    Inside the context every parameter of the model that is not selected has requires_grad=False.
    Flags, `.grad` and the functions of torch are as before when it ends, however it ends.

    Args:
        model: the model, in eval mode.
        selection: what is scored.
        scale: what losses are multiplied by, a power of two: lifts small squares, which fp32 would
            round to 0, without changing their order. Left out where any gradient is fp16, also in
            a layer that is not scored.

    Attributes:
        scores: the sums of squares by name, fp32 in the parameters' shapes, on their devices, times
            scale^2; rows that the selection leaves out stay 0.

    Example:
        >>> import torch
        >>> from talos.params import select_parameters
        >>> model = torch.nn.Linear(2, 3)
        >>> with Capture(model, select_parameters(model)) as capture:
        ...     capture.backward(model(torch.eye(2)).sum(1))
        >>> capture.scores["bias"].tolist()  # each of the two samples has a gradient of ones
        [2.0, 2.0, 2.0]
    """

    def __init__(self, model: nn.Module, selection: Selection, scale: float = 1.0) -> None:
        self._model = unwrapped(model)
        self._selection = selection
        self._scale = scale
        self._layouts = Layouts()
        self._reached: set[str] = set()
        self._batch = _Batch()
        self._stack = ExitStack()
        self.scores: dict[str, Tensor] = {}
        self.reset()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            chosen = {id(each.param) for each in self._selection.values()}
            for param in self._model.parameters():
                stack.callback(param.requires_grad_, param.requires_grad)
                param.requires_grad_(id(param) in chosen)
            Router(self._selection, self._record, self._receive).install(stack, self._model)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.forget()
        self._stack.close()

    def forget(self) -> None:
        """Drops what a forward has recorded: the next one begins a batch."""
        self._batch = _Batch()

    def reset(self) -> None:
        """Sets all scores to zero, in new tensors."""
        self._reached = set()
        self.scores = {
            name: torch.zeros(each.param.shape, dtype=torch.float32, device=each.param.device)
            for name, each in self._selection.items()
        }

    def backward(self, losses: Tensor, share: float = 1.0, *, last: bool = True) -> None:
        """Adds `share` times the squared gradients of each loss to the scores.

        Args:
            losses: one of each sample of the batch whose forward ran last, float [B].
            share: the factor of the squares.
            last: False where another backward of the same forward follows.

        Raises:
            TalosRuntimeError: a selected parameter is used twice, or in a way that cannot be
                scored, or samples influence one another.
            TalosValueError: the samples of a batch cannot be told apart.
        """
        batch = self._batch
        batch.samples, batch.share = len(losses), share
        if not losses.requires_grad:
            raise TalosRuntimeError(
                "logits_fn must return logits that depend on the selected parameters, got logits "
                "without a gradient; take away no_grad and detach, or choose others with params="
            )
        if batch.half is None:
            batch.half = _meets_half(losses)
        if not batch.half:
            losses = losses * self._scale
        if batch.phase == "forward" and self._layouts.needs_probe(batch.uses, batch.samples):
            batch.phase = "probe"
            scales = self._layouts.probe_scales(losses.detach(), half=batch.half)
            self._run(losses * scales, retain_graph=True)
        batch.phase, batch.claimed = "score", {}
        self._run(losses, retain_graph=not last)
        if last:
            self.forget()

    def check(self) -> None:
        """Refuses scores that say nothing.

        Raises:
            TalosRuntimeError: a selected parameter was never reached.
            TalosValueError: a score is NaN or infinite.
        """
        for name, score in self.scores.items():
            if name not in self._reached:
                raise TalosRuntimeError(
                    f"{name} must influence the logits, got no gradient of it in any batch, and "
                    f"zero scores would be selected first; {_REMEDY}"
                )
            if not bool(torch.isfinite(score).all()):
                raise TalosValueError(
                    f"scores of {name} must be finite, got NaN or infinity; look for overflow in "
                    "the model, or calibrate in float32"
                )

    def _run(self, losses: Tensor, retain_graph: bool) -> None:
        params = [each.param for each in self._selection.values()]
        with torch.autocast(losses.device.type, enabled=False):
            grads = torch.autograd.grad(
                losses.sum(), params, retain_graph=retain_graph, allow_unused=True
            )
        for name, grad in zip(self._selection, grads, strict=True):
            if grad is not None:  # routed functions hand none on
                raise TalosRuntimeError(
                    f"{name} must be used only by linear layers, norms and 2-d convolutions to be "
                    f"scored, got another use; {_REMEDY}"
                )

    def _record(self, use: Use) -> None:
        self._batch.uses.append(use)

    def _receive(self, sink: Sink, dy: Tensor, x: Tensor | None) -> None:
        if dy.numel() == 0:
            return
        use, batch, count = sink.use, self._batch, prod(sink.use.lead)
        rows = dy.reshape(count, -1)
        if batch.phase == "probe":
            self._layouts.listen(use, rows)
            return
        outer = self._layouts.decide(use, rows, batch.samples)
        split = (outer, batch.samples, count // (outer * batch.samples))
        by_sample = rows.view(*split, rows.shape[1])
        if sink.matrix is not None and x is not None:
            low, high, score = self._claim(sink.matrix)
            inputs = x.reshape(*split, x.shape[-1])
            sides = (inputs, by_sample) if sink.transposed else (by_sample, inputs)
            add_matrix_squares_(score, sides[0][..., low:high], sides[1], batch.share)
        if sink.vector is not None:
            low, high, score = self._claim(sink.vector)
            width = score.shape[1]
            add_vector_squares_(score, by_sample[..., low * width : high * width], batch.share)

    def _claim(self, part: Part) -> tuple[int, int, Tensor]:
        """The rows of `part` to score, counted from its start, and their scores [rows, width]."""
        claimed = self._batch.claimed.setdefault(part.name, [])
        if any(part.start < stop and start < part.stop for start, stop in claimed):
            raise TalosRuntimeError(
                f"{part.name} must be used once in a forward to be scored, got two uses; {_REMEDY}"
            )
        claimed.append((part.start, part.stop))
        self._reached.add(part.name)
        first, last = self._selection[part.name].rows or (0, len(part.param))
        low = max(part.start, first)
        high = max(min(part.stop, last), low)
        score = self.scores[part.name].view(len(part.param), -1)[low:high]
        return low - part.start, high - part.start, score


def _meets_half(losses: Tensor) -> bool:
    """Whether the backward of `losses` has fp16 gradients, be it by autocast or by the model."""
    nodes, seen = [losses.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(output.dtype == torch.float16 for output in node._input_metadata):
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


def add_matrix_squares_(score: Tensor, dy: Tensor, x: Tensor, share: float) -> None:
    """score[o, i] += share * sum_b ( sum_t dy[t, b, t', o] x[t, b, t', i] )^2.

    Args:
        score: fp32 [O, I].
        dy: floating point [outer, B, inner, O].
        x: floating point [outer, B, inner, I].
        share: the factor.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy, x = dy.to(wide), x.to(wide)
    if dy.shape[0] * dy.shape[2] == 1:
        squares = dy.square().view(-1, dy.shape[3]).T @ x.square().view(-1, x.shape[3])
        score.add_(squares, alpha=share)
        return
    gradient = torch.empty(score.shape, dtype=wide, device=score.device)
    for sample in range(dy.shape[1]):
        left = dy[:, sample].reshape(-1, dy.shape[3])
        right = x[:, sample].reshape(-1, x.shape[3])
        torch.mm(left.T, right, out=gradient)
        if wide == score.dtype:
            score.addcmul_(gradient, gradient, value=share)
        else:
            score.add_(gradient.square_(), alpha=share)


def add_vector_squares_(score: Tensor, dy: Tensor, share: float) -> None:
    """score[p] += share * sum_b ( sum_t dy[t, b, t', p] )^2.

    Args:
        score: fp32, P entries of any shape.
        dy: floating point [outer, B, inner, P].
        share: the factor.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    sums = dy.sum((0, 2), dtype=wide)  # [B, P]
    score.add_(sums.square().sum(0).view_as(score), alpha=share)
