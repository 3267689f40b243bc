"""Fine-tuning as a plain loop: cosine schedule with warm-up, autocast, clipping, accumulation.

    lr(s) = lr * s / warmup                                                for s <= warmup
    lr(s) = lr * (1 + cos(pi (s - warmup) / (steps - warmup + 1))) / 2     after that

`fine_tune` trains and returns the task vector, `fine_tune_steps` yields the same training step by
step. The method (`talos.methods`) decides what is trained and how.
"""

import inspect
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from talos.batches import default_logits, labels_of
from talos.distributed import errors_on_all_ranks, is_sharded, several_processes
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.methods import LogitsFunction, Method, Phase, Talos, method_of
from talos.names import check_module
from talos.optim.param_groups import check_hyperparameters
from talos.options import integer
from talos.task_vectors import TaskVector
from talos.tensors import WatchedBuffers
from talos.training.checkpoints import Checkpoints
from talos.training.order import Order
from talos.training.ranks import (
    check_ranks,
    digest_if_readable,
    mean_loss,
    warn_of_same_batches,
)

__all__ = ["FineTuneStep", "fine_tune", "fine_tune_steps"]

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class FineTuneStep:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        steps: how many there will be, in all phases of the method.
        loss: mean loss of the step's batches, of all ranks.
        lr: learning rate of the step.
        grad_norm: norm of the gradient before clipping, over what is trained.
        seconds: since the first step began.

    Example:
        >>> step = FineTuneStep(step=1, steps=80, loss=0.7, lr=1e-4, grad_norm=2.0, seconds=0.3)
        >>> f"{step.step}/{step.steps} loss {step.loss:.2f}"
        '1/80 loss 0.70'
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
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
    on_step: Callable[[FineTuneStep], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    keep: int = 2,
    resume: bool = False,
    data: Mapping[str, Any] | None = None,
) -> TaskVector:
    """Fine-tune a model in place and return its task vector.

    The model trains in train mode; its modes and frozen tensors are restored at the end, also after
    an error. Layers with running statistics (BatchNorm) stay in eval mode: a task vector holds no
    statistics.

    Where torch.distributed runs several processes, all call this, each with batches of its own.
    Gradients and losses are the means over all ranks, so that every rank ends with the same weights
    and vector; of a mask only the selected entries are sent. An error on one rank is raised on all.
    Models that FSDP2 shards are trained, too, without checkpoints and not by linearized or l_lora;
    there an error of the loss or the batches is raised on its own rank only, and the others wait.

    Args:
        model: the model; not wrapped in DistributedDataParallel.
        batches: re-iterable; repeated as often as the steps need. A batch is a dict with `labels`,
            or a pair of inputs and labels.
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
        accumulate: batches a step; the step minimises their mean loss.
        autocast: dtype of the forward pass where autocast is safe (torch.bfloat16).
        loss_fn: `loss_fn(model, batch)` returns a scalar; default: cross-entropy of the logits.
            The method linearized passes it a `LinearizedModel`, whose `model(batch)` is logits.
        logits_fn: `logits_fn(model, batch)` returns [B, C], for the default loss.
        on_step: called with a `FineTuneStep` after each step.
        checkpoint: a folder for checkpoints, from which a training that was stopped goes on with
            the same bits; see docs/operations.md. The last step is always written.
        every: steps from one checkpoint to the next.
        keep: how many of the newest checkpoints stay.
        resume: go on from the newest checkpoint that is intact, or begin if there is none. Pass the
            initial model and the same settings.
        data: what else a training that resumes must share, by name: file, seed, batch size.

    Returns:
        Tuned minus initial weights, of what was trained.

    Raises:
        TalosTypeError: `model` is no module, `autocast` no dtype, or `checkpoint` no path.
        TalosValueError: a setting is out of range, the method is unknown or cannot train this
            model, there is no batch, or the loss is not finite (that step is not taken); or the
            checkpoint belongs to a training with other settings or initial weights; or settings
            or weights differ between ranks.
        TalosRuntimeError: another rank raised.
        TalosOSError: a checkpoint cannot be written, or the folder holds some and `resume` is
            False.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> fine_tune(model, data, steps=2, on_step=lambda step: print(step.step)).mask.nnz
        1
        2
        15
        >>> fine_tune(model, data, method="linearized", steps=2).metadata
        {'method': 'linearized'}
    """
    run = _Run(
        model=model,
        batches=batches,
        mask=mask,
        method=method,
        steps=steps,
        lr=lr,
        warmup=warmup,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        label_smoothing=label_smoothing,
        accumulate=accumulate,
        autocast=autocast,
        loss_fn=loss_fn,
        logits_fn=logits_fn,
        on_step=on_step,
        checkpoint=checkpoint,
        every=every,
        keep=keep,
        resume=resume,
        data=data,
    )
    with closing(run.stream()) as stream:
        while True:
            try:
                next(stream)
            except StopIteration as end:
                vector: TaskVector = end.value
                return vector


