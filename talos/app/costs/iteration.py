"""Measures the forms side by side: time, memory, launches, bandwidth.

One form lives at a time, on the same model, which is given back its weights in between; rounds of
all forms follow each other, so that what slows the machine for a while slows them all. In its first
round a form is checked before it is timed: its loss is that of all others, and afterwards no entry
has moved that must not.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from talos.app.costs.meters import clock, copy_bandwidth, launches, median_and_spread, peak_bytes
from talos.app.costs.running import Form, Running
from talos.app.costs.workload import Workload
from talos.errors import TalosRuntimeError
from talos.masks import Mask

__all__ = ["ITERATIONS", "Agreement", "Cost", "Memory", "Progress", "measure"]

Progress = Callable[[str, int, int], None]
"""Called with a form's title, the iterations done and all."""

ITERATIONS = {"cpu": 4, "cuda": 5}
"""Timed in each turn of a form: on a CPU the first after it begins pay for memory that is new."""

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of losses and gradients that differ by the order of sums only, relative."""


@dataclass(frozen=True)
class Memory:
    """Where an iteration's peak memory goes, in bytes.

    Attributes:
        weights: parameters and buffers, with theta_0 of an expansion.
        gradients: after the backward.
        state: kept from step to step, with the selection.
        activations: what the forward and backward hold at most beyond these.
        workspace: what the step does.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        """The most that is held at a time."""
        rest = max(self.activations, self.workspace)
        return self.weights + self.gradients + self.state + rest


@dataclass(frozen=True)
class Cost:
    """What one form costs an iteration: medians in seconds, and distances between quartiles.

    Attributes:
        form: the form's name.
        title: for people.
        forward_backward: with the gradients' reset.
        optimizer: the step.
        total: both.
        spreads: of these three, in that order.
        memory: by what holds it.
        launches: of the step: kernels on a GPU, operators on the CPU.
        bytes_moved: by the step at least; None: it has no model.
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

    @property
    def bytes_per_second(self) -> float | None:
        """Of the step; None: it has no model."""
        return None if self.bytes_moved is None else self.bytes_moved / self.optimizer

    @property
    def share(self) -> float | None:
        """Of the copy bandwidth; the bytes are the model's, so a cache may lift it above 1."""
        rate = self.bytes_per_second
        return None if rate is None else rate / self.bandwidth

    def as_dict(self) -> dict[str, object]:
        """For files.

        Returns:
            Every field and what follows from them.
        """
        follows = {"bytes_per_second": self.bytes_per_second, "share": self.share}
        memory = asdict(self.memory) | {"peak": self.memory.peak}
        return asdict(self) | {"spreads": list(self.spreads), "memory": memory} | follows


