"""Squares of per-sample weight gradients, summed over samples, from one backward of a batch.

In eval mode samples do not touch each other, so one backward of the summed per-sample losses
yields, at every linear layer y = x W^T + b, each sample's own dY. With T rows (tokens) a sample,

    S_W[o, i] += sum_b ( sum_t dY[b, t, o] X[b, t, i] )^2
    S_b[o]    += sum_b ( sum_t dY[b, t, o] )^2

and so for the gain and bias of a norm, of which `talos.routing` gives every row a copy, for
convolutions, which it makes linear layers of, and for embeddings. `talos_kernels.fisher_diag`
computes the sums, `talos.layouts` tells which rows are whose. A parameter that a forward uses
several times has the gradient of a sample summed over its uses before it is squared: their rows
count as further tokens of the sample.
"""

from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from math import isfinite, prod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from talos_kernels import fisher_diag_, fisher_diag_embedding_, fisher_diag_vector_

from .errors import TalosRuntimeError, TalosValueError
from .layouts import Layouts, Use
from .listeners import Part, Sink
from .params import Selection, unwrapped
from .routing import Router

__all__ = ["Capture"]

# Of the self-test, by norm: far above rounding, in float32 and where a gradient has 16 bits, and
# far below what a use missed or counted twice makes.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
_REMEDY = "leave it out with params= or requires_grad_(False)"


# What waits for one launch on a GPU: many small layers then share it. A launch is some microseconds
# and a layer of MiniLM has a megabyte of rows at 16 samples, so this is a few layers; unmeasured.
_QUEUE_BYTES = 32 * 2**20


@dataclass
class _Batch:
    """What the forward of the current batch has recorded, and what its backwards have received."""

    uses: list[Use] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # uses by name
    parts: dict[str, set[Part]] = field(default_factory=dict)  # by name
    expected: Counter[Part] = field(default_factory=Counter)  # uses of each part in the forward
    half: bool | None = None  # whether its gradients are fp16 anywhere on their way
    samples: int = 0
    share: float = 1.0
    phase: str = "forward"  # then "probe" where there is one, then "score"
    received: dict[Part, list["_Piece"]] = field(default_factory=dict)
    queue: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # score, dY, X


