"""Fine-tuning as a plain loop: cosine schedule with warm-up, autocast, clipping, accumulation.

    lr(s) = lr * s / warmup                                      for s <= warmup
    lr(s) = lr * (1 + cos(pi (s - warmup) / (steps - warmup + 1))) / 2    after that

`fine_tune` yields an event a step and prints nothing. What is trained, and how, is the method's
business: see `talos.methods`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from talos.batches import default_logits, labels_of
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.methods import LogitsFunction, Method, Phase, method_of
from talos.optim.param_groups import check_hyperparameters
from talos.reals import integer
from talos.task_vectors import TaskVector
from talos.tensors import WatchedBuffers

__all__ = ["FineTuneFinished", "FineTuneStep", "fine_tune"]

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class FineTuneStep:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        steps: how many there will be, in all phases of the method.
        loss: mean loss of the step's batches.
        lr: learning rate of the step.
        grad_norm: norm of the gradient before clipping, over what is trained.
        seconds: since the first step began.

    Example:
        >>> event = FineTuneStep(step=1, steps=80, loss=0.7, lr=1e-4, grad_norm=2.0, seconds=0.3)
        >>> f"{event.step}/{event.steps} loss {event.loss:.2f}"
        '1/80 loss 0.70'
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class FineTuneFinished:
    """The last event.

    Attributes:
        task_vector: tuned minus initial weights, of what was trained.
        steps: optimizer steps taken.
        seconds: the whole training took.

    Example:
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> *_, finished = fine_tune(torch.nn.Linear(4, 3), data, steps=2)
        >>> finished.steps
        2
    """

    task_vector: TaskVector
    steps: int
    seconds: float


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    mask: Mask | None = None,
    *,
    method: Method | str | None = None,
    steps: int,
    lr: float = 1e-3,
    warmup: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    loss_fn: LossFunction | None = None,
    logits_fn: LogitsFunction | None = None,
) -> Iterator[FineTuneStep | FineTuneFinished]:
    """Fine-tune a model in place, one event a step.

    Args:
        model: trained in train mode; its modes and frozen tensors are restored at the end. Layers
            with running statistics (BatchNorm) stay in eval mode: a task vector holds weights, and
            the statistics are the base's.
        batches: re-iterable; begun again as often as the steps need. A batch is a dict with
            `labels`, or a pair of inputs and labels.
        mask: the entries that the method talos trains; other methods take none.
        method: one of `talos.methods` with its settings, or the name of one with its defaults;
            None: talos with a mask, else nonlinear, which trains every parameter that requires a
            gradient.
        steps: optimizer steps; lota takes them twice.
        lr: peak learning rate.
        warmup: steps of linear warm-up; None: a tenth of the steps.
        betas: decay rates of AdamW's moments.
        eps: added to AdamW's denominator.
        weight_decay: decoupled weight decay of what is trained.
        max_grad_norm: clip the gradient's norm, over what is trained; None: no clipping.
        label_smoothing: of the default loss, in [0, 1).
        accumulate: batches a step; their mean loss is minimised.
        autocast: run the forward pass in this dtype where that is safe (torch.bfloat16).
        loss_fn: `loss_fn(model, batch)`, a scalar; default: cross-entropy of the logits. The
            method linearized hands it a `LinearizedModel`, whose `model(batch)` is logits.
        logits_fn: `logits_fn(model, batch)`, `[B, C]`, for the default loss.

    Yields:
        `FineTuneStep` after each step, then one `FineTuneFinished` with the task vector.

    Raises:
        TalosValueError: a setting is out of range, the method is unknown or cannot train this
            model, there is no batch, or the loss is not finite (the step is not taken then).

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> *events, finished = fine_tune(model, data, steps=2)
        >>> [event.step for event in events], finished.task_vector.mask.nnz
        ([1, 2], 15)
        >>> *_, finished = fine_tune(model, data, method="linearized", steps=2)
        >>> finished.task_vector.metadata
        {'method': 'linearized'}
    """
    steps, accumulate = integer("steps", steps, 1), integer("accumulate", accumulate, 1)
    warmup = max(1, steps // 10) if warmup is None else integer("warmup", warmup, 0)
    _check(steps, warmup, label_smoothing, max_grad_norm)
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TalosTypeError(f"autocast must be a torch.dtype, got {autocast!r}")
    if not isinstance(model, nn.Module):
        raise TalosValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chosen = method_of(method, mask)
    if chosen.phases > 1 and isinstance(batches, Iterator):
        raise TalosValueError(
            f"batches must be re-iterable for the method {chosen.name}, got an iterator; pass a "
            "list or a DataLoader"
        )
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    check_hyperparameters(hyper)
    first = chosen.start(model, hyper, logits_fn or default_logits)
    run = _Run(
        batches=batches,
        loss_fn=loss_fn or _cross_entropy(first.logits_fn, label_smoothing),
        lr=lr,
        schedule=partial(_cosine, warmup, steps),
        steps=steps,
        total=steps * chosen.phases,
        accumulate=accumulate,
        max_norm=math.inf if max_grad_norm is None else max_grad_norm,
        autocast=autocast,
    )
    return run.events(model, first)


@dataclass
class _Run:
    """One call of `fine_tune`: its settings, and the loop over phases and steps."""

    batches: Iterable[Any]
    loss_fn: LossFunction
    lr: float
    schedule: Callable[[float, int], float]
    steps: int
    total: int
    accumulate: int
    max_norm: float
    autocast: torch.dtype | None
    taken: int = 0
    start: float = 0.0

    def events(self, model: nn.Module, phase: Phase) -> Iterator[FineTuneStep | FineTuneFinished]:
        modes = {module: module.training for module in model.modules()}
        self.start = time.perf_counter()
        try:
            model.train()
            for module in modes:
                if getattr(module, "running_mean", None) is not None:
                    module.eval()
            buffers = WatchedBuffers(model)
            yield from self._phase(phase)
            while (following := phase.following()) is not None:
                phase = following
                yield from self._phase(phase)
            vector = phase.task_vector()
            if "moved_buffers" not in vector.metadata:  # SparseAdam says it by itself
                told = buffers.tell(stacklevel=2)
                vector = replace(vector, metadata={**vector.metadata, **told})
            yield FineTuneFinished(vector, self.taken, self._seconds())
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _phase(self, phase: Phase) -> Iterator[FineTuneStep]:
        stream = _endless(self.batches)
        with ExitStack() as stack:
            stack.callback(phase.release)
            phase.freeze()
            yield from self._steps(phase, stream)

    def _steps(self, phase: Phase, stream: Iterator[Any]) -> Iterator[FineTuneStep]:
        for step in range(1, self.steps + 1):
            phase.zero_grad()
            loss = sum(self._backward(phase, next(stream)) for _ in range(self.accumulate))
            if step == 1:
                phase.check_gradients()
            if not math.isfinite(loss):
                raise TalosValueError(
                    f"the loss of step {self.taken + 1} is {loss}; the weights are those of "
                    f"step {self.taken}: lower lr, or look for broken samples"
                )
            norm = phase.clip(self.max_norm)
            rate = self.schedule(self.lr if phase.lr is None else phase.lr, step)
            for group in phase.optimizer.param_groups:
                group["lr"] = rate
            phase.step()
            self.taken += 1
            yield FineTuneStep(self.taken, self.total, loss, rate, float(norm), self._seconds())
        phase.zero_grad()

    def _backward(self, phase: Phase, batch: Any) -> float:
        """Adds a batch's share to the gradient; returns its share of the loss."""
        device = phase.optimizer.param_groups[0]["params"][0].device  # others may be offloaded
        with _autocast(device, self.autocast):
            loss = self.loss_fn(phase.module, batch)
        (loss / self.accumulate).backward()
        return float(loss.detach()) / self.accumulate

    def _seconds(self) -> float:
        return time.perf_counter() - self.start


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    epoch = 0
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise TalosValueError(
                "batches must yield at least one batch"
                + (" in every epoch: pass a list or a DataLoader, not a generator" if epoch else "")
            )
        epoch += 1


def _cosine(warmup: int, steps: int, lr: float, step: int) -> float:
    """The learning rate of a step, from 1."""
    if step <= warmup:
        return lr * step / max(warmup, 1)
    return lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2


def _cross_entropy(logits_fn: LogitsFunction, label_smoothing: float) -> LossFunction:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = logits_fn(model, batch).float()
        if logits.dim() > 2:
            raise TalosValueError(
                f"the default loss is for logits [B, C], got {list(logits.shape)}, whose labels "
                "may be shifted; pass loss_fn, e.g. lambda model, batch: model(**batch).loss"
            )
        return F.cross_entropy(logits, labels_of(batch), label_smoothing=label_smoothing)

    return loss


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _check(steps: int, warmup: int, label_smoothing: float, max_grad_norm: float | None) -> None:
    if warmup > steps:
        raise TalosValueError(f"warmup must be at most steps ({steps}), got {warmup}")
    if not 0.0 <= label_smoothing < 1.0:
        raise TalosValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise TalosValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