@dataclass
class Agreement:
    """What the forms of one workload that were examined found, and further ones must find.

    Attributes:
        title: of the first form, whose the loss is.
        loss: of its first iteration; None: no form was examined.
        gradient: of the first form that trains the workload's selection, at its entries.
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


def measure(
    workload: Workload,
    forms: Sequence[Form],
    *,
    rounds: int = 3,
    iterations: int | None = None,
    on_progress: Progress | None = None,
    agreement: Agreement | None = None,
) -> list[Cost]:
    """Measures forms on one workload, whose weights are at the end what they were.

    Args:
        workload: a model and a batch.
        forms: none that is `missing` on it.
        rounds: how often each form is begun anew.
        iterations: timed in each round, after some that are not; by default `ITERATIONS`.
        on_progress: is told of each round of a form.
        agreement: what other calls with this workload found, filled and compared; by default a
            call compares its own forms.

    Returns:
        The costs, in the order of the forms, without those that ran out of a GPU's memory.

    Raises:
        TalosRuntimeError: a form does not do what it claims: its first loss or gradient differs
            from the others', it moved a weight that it must not, or none. Or no form fits in
            memory.
    """
    iterations = iterations or ITERATIONS[workload.device.type]
    initial = _copies(workload)
    findings = {form.name: _Findings() for form in forms}
    agreement = Agreement() if agreement is None else agreement
    done = 0
    for number in range(rounds):
        for form in forms:
            if form.name not in findings:
                continue
            if on_progress is not None:
                on_progress(form.title, done, rounds * len(forms))
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
            done += 1
    forms = [form for form in forms if form.name in findings]
    if not forms:
        raise TalosRuntimeError(
            "a form must fit in the GPU's memory, got none that does; take a smaller batch"
        )
    if on_progress is not None:
        on_progress("all forms", done, done)
    bandwidth = copy_bandwidth(workload.device)
    return [_cost(form, findings[form.name], bandwidth) for form in forms]


def _weights(workload: Workload) -> list[tuple[str, Tensor]]:
    return list(workload.model.named_parameters())


def _copies(workload: Workload) -> dict[str, Tensor]:
    """All weights, on a GPU where that leaves it nearly all of its memory, else on the CPU."""
    named, place = _weights(workload), torch.device("cpu")
    if workload.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(workload.device)
        few = sum(each.nbytes for _, each in named) < free / 16
        place = workload.device if few else place
    return {name: each.detach().to(place, copy=True) for name, each in named}


def _time(running: Running) -> tuple[float, float]:
    start = clock()
    running.forward_backward()
    middle = clock()
    running.update()
    return middle - start, clock() - middle


def _examine(
    form: Form, running: Running, found: _Findings, before: list[Tensor], agreement: Agreement
) -> None:
    """The first iterations: what they hold, launch and compute."""
    losses = []
    weights = running.weight_bytes(before)
    found.loss = float(running.forward_backward())
    _check_loss(form, running, found.loss, agreement)
    _check_gradient(form, running, agreement)
    running.update()  # makes the state
    running.zero_grad()
    peak = peak_bytes(lambda: losses.append(float(running.forward_backward())))
    made, held = running.gradient_bytes()
    workspace = peak_bytes(running.update)
    found.memory = Memory(
        weights, made + held, running.state_bytes(), max(0, peak - made), max(0, workspace)
    )
    running.forward_backward()
    found.launches = launches(running.update)
    found.bytes_moved = running.bytes_moved
    if not torch.tensor([found.loss, *losses]).isfinite().all():
        raise TalosRuntimeError(f"the loss of {form.title} must be finite, got {losses}")


def _check_loss(form: Form, running: Running, loss: float, agreement: Agreement) -> None:
    if agreement.loss is None:
        agreement.title, agreement.loss = form.title, loss
    first = agreement.loss
    if not abs(loss - first) <= _TOLERANCE[running.workload.dtype] * abs(first):
        raise TalosRuntimeError(
            f"{form.title} must begin with the loss of {agreement.title}, {first:.6g}, "
            f"got {loss:.6g}"
        )


def _check_gradient(form: Form, running: Running, agreement: Agreement) -> None:
    """The forms that train the workload's selection have one gradient there."""
    own = running.selected_gradient()
    if own is None:
        return
    if agreement.gradient is None:
        agreement.gradient = own
    first = agreement.gradient
    error = float((own - first).norm() / first.norm())
    if not error <= _TOLERANCE[running.workload.dtype]:
        raise TalosRuntimeError(
            f"{form.title} must have the gradient of the form before it, got one that differs by "
            f"{error:.2g} of its norm"
        )


def _check_moves(
    form: Form, workload: Workload, initial: dict[str, Tensor], allowed: Mask | None
) -> None:
    """Something has moved, and nothing that must not."""
    moved = 0
    for name, weight in _weights(workload):
        start = initial[name]
        changed = weight.detach().to(start.device) != start
        if allowed is not None:
            own = allowed.to_dense(name).to(start.device) if name in allowed.names else None
            wrong = changed if own is None else changed & ~own
            if wrong.any():
                raise TalosRuntimeError(
                    f"{form.title} must leave the unselected entries of {name} alone, moved "
                    f"{int(wrong.sum())}"
                )
        moved += int(changed.sum())
    if not moved:
        raise TalosRuntimeError(f"{form.title} must train, got the weights that it began with")


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
    (forward, a), (optimizer, b), (total, c) = map(median_and_spread, columns)
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