def fine_tune_steps(
    model: nn.Module, batches: Iterable[Any], mask: Mask | None = None, **settings: Any
) -> Generator[FineTuneStep, None, TaskVector]:
    """Fine-tune as `fine_tune` does, one step at a time.

    Settings are checked at the call. The model is restored when the generator ends or is closed.

    Args:
        model: as of `fine_tune`.
        batches: as of `fine_tune`.
        mask: as of `fine_tune`.
        **settings: further arguments of `fine_tune`.

    Returns:
        A generator of `FineTuneStep`; its return value, which `yield from` gives, is the task
        vector.

    Raises:
        TalosTypeError: as `fine_tune`.
        TalosValueError: as `fine_tune`.
        TalosRuntimeError: as `fine_tune`.
        TalosOSError: as `fine_tune`.

    Example:
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> [step.step for step in fine_tune_steps(torch.nn.Linear(4, 3), data, steps=2)]
        [1, 2]
    """
    given = inspect.signature(fine_tune).bind(model, batches, mask, **settings)
    given.apply_defaults()
    return _Run(**given.arguments).stream()


@dataclass(kw_only=True)
class _Run:
    """One training: the arguments of `fine_tune`, checked, and the loop over phases and steps."""

    model: nn.Module
    batches: Iterable[Any]
    mask: Mask | None
    method: Method | str | None
    steps: int
    lr: float
    warmup: int | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    label_smoothing: float
    accumulate: int
    autocast: torch.dtype | None
    loss_fn: LossFunction | None
    logits_fn: LogitsFunction | None
    on_step: Callable[[FineTuneStep], object] | None
    checkpoint: str | os.PathLike[str] | None
    every: int
    keep: int
    resume: bool
    data: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        """Check all settings and prepare the first phase; the model is left as it is."""
        with errors_on_all_ranks():
            settings = self._prepare()
        check_ranks(self.model, settings)
        self._checkpoints: Checkpoints | None = None
        if self.checkpoint is not None:
            self._checkpoints = Checkpoints(
                self.checkpoint,
                self.model,
                settings,
                every=self.every,
                keep=self.keep,
                resume=self.resume,
            )
            self._taken = self._checkpoints.step

    def _prepare(self) -> dict[str, str]:
        """Check the settings, prepare the first phase, and return what ranks must share."""
        check_module(self.model)
        self.steps = integer("steps", self.steps, 1)
        self.accumulate = integer("accumulate", self.accumulate, 1)
        if self.warmup is None:
            self.warmup = max(1, self.steps // 10)
        self.warmup = integer("warmup", self.warmup, 0)
        if self.warmup > self.steps:
            raise TalosValueError(f"warmup must be at most steps ({self.steps}), got {self.warmup}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise TalosValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise TalosValueError(
                f"max_grad_norm must be positive or None, got {self.max_grad_norm}"
            )
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise TalosTypeError(f"autocast must be a torch.dtype, got {self.autocast!r}")
        method = method_of(self.method, self.mask)
        if method.phases > 1 and isinstance(self.batches, Iterator):
            raise TalosValueError(
                f"batches must be re-iterable for the method {method.name}, got an iterator; pass "
                "a list or a DataLoader"
            )
        hyper = {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }
        check_hyperparameters(hyper)
        self._first = method.start(self.model, hyper, self.logits_fn or default_logits)
        self._loss = self.loss_fn or _cross_entropy(self._first.logits_fn, self.label_smoothing)
        self._total = self.steps * method.phases
        self._taken = 0
        self._digest: str | None = None  # of the first batch
        if self.resume and self.checkpoint is None:
            raise TalosValueError("resume must be False without checkpoint, got True; pass both")
        return self._settings(method, hyper)

    def _settings(self, method: Method, hyper: Mapping[str, Any]) -> dict[str, str]:
        """Return what all ranks must share, and a training that resumes."""
        own = ("steps", "warmup", "max_grad_norm", "label_smoothing", "accumulate", "autocast")
        mask = {"mask": method.mask.fingerprint} if isinstance(method, Talos) else {}
        every = {name: getattr(self, name) for name in own}
        found = {**(self.data or {}), **method.metadata, **mask, **hyper, **every}
        return {name: str(value) for name, value in found.items()}

    def stream(self) -> Generator[FineTuneStep, None, TaskVector]:
        """Train: yield every step and return the task vector."""
        modes = {module: module.training for module in self.model.modules()}
        self._start = time.perf_counter()
        try:
            self.model.train()
            for module in modes:
                if getattr(module, "running_mean", None) is not None:
                    module.eval()
            buffers = WatchedBuffers(self.model)
            phase: Phase | None = self._first
            if self._checkpoints is not None:
                phase = self._checkpoints.resumed(self._first)
            while phase is not None:
                yield from self._phase(phase)
                last, phase = phase, phase.following()
            vector = last.task_vector()
            if "moved_buffers" not in vector.metadata:  # SparseAdam looks for them itself
                moved = buffers.metadata(stacklevel=3)
                vector = replace(vector, metadata={**vector.metadata, **moved})
            return vector
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _phase(self, phase: Phase) -> Iterator[FineTuneStep]:
        order = Order(self.batches)
        try:
            phase.freeze()
            taken = 0
            if self._checkpoints is not None and self._checkpoints.go_to(order):
                taken = (self._taken - 1) % self.steps + 1
            for step in range(taken + 1, self.steps + 1):
                event = self._step(phase, order, step)
                with errors_on_all_ranks():
                    if self.on_step is not None:
                        self.on_step(event)
                yield event
                if self._checkpoints is not None:  # it has what the caller has drawn until here
                    last = event.step == self._total
                    self._checkpoints.save(phase, order, event.step, event.loss, last)
            phase.zero_grad()
        finally:
            phase.release()

    def _step(self, phase: Phase, stream: Iterator[Any], step: int) -> FineTuneStep:
        phase.zero_grad()
        loss, error = math.nan, None
        try:
            loss = sum(self._backward(phase, next(stream)) for _ in range(self.accumulate))
        except Exception as raised:
            if any(map(is_sharded, phase.trained.values())):
                raise  # the other ranks wait in FSDP2, where no error reaches them
            error = raised  # the other ranks wait for this one's loss
        mean = mean_loss(loss, _device(phase))
        if not math.isfinite(mean):
            with errors_on_all_ranks():
                if error is not None:
                    raise error
                self._check_finite(loss)
            self._check_finite(mean)
        if self._taken == 0 and self._digest is not None:
            warn_of_same_batches(self._digest)
        phase.average()
        if step == 1:
            phase.check_gradients()
        norm = phase.clip(math.inf if self.max_grad_norm is None else self.max_grad_norm)
        rate = self._rate(self.lr if phase.lr is None else phase.lr, step)
        for group in phase.optimizer.param_groups:
            group["lr"] = rate
        phase.step()
        self._taken += 1
        seconds = time.perf_counter() - self._start
        return FineTuneStep(self._taken, self._total, mean, rate, float(norm), seconds)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TalosValueError(
                f"lr must keep the loss finite, got {loss} at step {self._taken + 1}, with the "
                f"weights of step {self._taken}; lower it, or look for broken samples"
            )

    def _backward(self, phase: Phase, batch: Any) -> float:
        """Add a batch's share to the gradient, and return its share of the loss."""
        if self._digest is None and several_processes():
            self._digest = digest_if_readable(batch)
        with _autocast(_device(phase), self.autocast):
            loss = self._loss(phase.module, batch)
        (loss / self.accumulate).backward()
        return float(loss.detach()) / self.accumulate

    def _rate(self, peak: float, step: int) -> float:
        """Return the learning rate of a step, from 1."""
        warmup = self.warmup or 0
        if step <= warmup:
            return peak * step / max(warmup, 1)
        angle = math.pi * (step - warmup) / (self.steps - warmup + 1)
        return peak * (1 + math.cos(angle)) / 2


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


def _device(phase: Phase) -> torch.device:
    """Return where the phase trains; what it does not train may be offloaded."""
    device: torch.device = phase.optimizer.param_groups[0]["params"][0].device
    return device


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
