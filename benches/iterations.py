"""Whole training iterations of several forms of fine-tuning, measured in turn on one workload.

One form lives at a time, on the same model, whose weights are restored in between. Each round runs
all forms, so that what slows the machine for a while slows them all. In its first round a form is
checked before it is timed: its loss, and its gradient where it trains the workload's mask, are
those of the other forms, and no entry moves that must not.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benches import measure
from benches.workload import Workload
from talos.masks import Mask
from talos.methods import LogitsFunction, Phase
from talos.optim import SparseAdam
from talos.optim.compact_gradient import CompactGradient

HYPER: dict[str, Any] = {"lr": 1e-7, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""Of every form's AdamW; without weight decay, so that a masked gradient keeps a weight, and so
slow that no form learns its batch by heart: gradients that underflow take a CPU ten times as long.
"""
ITERATIONS = {"cpu": 4, "cuda": 5}
"""Timed in each turn of a form: on a CPU the first after it begins pay for memory that is new."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative, of losses and gradients that differ by the order of sums only."""


@dataclass(frozen=True)
class Form:
    """One way to fine-tune.

    Attributes:
        name: in files.
        title: in tables.
        start: prepares a workload's model, in place, and returns what iterates.
        missing: why it cannot run on a workload; None where it can.
    """

    name: str
    title: str
    start: Callable[[Workload], "Running"]
    missing: Callable[[Workload], str | None] = lambda _: None


@dataclass
class Running:
    """A form at work; `close` gives the model back.

    Attributes:
        workload: what is trained.
        module: what the loss is computed of.
        logits_fn: `logits_fn(module, batch)` returns the logits.
        optimizer: holds the state.
        update: the step, with all that it needs after the backward.
        allowed: returns the entries that may move; None for all.
        bytes_moved: what a step must move at least; None where there is no model of it.
        own_state: what is kept from step to step beside the optimizer's state.
        finish: called at the end.
        separate: whether `module` trains a copy of the model, or weights beside it.
    """

    workload: Workload
    module: nn.Module
    logits_fn: LogitsFunction
    optimizer: torch.optim.Optimizer
    update: Callable[[], object]
    allowed: Callable[[], Mask | None] = lambda: None
    bytes_moved: int | None = None
    own_state: Any = ()
    finish: Callable[[], object] = lambda: None
    separate: bool = False

    @classmethod
    def of_phase(cls, workload: Workload, phase: Phase, **about: Any) -> "Running":
        """Return a method's phase at work; `about` holds further attributes."""
        phase.freeze()
        about = {"update": phase.step, "finish": phase.release} | about
        return cls(workload, phase.module, phase.logits_fn, phase.optimizer, **about)

    def forward_backward(self) -> Tensor:
        """Drop all gradients, make new ones, and return the loss."""
        self.zero_grad()
        loss = self.workload.loss(self.module, self.logits_fn)
        loss.backward()
        return loss.detach()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for param in self.module.parameters():
            param.grad = None

    def weight_bytes(self, before: Iterable[Tensor]) -> int:
        """Return the memory of weights and buffers; `before` are the model's own weights."""
        found = [*self.module.parameters(), *self.module.buffers()]
        found += [] if self.separate else before  # weights that others stand for
        return measure.held_bytes(found, self.workload.device)

    def state_bytes(self) -> int:
        """Return the memory kept from step to step."""
        if isinstance(self.optimizer, SparseAdam):  # its index, too; not the initial weights
            return self.optimizer.nbytes
        kept = [*stored_in(self.optimizer.state), *stored_in(self.own_state)]
        return measure.held_bytes(kept, self.workload.device)

    def gradient_bytes(self) -> tuple[int, int]:
        """Return the bytes that a backward allocates, and those held all the time.

        The latter are the scratch in which one compact gradient after the other is dense.
        """
        groups = self.optimizer.param_groups  # adapters are no part of the module
        params = {*self.module.parameters(), *(p for group in groups for p in group["params"])}
        grads = [param.grad for param in params if param.grad is not None]
        compact = [each for each in grads if isinstance(each, CompactGradient)]
        dense = (each for each in grads if not isinstance(each, CompactGradient))
        entries = (each.entries for each in compact)
        made = measure.held_bytes((*dense, *entries), self.workload.device)
        scratch = max((each.numel() for each in compact), default=0)
        return made, scratch * self.workload.dtype.itemsize

    def selected_gradient(self) -> Tensor | None:
        """Return the gradient at the workload's selected entries, float32 `[nnz]` on the CPU.

        It is None where the form trains another selection.
        """
        mask = self.workload.mask
        if self.separate or self.allowed() is not mask:
            return None
        params = dict(self.workload.model.named_parameters())
        found = []
        for name in mask.names:
            grad = params[name].grad
            if grad is None:
                return None
            if isinstance(grad, CompactGradient):
                found.append(grad.entries.cpu())
            else:
                found.append(grad.cpu()[mask.to_dense(name).cpu()].float())
        return torch.cat(found)

    def close(self) -> None:
        """Drop the gradients and let the model's weights be trained again."""
        self.zero_grad()
        self.finish()


