"""Squares of per-sample weight gradients, summed over samples, from one backward of a batch.

In eval mode samples do not touch each other, so one backward of the summed per-sample losses
yields, at every linear layer y = x W^T + b, each sample's own dY. With T rows (tokens) a sample,

    S_W[o, i] += sum_b ( sum_t dY[b, t, o] X[b, t, i] )^2
    S_b[o]    += sum_b ( sum_t dY[b, t, o] )^2

and so for the gain and bias of a norm, of which `talos.calibration.routing` gives every row a copy,
for convolutions, which it makes linear layers of, and for embeddings. `talos_kernels.fisher_diag`
computes the sums, `talos.calibration.layouts` tells which rows are whose. A parameter that a
forward uses several times has the gradient of a sample summed over its uses before it is squared:
their rows count as further tokens of the sample.
"""

from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, prod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from talos.calibration.layouts import Layouts, Use
from talos.calibration.listeners import Part, Sink
from talos.calibration.pieces import Piece, blocks
from talos.calibration.routing import Router
from talos.calibration.single_backwards import REMEDY, compare, dtypes_of
from talos.errors import TalosRuntimeError, TalosValueError
from talos.names import unwrapped
from talos.params import Candidates
from talos_kernels import fisher_diag_, fisher_diag_embedding_, fisher_diag_vector_

__all__ = ["Capture"]

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
    received: dict[Part, list[Piece]] = field(default_factory=dict)
    aside: set[Part] = field(default_factory=set)  # whose rows take more probes
    only: set[Part] | None = None  # what this backward is to score; None: all
    queue: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # score, dY, X


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

    def __init__(self, model: nn.Module, selection: Candidates, scale: float = 1.0) -> None:
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
            batch.half = torch.float16 in dtypes_of(losses)
        if not batch.half:
            losses = losses * self._scale
        self._check_parts()
        probes = self._layouts.probes(batch.uses, batch.samples, half=batch.half)
        settled = probes == 0 and all(use.owners is None for use in batch.uses)
        self._probe(losses, range(probes))
        self._run(losses, "score", retain_graph=not (last and settled))
        if batch.aside:
            self._probe(losses, range(probes, self._layouts.most))
            batch.only, batch.aside = batch.aside, set()
            self._run(losses, "score", retain_graph=not last)
            batch.only = None
        for use in batch.uses:
            use.signatures.clear()
        if last:
            self.forget()

    def _check_parts(self) -> None:
        """Refuses parts of a parameter that overlap."""
        for name, parts in self._batch.parts.items():
            ordered = sorted(parts, key=lambda part: (part.start, part.stop))
            for part, following in pairwise(ordered):
                if following.start < part.stop:
                    raise TalosRuntimeError(
                        f"{name} must be used whole or in parts that do not overlap to be scored, "
                        f"got entries {part.start} to {part.stop} and others of them; {REMEDY}"
                    )

    def _probe(self, losses: Tensor, probes: range) -> None:
        for probe in probes:
            scales = self._layouts.scales(losses.detach(), probe)
            self._run(losses * scales, "probe", retain_graph=True)

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
                    f"zero scores would be selected first; {REMEDY}"
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
        compare(self._selection, scores, losses, self._scale)

    def _run(self, losses: Tensor, phase: str, retain_graph: bool) -> None:
        self._batch.phase = phase
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
                    f"convolutions to be scored, got another use; {REMEDY}"
                )
        for part in list(self._batch.received):  # uses that this backward did not reach are 0
            if part not in self._batch.aside:
                self._score(part)
        self._batch.received.clear()
        self._launch()

    def _record(self, sink: Sink) -> None:
        batch = self._batch
        if batch.phase != "forward":  # computed again by a checkpoint: recorded already
            return
        sink.use.tensors = tuple(part.name for part in sink.parts)
        sink.use.ordinal = batch.counts[sink.use.name]
        batch.counts[sink.use.name] += 1
        batch.uses.append(sink.use)
        for part in sink.parts:
            batch.parts.setdefault(part.name, set()).add(part)
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
        parts = [part for part in sink.parts if batch.only is None or part in batch.only]
        layout = self._layouts.decide(use, rows, batch.samples) if parts else None
        if layout is None:
            batch.aside.update(parts)
            return
        if inputs is not None:
            inputs = inputs.reshape(count, *inputs.shape[-1:]) if sink.matrix else inputs.flatten()
            if sink.table is not None and sink.padding_idx is not None:
                padding = sink.padding_idx % (sink.table.numel // rows.shape[1])
                rows = rows.masked_fill((inputs == padding)[:, None], 0)
        for part in parts:
            pieces = batch.received.setdefault(part, [])
            x = None if part == sink.vector else inputs
            pieces.append(Piece(sink, rows, x, layout))
            if len(pieces) == batch.expected[part] and part not in batch.aside:
                self._score(part)

    def _score(self, part: Part) -> None:
        """Squares what has been received of a part, its uses joined as tokens of the samples."""
        pieces = self._batch.received.pop(part)
        low, high, score = self._entries(part)
        sink, share = pieces[0].sink, self._batch.share
        if len(pieces) > 1 and len({_way(part, piece) for piece in pieces}) > 1:
            raise TalosRuntimeError(
                f"{part.name} must be used in one way to be scored, got two: an embedding that is "
                f"a linear layer, or a weight and its transpose; {REMEDY}"
            )
        for number, (dy, inputs) in enumerate(blocks(pieces, self._batch.samples)):
            if inputs is None:
                if dy.shape[-1] != part.numel:
                    raise TalosRuntimeError(
                        f"{part.name} must be as wide as the rows that it is applied to, got "
                        f"{part.numel} entries for rows of {dy.shape[-1]}; {REMEDY}"
                    )
                fisher_diag_vector_(score, dy[..., low:high], share=share)
                continue
            width = (dy if sink.transposed or part == sink.table else inputs).shape[-1]
            if low % width or high % width:
                raise TalosRuntimeError(
                    f"{part.name} must be used in the shape that it has to be scored in part, got "
                    f"rows of {width}; {REMEDY}"
                )
            matrix = score.view(-1, width)
            if part == sink.table:
                fisher_diag_embedding_(matrix, dy, inputs, share=share)
                continue
            if number:  # two blocks write to one score
                self._launch()
            left, right = (inputs, dy) if sink.transposed else (dy, inputs)
            rows = slice(low // width, high // width)
            self._batch.queue.append((matrix, left[..., rows], right))
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

    def _entries(self, part: Part) -> tuple[int, int, Tensor]:
        """The entries of `part` to score, counted from its start, and their scores, flat."""
        self._reached.add(part.name)
        param = part.param
        first, last = self._selection[part.name].rows or (0, len(param))
        row = param.numel() // max(len(param), 1)
        low = max(part.start, first * row)
        high = max(min(part.stop, last * row), low)
        score = self._score_of(part.name).view(-1)[low:high]
        return low - part.start, high - part.start, score


def _way(part: Part, piece: Piece) -> tuple[bool, bool, bool, int]:
    """As what a use sees a part, and how wide."""
    vector, sink = piece.inputs is None, piece.sink
    rows = piece.dy if piece.inputs is None or sink.transposed else piece.inputs
    return vector, part == sink.table, sink.transposed, rows.shape[-1]