@dataclass(frozen=True)
class _Piece:
    """What one use says of a part: dY [outer, B, inner, O], and X or ids where there are any."""

    sink: Sink
    dy: Tensor
    inputs: Tensor | None


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
        self._router: Router | None = None  # while active, for it refers back to this
        self._reached: set[str] = set()
        self._batch = _Batch()
        self._stack = ExitStack()
        self._scores: dict[str, Tensor] = {}
        self.reset()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            chosen = {id(each.param) for each in self._selection.values()}
            for param in self._model.parameters():
                stack.callback(param.requires_grad_, param.requires_grad)
                param.requires_grad_(id(param) in chosen)
            self._router = Router(self._selection, self._record, self._receive)
            self._router.install(stack, self._model)
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
        self._router = None

    def forget(self) -> None:
        """Drops what a forward has recorded: the next one begins a batch."""
        self._batch = _Batch()
        if self._router is not None:
            self._router.forget()

    def plain(self) -> AbstractContextManager[None]:
        """Inside it the model computes as ever, and autograd the gradients of the parameters."""
        return nullcontext() if self._router is None else self._router.silence()

    def reset(self) -> None:
        """Begins new scores."""
        self._reached = set()
        self._scores = {}

    @property
    def scores(self) -> dict[str, Tensor]:
        """All of them, in the order of the selection."""
        return {name: self._score_of(name) for name in self._selection}

    def _score_of(self, name: str) -> Tensor:
        """One of them. It is made when a backward reaches it: by then activations were freed."""
        if name not in self._scores:
            param = self._selection[name].param
            score = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            self._scores[name] = score
        return self._scores[name]

    def take(self) -> dict[str, Tensor]:
        """Hands out the scores and begins new ones."""
        reached, scores = self._reached, self.scores
        self.reset()
        self._reached = reached
        return scores

    def backward(self, losses: Tensor, share: float = 1.0, *, last: bool = True) -> None:
        """Adds `share` times the squared gradients of each loss to the scores.

        Args:
            losses: one of each sample of the batch whose forward ran last, float [B].
            share: the factor of the squares.
            last: False where another backward of the same forward follows.

        Raises:
            TalosRuntimeError: a selected parameter is used in a way that cannot be scored, or
                samples influence one another.
            TalosValueError: the samples of a batch cannot be told apart.
        """
        batch = self._batch
        batch.samples, batch.share = len(losses), share
        if not losses.requires_grad:
            raise TalosRuntimeError(
                "logits_fn must return logits that depend on the selected parameters, got logits "
                "without a gradient; take away no_grad and detach, or choose others with params="
            )
        if self._router is not None:
            self._router.forget()
        if batch.half is None:
            batch.half = torch.float16 in _dtypes(losses)
        if not batch.half:
            losses = losses * self._scale
        if self._layouts.needs_probe(batch.uses, batch.samples):
            batch.phase = "probe"
            scales = self._layouts.probe_scales(losses.detach(), half=batch.half)
            self._run(losses * scales, retain_graph=True)
        batch.phase = "score"
        self._run(losses, retain_graph=not last)
        if last:
            self.forget()

    def check(self, scores: dict[str, Tensor] | None = None) -> None:
        """Refuses scores that say nothing.

        Args:
            scores: what `take` handed out; by default those of now.

        Raises:
            TalosRuntimeError: a selected parameter was never reached.
            TalosValueError: a score is NaN or infinite.
        """
        for name, score in (self.scores if scores is None else scores).items():
            if name not in self._reached:
                raise TalosRuntimeError(
                    f"{name} must influence the logits, got no gradient of it in any batch, and "
                    f"zero scores would be selected first; {_REMEDY}"
                )
            if score.numel() and not isfinite(score.max()):  # squares: NaN is the largest
                raise TalosValueError(
                    f"scores of {name} must be finite, got NaN or infinity; look for overflow in "
                    "the model, or calibrate in float32"
                )

    def compare(self, scores: dict[str, Tensor], losses: list[Tensor]) -> None:
        """Refuses scores that differ from the squared gradients of single losses.

        Args:
            scores: what `backward` found for these losses.
            losses: 0-dim, of a forward inside `plain`.

        Raises:
            TalosRuntimeError: they differ by more than rounding.
        """
        params = [each.param for each in self._selection.values()]
        expected = {name: torch.zeros_like(score) for name, score in scores.items()}
        dtypes = _dtypes(losses[0])
        lift = 1.0 if torch.float16 in dtypes else self._scale
        for loss in losses:
            with torch.autocast(loss.device.type, enabled=False):
                grads = torch.autograd.grad(
                    loss * lift, params, retain_graph=True, allow_unused=True
                )
            for score, grad in zip(expected.values(), grads, strict=True):
                if grad is not None:
                    score.addcmul_(grad.float(), grad.float())
        tolerance = _HALF_TOLERANCE if dtypes & {torch.float16, torch.bfloat16} else _TOLERANCE
        # What a loss does not depend on, a bias of keys, has a gradient of rounding errors alone.
        largest = max(float(score.mean()) for score in expected.values() if score.numel())
        for name, each in self._selection.items():
            rows = slice(*(each.rows or (None,)))
            ours, wanted = scores[name][rows].double(), expected[name][rows].double()
            error, size = float((ours - wanted).norm()), float(wanted.norm())
            noise = tolerance**2 * largest * wanted.numel() ** 0.5
            if not error <= tolerance * size + noise:
                raise TalosRuntimeError(
                    f"scores of {name} must equal those of single backwards, got a relative "
                    f"difference of {error / max(size, 1e-300):.2g} on {len(losses)} samples: the "
                    f"model uses it in a way that is not seen here; {_REMEDY}"
                )

    def _run(self, losses: Tensor, retain_graph: bool) -> None:
        params = [each.param for each in self._selection.values()]
        try:
            with torch.autocast(losses.device.type, enabled=False):
                grads = torch.autograd.grad(
                    losses.sum(), params, retain_graph=retain_graph, allow_unused=True
                )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise TalosRuntimeError(
                "activation checkpointing must be the non-reentrant kind to be scored, got "
                "use_reentrant=True; pass use_reentrant=False, or turn it off while calibrating"
            ) from error
        for name, grad in zip(self._selection, grads, strict=True):
            if grad is not None:  # routed functions hand none on
                raise TalosRuntimeError(
                    f"{name} must be used only by linear layers, norms, embeddings and 2-d "
                    f"convolutions to be scored, got another use; {_REMEDY}"
                )
        for part in list(self._batch.received):  # uses that this backward did not reach are 0
            self._score(part)
        self._launch()

    def _record(self, sink: Sink) -> None:
        batch = self._batch
        if batch.phase != "forward":  # computed again by a checkpoint: recorded already
            return
        sink.use.ordinal = batch.counts[sink.use.name]
        batch.counts[sink.use.name] += 1
        batch.uses.append(sink.use)
        for part in sink.parts:
            others = batch.parts.setdefault(part.name, set())
            if any(part.overlaps(other) for other in others):
                raise TalosRuntimeError(
                    f"{part.name} must be used whole or in parts that do not overlap to be "
                    f"scored, got rows {part.start} to {part.stop} and others of them; {_REMEDY}"
                )
            others.add(part)
            batch.expected[part] += 1

    def _receive(self, sink: Sink, dy: Tensor, inputs: Tensor | None) -> None:
        if self._batch.phase == "forward":
            raise TalosRuntimeError(
                f"logits_fn must leave gradients to the calibration, got a backward through "
                f"{sink.use.name} before it returned; compute them under no_grad, or elsewhere"
            )
        if dy.numel() == 0:
            return
        use, batch, count = sink.use, self._batch, prod(sink.use.lead)
        rows = dy.reshape(count, -1)
        if batch.phase == "probe":
            self._layouts.listen(use, rows)
            return
        outer = self._layouts.decide(use, rows, batch.samples)
        split = (outer, batch.samples, count // (outer * batch.samples))
        if inputs is not None:
            if sink.table is not None and sink.padding_idx is not None:
                padding = sink.padding_idx % len(sink.table.param)
                rows = rows.masked_fill((inputs == padding).reshape(count, 1), 0)
            inputs = inputs.reshape(split if sink.table else (*split, inputs.shape[-1]))
        piece = _Piece(sink, rows.view(*split, rows.shape[1]), inputs)
        for part in sink.parts:
            pieces = batch.received.setdefault(part, [])
            pieces.append(piece)
            if len(pieces) == batch.expected[part]:
                self._score(part)

    def _score(self, part: Part) -> None:
        """Squares what has been received of a part, its uses joined as tokens of the samples."""
        pieces = self._batch.received.pop(part)
        low, high, score = self._rows(part)
        sink, share = pieces[0].sink, self._batch.share
        if len({(part == piece.sink.table, piece.sink.transposed) for piece in pieces}) > 1:
            raise TalosRuntimeError(
                f"{part.name} must be used in one way to be scored, got two: an embedding that is "
                f"a linear layer, or a weight and its transpose; {_REMEDY}"
            )
        dy = _joined([piece.dy for piece in pieces])
        if part == sink.vector:
            width = score.shape[1]
            if dy.shape[-1] != (part.stop - part.start) * width:
                raise TalosRuntimeError(
                    f"{part.name} must be as wide as the rows that it is applied to, got "
                    f"{(part.stop - part.start) * width} entries for rows of {dy.shape[-1]}; "
                    f"{_REMEDY}"
                )
            fisher_diag_vector_(score, dy[..., low * width : high * width], share=share)
            return
        inputs = _joined([piece.inputs for piece in pieces if piece.inputs is not None])
        if part == sink.table:
            fisher_diag_embedding_(score, dy, inputs, share=share)
            return
        left, right = (inputs, dy) if sink.transposed else (dy, inputs)
        self._batch.queue.append((score, left[..., low:high], right))
        waiting = sum(dy.nbytes + x.nbytes for _, dy, x in self._batch.queue)
        if not score.is_cuda or waiting > _QUEUE_BYTES:
            self._launch()

    def _launch(self) -> None:
        """Scores the layers that wait, those of one dtype and device together."""
        queue, self._batch.queue = self._batch.queue, []
        alike: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for score, dy, x in queue:
            dtype = torch.promote_types(dy.dtype, x.dtype)
            layer = score, dy.to(dtype), x.to(dtype)
            alike.setdefault((dtype, score.device), []).append(layer)
        for layers in alike.values():
            scores, dys, xs = (list(each) for each in zip(*layers, strict=True))
            fisher_diag_(scores, dys, xs, share=self._batch.share)

    def _rows(self, part: Part) -> tuple[int, int, Tensor]:
        """The rows of `part` to score, counted from its start, and their scores [rows, width]."""
        self._reached.add(part.name)
        first, last = self._selection[part.name].rows or (0, len(part.param))
        low = max(part.start, first)
        high = max(min(part.stop, last), low)
        score = self._score_of(part.name).view(len(part.param), -1)[low:high]
        return low - part.start, high - part.start, score


def _joined(rows: list[Tensor]) -> Tensor:
    """Rows [outer, B, inner, ...] of several uses as those of one."""
    if len(rows) == 1:
        return rows[0]
    return torch.cat([each.transpose(0, 1).flatten(1, 2) for each in rows], 1)[None]


def _dtypes(losses: Tensor) -> set[torch.dtype]:
    """The dtypes that the backward of `losses` goes through, be it by autocast or by the model."""
    nodes, seen, found = [losses.grad_fn], set(), {losses.dtype}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {output.dtype for output in node._input_metadata}
        nodes.extend(following for following, _ in node.next_functions)
    return found