def stored_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested mappings and sequences; of torchao's quantised ones the parts."""
    if isinstance(tree, Tensor) and hasattr(tree, "__tensor_flatten__"):
        names, _ = tree.__tensor_flatten__()
        yield from stored_in([getattr(tree, name) for name in names])
    elif isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from stored_in(each)


@dataclass(frozen=True)
class Memory:
    """Where an iteration's peak memory goes, in bytes.

    Attributes:
        weights: parameters and buffers, with theta_0 of an expansion.
        gradients: after the backward.
        state: kept from step to step, with the selection.
        activations: the most that forward and backward hold beyond these.
        workspace: the most that the step holds beyond these.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        rest = max(self.activations, self.workspace)
        return self.weights + self.gradients + self.state + rest


@dataclass(frozen=True)
class Cost:
    """What an iteration of one form costs: medians in seconds, and distances between quartiles.

    Attributes:
        form: the form's name.
        title: in tables.
        forward_backward: with the gradients' reset.
        optimizer: the step.
        total: both.
        spreads: of these three, in that order.
        memory: by what holds it.
        launches: of the step: kernels on a GPU, operators on the CPU.
        bytes_moved: what the step must move at least; None where there is no model of it.
        bandwidth: bytes a second of a copy on this device.
        loss: of the first iteration.
    """

    form: str
    title: str
    forward_backward: float
    optimizer: float
    total: float
    spreads: tuple[float, float, float]
    memory: Memory
    launches: int
    bytes_moved: int | None
    bandwidth: float
    loss: float

    def as_dict(self) -> dict[str, object]:
        """Return every field for a file, with the step's rate and its share of a copy's."""
        rate = None if self.bytes_moved is None else self.bytes_moved / self.optimizer
        share = None if rate is None else rate / self.bandwidth  # a cache may lift it above 1
        memory = asdict(self.memory) | {"peak": self.memory.peak}
        follows = {"bytes_per_second": rate, "share": share}
        return asdict(self) | {"spreads": list(self.spreads), "memory": memory} | follows


@dataclass
class Agreement:
    """What the forms of one workload found so far, and further ones must find.

    Attributes:
        title: of the first form.
        loss: of its first iteration.
        gradient: of the first form that trains the workload's mask, at its entries.
    """

    title: str = ""
    loss: float | None = None
    gradient: Tensor | None = None


@dataclass
class _Findings:
    """What is known of one form so far."""

    times: list[tuple[float, float]] = field(default_factory=list)
    loss: float = 0.0
    memory: Memory | None = None
    launches: int = 0
    bytes_moved: int | None = None


def measure_forms(
    workload: Workload,
    forms: Sequence[Form],
    *,
    rounds: int = 3,
    iterations: int | None = None,
    agreement: Agreement | None = None,
) -> list[Cost]:
    """Measure forms on one workload, whose weights are restored.

    Args:
        workload: a model and a batch.
        forms: none that is `missing` on it.
        rounds: how often each form is begun anew.
        iterations: timed in each round, after some that are not; by default `ITERATIONS`.
        agreement: what other calls with this workload found.

    Returns:
        The costs in the order of the forms, without those that ran out of a GPU's memory.

    Raises:
        RuntimeError: a form's first loss or gradient differs from the others', or it moved a weight
            that it must not, or none.
    """
    iterations = iterations or ITERATIONS[workload.device.type]
    initial = _copies(workload)
    findings = {form.name: _Findings() for form in forms}
    agreement = Agreement() if agreement is None else agreement
    for number in range(rounds):
        for form in forms:
            if form.name not in findings:
                continue
            found = findings[form.name]
            before = [each.detach() for _, each in _weights(workload)]
            running = form.start(workload)
            try:
                if number == 0:
                    _examine(form, running, found, before, agreement)
                else:
                    running.forward_backward()
                    running.update()
                found.times += [_time(running) for _ in range(iterations)]
                allowed, separate = running.allowed(), running.separate
            except torch.OutOfMemoryError:
                del findings[form.name]
            finally:
                running.close()
            if number == 0 and form.name in findings and not separate:
                _check_moves(form, workload, initial, allowed)
            del running, before
            _restore(workload, initial)
    bandwidth = measure.copy_bandwidth(workload.device)
    measured = [form for form in forms if form.name in findings]
    return [_cost(form, findings[form.name], bandwidth) for form in measured]


def _weights(workload: Workload) -> list[tuple[str, Tensor]]:
    return list(workload.model.named_parameters())


def _copies(workload: Workload) -> dict[str, Tensor]:
    """Copy all weights, on a GPU where that leaves it nearly all of its memory, else on the CPU."""
    named, place = _weights(workload), torch.device("cpu")
    if workload.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(workload.device)
        few = sum(each.nbytes for _, each in named) < free / 16
        place = workload.device if few else place
    return {name: each.detach().to(place, copy=True) for name, each in named}


def _time(running: Running) -> tuple[float, float]:
    start = measure.clock()
    running.forward_backward()
    middle = measure.clock()
    running.update()
    return middle - start, measure.clock() - middle


def _examine(
    form: Form, running: Running, found: _Findings, before: list[Tensor], agreement: Agreement
) -> None:
    """Run the first iterations, and record what they hold, launch and compute."""
    losses = []
    weights = running.weight_bytes(before)
    found.loss = float(running.forward_backward())
    _check_loss(form, running, found.loss, agreement)
    _check_gradient(form, running, agreement)
    running.update()  # makes the state
    running.zero_grad()
    peak = measure.peak_bytes(lambda: losses.append(float(running.forward_backward())))
    made, held = running.gradient_bytes()
    workspace = measure.peak_bytes(running.update)
    found.memory = Memory(
        weights, made + held, running.state_bytes(), max(0, peak - made), max(0, workspace)
    )
    running.forward_backward()
    found.launches = measure.launches(running.update)
    found.bytes_moved = running.bytes_moved
    if not torch.tensor([found.loss, *losses]).isfinite().all():
        raise RuntimeError(f"the loss of {form.title} must be finite, got {losses}")


def _check_loss(form: Form, running: Running, loss: float, agreement: Agreement) -> None:
    if agreement.loss is None:
        agreement.title, agreement.loss = form.title, loss
    first = agreement.loss
    if not abs(loss - first) <= TOLERANCE[running.workload.dtype] * abs(first):
        raise RuntimeError(
            f"{form.title} must begin with the loss of {agreement.title}, {first:.6g}, "
            f"got {loss:.6g}"
        )


def _check_gradient(form: Form, running: Running, agreement: Agreement) -> None:
    """Check that the forms that train the workload's mask have one gradient there."""
    own = running.selected_gradient()
    if own is None:
        return
    if agreement.gradient is None:
        agreement.gradient = own
    first = agreement.gradient
    error = float((own - first).norm() / first.norm())
    if not error <= TOLERANCE[running.workload.dtype]:
        raise RuntimeError(
            f"{form.title} must have the gradient of the form before it, got one that differs by "
            f"{error:.2g} of its norm"
        )


