"""Fine-tuning as a plain loop: cosine schedule with warm-up, autocast, clipping, accumulation.

    lr(s) = lr * s / warmup                                      for s <= warmup
    lr(s) = lr * (1 + cos(pi (s - warmup) / (steps - warmup + 1))) / 2    after that

`fine_tune` yields an event a step and prints nothing. With a mask it trains the selected entries
with `SparseAdam` (TaLoS, arXiv 2504.02620, equation 8); without one it trains every weight with
`torch.optim.AdamW`, which is the non-linear fine-tuning that task arithmetic began with
(Ilharco 2023).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import default_logits, labels_of
from .errors import TalosTypeError, TalosValueError
from .masks import Mask
from .optim import SparseAdam
from .param_groups import check_hyperparameters
from .params import named_parameters
from .task_vectors import TaskVector

__all__ = ["FineTuneFinished", "FineTuneStep", "fine_tune"]

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class FineTuneStep:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        steps: how many there will be.
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
    logits_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Iterator[FineTuneStep | FineTuneFinished]:
    """Fine-tune a model in place, one event a step.

    Args:
        model: trained in train mode; its modes and frozen tensors are restored at the end.
        batches: re-iterable; begun again as often as the steps need. A batch is a dict with
            `labels`, or a pair of inputs and labels.
        mask: the entries to train; None trains every parameter that requires a gradient.
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: steps of linear warm-up; None: a tenth of the steps.
        betas: decay rates of AdamW's moments.
        eps: added to AdamW's denominator.
        weight_decay: decoupled weight decay of what is trained.
        max_grad_norm: clip the gradient's norm, over what is trained; None: no clipping.
        label_smoothing: of the default loss, in [0, 1).
        accumulate: batches a step; their mean loss is minimised.
        autocast: run the forward pass in this dtype where that is safe (torch.bfloat16).
        loss_fn: `loss_fn(model, batch)`, a scalar; default: cross-entropy of the logits.
        logits_fn: `logits_fn(model, batch)`, `[B, C]`, for the default loss.

    Yields:
        `FineTuneStep` after each step, then one `FineTuneFinished` with the task vector.

    Raises:
        TalosValueError: a setting is out of range, there is no batch, or the loss is not finite
            (the step is not taken then).

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> *events, finished = fine_tune(model, data, steps=2)
        >>> [event.step for event in events], finished.task_vector.mask.nnz
        ([1, 2], 15)
    """
    warmup = max(1, steps // 10) if warmup is None else warmup
    _check(steps, warmup, accumulate, label_smoothing, max_grad_norm)
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TalosTypeError(f"autocast must be a torch.dtype, got {autocast!r}")
    if not isinstance(model, nn.Module):
        raise TalosValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    trained = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    check_hyperparameters(hyper)
    trainer = _Sparse(model, mask, hyper) if mask is not None else _Dense(trained, hyper)
    compute_loss = loss_fn or _cross_entropy(logits_fn or default_logits, label_smoothing)
    return _loop(
        model, batches, trainer, compute_loss, _cosine(lr, warmup, steps), steps, accumulate,
        max_grad_norm, autocast,
    )  # fmt: skip


class _Sparse:
    """Trains what a mask selects."""

    def __init__(self, model: nn.Module, mask: Mask, hyper: dict[str, Any]) -> None:
        self.optimizer = SparseAdam(model, mask, **hyper)
        self.optimizer.release()  # until the loop begins: a caller may never begin it

    def freeze(self) -> None:
        self.optimizer.freeze()

    def clip(self, max_norm: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(max_norm)

    def task_vector(self) -> TaskVector:
        return self.optimizer.task_vector()

    def release(self) -> None:
        self.optimizer.release()


class _Dense:
    """Trains every weight."""

    def __init__(self, params: dict[str, nn.Parameter], hyper: dict[str, Any]) -> None:
        if not params:
            raise TalosValueError("model must have a parameter with requires_grad=True, got none")
        self.params = params
        self.base = {name: param.detach().clone() for name, param in params.items()}
        fused = all(param.device.type in ("cpu", "cuda") for param in params.values())
        self.optimizer = torch.optim.AdamW(list(params.values()), fused=fused, **hyper)

    def freeze(self) -> None:
        pass

    def clip(self, max_norm: float) -> Tensor:
        if max_norm == math.inf:
            grads = [p.grad for p in self.params.values() if p.grad is not None]
            return nn.utils.get_total_norm(grads)
        return nn.utils.clip_grad_norm_(self.params.values(), max_norm)

    def task_vector(self) -> TaskVector:
        return TaskVector.from_models(self.base, self.params)

    def release(self) -> None:
        pass


def _loop(
    model: nn.Module,
    batches: Iterable[Any],
    trainer: _Sparse | _Dense,
    compute_loss: LossFunction,
    schedule: Callable[[int], float],
    steps: int,
    accumulate: int,
    max_grad_norm: float | None,
    autocast: torch.dtype | None,
) -> Iterator[FineTuneStep | FineTuneFinished]:
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    stream = _endless(batches)
    start = time.perf_counter()
    try:
        trainer.freeze()
        model.train()
        for step in range(1, steps + 1):
            trainer.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for _ in range(accumulate):
                with _autocast(device, autocast):
                    loss = compute_loss(model, next(stream))
                (loss / accumulate).backward()
                total += float(loss.detach()) / accumulate
            if step == 1:
                _warn_without_gradient(trainer)
            if not math.isfinite(total):
                raise TalosValueError(
                    f"the loss of step {step} is {total}; the weights are those of step "
                    f"{step - 1}: lower lr, or look for broken samples"
                )
            norm = trainer.clip(max_grad_norm if max_grad_norm is not None else math.inf)
            rate = schedule(step)
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate
            trainer.optimizer.step()
            elapsed = time.perf_counter() - start
            yield FineTuneStep(step, steps, total, rate, float(norm), elapsed)
        trainer.optimizer.zero_grad(set_to_none=True)
        yield FineTuneFinished(trainer.task_vector(), steps, time.perf_counter() - start)
    finally:
        trainer.release()
        for module, mode in modes.items():
            module.training = mode


def _warn_without_gradient(trainer: _Sparse | _Dense) -> None:
    groups = trainer.optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    missing = sum(param.grad is None for param in params)
    if missing and isinstance(trainer, _Sparse):
        warnings.warn(
            f"{missing} of {len(params)} selected tensors got no gradient in the first step and "
            "are not trained; where activations are checkpointed, use_reentrant=False is needed",
            stacklevel=3,
        )


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


def _cosine(lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step <= warmup:
            return lr * step / max(warmup, 1)
        return lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2

    return rate


def _cross_entropy(
    logits_fn: Callable[[nn.Module, Any], Tensor], label_smoothing: float
) -> LossFunction:
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


def _check(
    steps: int, warmup: int, accumulate: int, label_smoothing: float, max_grad_norm: float | None
) -> None:
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0),
                               ("accumulate", accumulate, 1)):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise TalosValueError(f"{name} must be an integer of at least {least}, got {value}")
    if warmup > steps:
        raise TalosValueError(f"warmup must be at most steps ({steps}), got {warmup}")
    if not 0.0 <= label_smoothing < 1.0:
        raise TalosValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise TalosValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
