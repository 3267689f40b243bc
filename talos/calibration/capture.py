"""Squares of per-sample weight gradients, summed over samples, from one backward of a batch.

In eval mode samples do not touch each other. One backward of the summed losses of a batch therefore
yields each sample's own dY at every linear layer y = x W^T + b. With T rows (tokens) a sample,

    S_W[o, i] += sum_b ( sum_t dY[b, t, o] X[b, t, i] )^2
    S_b[o]    += sum_b ( sum_t dY[b, t, o] )^2

Norms, convolutions and embeddings are brought to this form by `talos.calibration.routing`, and
`talos.calibration.layouts` finds which rows belong to which sample. If a forward uses a parameter
several times, a sample's gradient is the sum over the uses before it is squared: the rows of all
uses count as rows of the sample.

The ops of `talos_kernels` compute the sums of a batch, in float32. They are added up in float64,
where the order of batches changes the last of 53 bits at most, so that scores rounded to float32 do
not depend on it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.architecture.experts import one_by_one
from talos.calibration.autograd import Part, Sink
from talos.calibration.hooks import hook_modules
from talos.calibration.launches import Launches, Layer
from talos.calibration.layouts import Layouts, Rows, Use, blocks
from talos.calibration.routing import Router, eager
from talos.calibration.sharded import ShardedSums, gathered
from talos.distributed import errors_on_all_ranks
from talos.errors import TalosRuntimeError
from talos.names import named_parameters, unwrapped
from talos.params import Candidates
from talos_kernels import fisher_diag_embedding_, fisher_diag_vector_

__all__ = ["REMEDY", "Capture", "dtypes_of"]

REMEDY = "leave it out with params= or requires_grad_(False)"


@dataclass
class _Batch:
    """What the forward of the current batch has recorded, and what its backwards have received."""

    uses: list[Use] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # uses by name
    parts: dict[str, set[Part]] = field(default_factory=dict)  # by name
    expected: Counter[Part] = field(default_factory=Counter)  # uses of each part in the forward
    half: bool | None = None  # whether any of its gradients is fp16
    samples: int = 0
    share: float = 1.0
    phase: str = "forward"  # then "probe" where there is one, then "score"; "idle": run along
    received: dict[Part, list[tuple[Sink, Rows]]] = field(default_factory=dict)
    aside: set[Part] = field(default_factory=set)  # whose rows need more probes
    only: set[Part] | None = None  # what this backward is to score; None: all
    launches: Launches = field(default_factory=Launches)


class Capture:
    """While active, adds the scores of parameters in the backwards that `backward` runs.

    Inside the context every parameter of the model that is not scored has requires_grad=False.
    Flags, modules and `.grad` are as before when it ends, however it ends.

    Args:
        model: the model, in eval mode.
        candidates: what is scored.
        scale: what losses are multiplied by, a power of two. It lifts small squares, which fp32
            would round to 0, and keeps their order. It is left out where any gradient is fp16, also
            in a layer that is not scored.
        group: the ranks of a model that FSDP2 shards; None: all there are.

    Attributes:
        candidates: what is scored, with the parameters that the forward uses.
        sharded: whether FSDP2 shards the model: all ranks must run every forward and backward.
        reached: the names of the parameters that a backward has reached.

    Example:
        >>> import torch
        >>> from talos.params import select_parameters
        >>> model = torch.nn.Linear(2, 3)
        >>> with Capture(model, select_parameters(model)) as capture:
        ...     with capture.forward():
        ...         logits = model(torch.eye(2))
        ...     capture.backward(logits.sum(1))
        >>> capture.take()["bias"].tolist()  # each of the two samples has a gradient of ones
        [2.0, 2.0, 2.0]
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        scale: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._model = unwrapped(model)
        self.candidates, holders = gathered(model, candidates)
        self.sharded = bool(holders)
        self.scale = scale
        self._group = group
        self._error: Exception | None = None
        self._layouts = Layouts()
        self.reached: set[str] = set()
        self._batch = _Batch()
        self._stack = ExitStack()
        self._sums: dict[str, Tensor] = {}  # of a sharded model what ranks have not added up yet
        self._shards = ShardedSums(candidates, holders, group) if self.sharded else None

    def __enter__(self) -> Self:
        named = named_parameters(self._model)  # of a sharded model not those of the candidates
        params = [named[name] for name in self.candidates]
        with ExitStack() as stack:
            for name, param in named.items():
                stack.callback(param.requires_grad_, param.requires_grad)
                param.requires_grad_(name in self.candidates)
            stack.enter_context(eager())
            stack.enter_context(one_by_one(self._model, params))
            self._router = Router(self.candidates, self._record, self._receive)
            hook_modules(stack, self._model, self._router)
            if self._shards is not None:
                self._shards.hook_modules(stack, self._exchange)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forget()
        self._stack.close()
        del self._router  # it refers back to this

    @contextmanager
    def forward(self, *, scored: bool = True) -> Iterator[None]:
        """Begin a batch: the model's forward runs inside.

        Args:
            scored: False lets autograd compute the gradients of the parameters instead.
        """
        self._forget()
        with self._router, nullcontext() if scored else self._router.silence():
            yield

    def _forget(self) -> None:
        """Drop what a forward has recorded."""
        self._batch = _Batch()
        self._router.forget()

    def take(self) -> dict[str, Tensor]:
        """Return the sums of squares and begin new ones.

        Returns:
            By name in the order of the candidates, float64 in the parameters' shapes, on their
            devices, times scale^2; rows that are no candidates are 0. Those of a sharded model are
            sharded by rows, and the sums over all ranks.
        """
        if self._shards is not None:
            return self._shards.take()
        sums = {name: self._sum_of(name) for name in self.candidates}
        self._sums = {}
        return sums

    def _sum_of(self, name: str) -> Tensor:
        """One sum. It is made when a backward reaches it: by then activations were freed."""
        if name not in self._sums:
            param = self.candidates[name].param
            self._sums[name] = torch.zeros(param.shape, dtype=torch.float64, device=param.device)
        return self._sums[name]

    def backward(self, losses: Tensor, share: float = 1.0, *, last: bool = True) -> None:
        """Add `share` times the squared gradients of each loss to the scores.

        Args:
            losses: one for each sample of the batch whose forward ran last, float [B].
            share: the factor of the squares; 0 for a batch that only runs along.
            last: False where another backward of the same forward follows.

        Raises:
            TalosRuntimeError: a parameter is used in a way that cannot be scored, or samples
                influence one another.
            TalosValueError: the samples of a batch cannot be told apart.
        """
        batch = self._batch
        batch.samples, batch.share = len(losses), share
        if not losses.requires_grad:
            raise TalosRuntimeError(
                "logits_fn must return logits that depend on the selected parameters, got logits "
                "without a gradient; take away no_grad and detach, or choose others with params="
            )
        self._router.forget()
        if batch.half is None:
            batch.half = torch.float16 in dtypes_of(losses)
        if not batch.half:
            losses = losses * self.scale
        self._check_parts()
        probes = self._layouts.probes(batch.uses, batch.samples, half=batch.half)
        settled = probes == 0 and all(use.owners is None for use in batch.uses)
        self._probe(losses, range(probes))
        self._run(losses, "score", retain_graph=self.sharded or not (last and settled))
        again = bool(batch.aside)
        if self._most(int(again)):
            self._probe(losses, range(probes, self._layouts.most) if again else range(0))
            batch.only, batch.aside = batch.aside, set()
            self._run(losses, "score", retain_graph=not last)
            batch.only = None
        for use in batch.uses:
            use.signatures.clear()
        if last:
            self._forget()

    def _check_parts(self) -> None:
        """Refuse parts of a parameter that overlap."""
        for name, parts in self._batch.parts.items():
            ordered = sorted(parts, key=lambda part: (part.start, part.stop))
            for part, following in pairwise(ordered):
                if following.start < part.stop:
                    raise TalosRuntimeError(
                        f"{name} must be used whole or in parts that do not overlap to be scored, "
                        f"got entries {part.start} to {part.stop} and others of them; {REMEDY}"
                    )

    def _probe(self, losses: Tensor, probes: range) -> None:
        most = self._most(len(probes))
        for probe in probes:
            scales = self._layouts.scales(losses.detach(), probe)
            self._run(losses * scales, "probe", retain_graph=True)
        for _ in range(most - len(probes)):
            self._run(losses, "idle", retain_graph=True)

    def _most(self, runs: int) -> int:
        """Return the most backwards that a rank of a sharded model needs: all must run as many."""
        if not self.sharded:
            return runs
        with errors_on_all_ranks(self._group) as needed:
            needed.append(runs)
        return int(max(needed))

    def _run(self, losses: Tensor, phase: str, retain_graph: bool) -> None:
        """Run one backward; the sinks call `_receive`."""
        self._batch.phase = phase
        params = [each.param for each in self.candidates.values()]
        try:
            # Inside the router, because a checkpoint runs its forward again.
            with torch.autocast(losses.device.type, enabled=False), self._router:
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
        one: AbstractContextManager[list[str]] = nullcontext([])
        with errors_on_all_ranks(self._group) if self.sharded else one as left:
            if self._error is not None:
                raised, self._error = self._error, None
                raise raised
            for name, grad in zip(self.candidates, grads, strict=True):
                if grad is not None:  # a routed call leaves its parameters without one
                    raise TalosRuntimeError(
                        f"{name} must be used only by linear layers, norms, embeddings and 2-d "
                        f"convolutions to be scored, got another use; {REMEDY}"
                    )
            for part in list(self._batch.received):  # uses that this backward did not reach are 0
                if part not in self._batch.aside:
                    self._score(part)
            self._batch.received.clear()
            self._batch.launches.launch()
            left.extend(self._sums if self.sharded else ())
        if self._shards is not None:
            self._exchange(self._shards.rest(left))

    def _exchange(self, names: Iterable[str]) -> None:
        """Add up the scores of a sharded model's parameters over all ranks, which all call this."""
        if self._shards is not None and self._batch.phase == "score":
            self._batch.launches.launch()
            self._shards.add({name: self._sums.pop(name, None) for name in names})

    def _record(self, sink: Sink) -> None:
        """Note one use of the forward."""
        batch = self._batch
        if batch.phase != "forward":  # a checkpoint's second forward: recorded already
            return
        sink.use.ordinal = batch.counts[sink.use.name]
        batch.counts[sink.use.name] += 1
        batch.uses.append(sink.use)
        for part in sink.parts:
            batch.parts.setdefault(part.name, set()).add(part)
            batch.expected[part] += 1

    def _receive(self, sink: Sink, dy: Tensor, inputs: Tensor | None) -> None:
        """Take the gradient of one use's output in a backward.

        A sharded model must finish its backward, for the other ranks; then the error is raised.
        """
        try:
            if self._error is None:
                self._take_rows(sink, dy, inputs)
        except Exception as error:
            if not self.sharded:
                raise
            self._error = error

    def _take_rows(self, sink: Sink, dy: Tensor, inputs: Tensor | None) -> None:
        if self._batch.phase == "forward":
            raise TalosRuntimeError(
                f"logits_fn must leave gradients to the calibration, got a backward through "
                f"{sink.use.name} before it returned; compute them under no_grad, or elsewhere"
            )
        with torch._C.DisableTorchFunction():  # of the router: a microsecond each call
            if dy.numel() == 0 or self._batch.phase == "idle":
                return
            rows = dy.reshape(prod(sink.use.lead), -1)
            if self._batch.phase == "probe":
                self._layouts.probe(sink.use, rows)
            else:
                self._keep(sink, rows, inputs)

    def _keep(self, sink: Sink, dy: Tensor, inputs: Tensor | None) -> None:
        """Keep rows until all uses of their parts have theirs, then score those parts."""
        batch = self._batch
        parts = [part for part in sink.parts if batch.only is None or part in batch.only]
        layout = self._layouts.decide(sink.use, dy, batch.samples) if parts else None
        if layout is None:
            batch.aside.update(parts)
            return
        if inputs is not None:
            shape = (len(dy), *inputs.shape[-1:]) if sink.matrix else (len(dy),)
            inputs = inputs.reshape(shape)
            if sink.table is not None and sink.padding_idx is not None:
                padding = sink.padding_idx % (sink.table.numel // dy.shape[1])
                dy = dy.masked_fill((inputs == padding)[:, None], 0)
        for part in parts:
            received = batch.received.setdefault(part, [])
            received.append((sink, Rows(dy, None if part == sink.vector else inputs, layout)))
            if len(received) == batch.expected[part] and part not in batch.aside:
                self._score(part)

    def _score(self, part: Part) -> None:
        """Square what has been received of a part, its uses joined as rows of the samples."""
        received = self._batch.received.pop(part)
        low, high, total = self._entries(part)
        sink, share = received[0][0], self._batch.share
        if len({_way(part, *each) for each in received}) > 1:
            raise TalosRuntimeError(
                f"{part.name} must be used in one way to be scored, got two: an embedding that is "
                f"a linear layer, or a weight and its transpose; {REMEDY}"
            )
        uses = [rows for _, rows in received]
        for dy, inputs in blocks(uses, self._batch.samples):
            found = torch.zeros_like(total, dtype=torch.float32)
            if inputs is None:
                if dy.shape[-1] != part.numel:
                    raise TalosRuntimeError(
                        f"{part.name} must be as wide as the rows that it is applied to, got "
                        f"{part.numel} entries for rows of {dy.shape[-1]}; {REMEDY}"
                    )
                fisher_diag_vector_(found, dy[..., low:high], share=share)
                total += found
                continue
            width = (dy if sink.transposed or part == sink.table else inputs).shape[-1]
            if low % width or high % width:
                raise TalosRuntimeError(
                    f"{part.name} must be used in the shape that it has to be scored in part, got "
                    f"rows of {width}; {REMEDY}"
                )
            matrix = found.view(-1, width)
            if part == sink.table:
                fisher_diag_embedding_(matrix, dy, inputs, share=share)
                total += found
                continue
            left, right = (inputs, dy) if sink.transposed else (dy, inputs)
            chosen = slice(low // width, high // width)
            layer = Layer(total, matrix, left[..., chosen], right, share)
            self._batch.launches.add(layer)

    def _entries(self, part: Part) -> tuple[int, int, Tensor]:
        """Return the entries of `part` to score, counted from its start, and their sums, flat."""
        self.reached.add(part.name)
        param = part.param
        first, last = self.candidates[part.name].rows or (0, len(param))
        row = param.numel() // max(len(param), 1)
        low = max(part.start, first * row)
        high = max(min(part.stop, last * row), low)
        total = self._sum_of(part.name).view(-1)[low:high]
        return low - part.start, high - part.start, total


def _way(part: Part, sink: Sink, rows: Rows) -> tuple[bool, bool, bool, int]:
    """As what a use takes a part, and how wide."""
    vector = rows.inputs is None
    x = rows.dy if rows.inputs is None or sink.transposed else rows.inputs
    return vector, part == sink.table, sink.transposed, x.shape[-1]


def dtypes_of(losses: Tensor) -> set[torch.dtype]:
    """Return the dtypes that a backward of `losses` goes through, by autocast or by the model."""
    nodes, seen, found = [losses.grad_fn], set(), {losses.dtype}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {output.dtype for output in node._input_metadata}
        nodes.extend(following for following, _ in node.next_functions)
    return found