def _check_moves(
    form: Form, workload: Workload, initial: dict[str, Tensor], allowed: Mask | None
) -> None:
    """Check that something moved, and nothing that must not."""
    moved = 0
    for name, weight in _weights(workload):
        start = initial[name]
        changed = weight.detach().to(start.device) != start
        if allowed is not None:
            own = allowed.to_dense(name).to(start.device) if name in allowed.names else None
            wrong = changed if own is None else changed & ~own
            if wrong.any():
                raise RuntimeError(
                    f"{form.title} must not move the unselected entries of {name}, moved "
                    f"{int(wrong.sum())}"
                )
        moved += int(changed.sum())
    if not moved:
        raise RuntimeError(f"{form.title} must train, got the weights that it began with")


@torch.no_grad()
def _restore(workload: Workload, initial: dict[str, Tensor]) -> None:
    for name, weight in _weights(workload):
        weight.copy_(initial[name])
    gc.collect()
    if workload.device.type == "cuda":
        torch.cuda.empty_cache()


def _cost(form: Form, found: _Findings, bandwidth: float) -> Cost:
    assert found.memory is not None
    columns = [
        [first for first, _ in found.times],
        [second for _, second in found.times],
        [first + second for first, second in found.times],
    ]
    (forward, a), (optimizer, b), (total, c) = map(measure.median_and_spread, columns)
    return Cost(
        form.name,
        form.title,
        forward,
        optimizer,
        total,
        (a, b, c),
        found.memory,
        found.launches,
        found.bytes_moved,
        bandwidth,
        found.loss,
    )
