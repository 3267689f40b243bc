"""Rounds of scoring: every batch of a round is asked for its logits and gives its scores."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from talos.batches import known_length
from talos.calibration.capture import Capture
from talos.calibration.estimators import Estimator, Logits, checked_logits
from talos.errors import TalosRuntimeError, TalosValueError

__all__ = ["CalibrationProgress", "LogitsFn", "Rounds"]

LogitsFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is; one comes after every batch.

    Attributes:
        round: from 1.
        rounds: how many there are.
        samples: scored in this round so far.
        samples_total: of a round, known once the first is over.
    """

    round: int
    rounds: int
    samples: int
    samples_total: int | None


@dataclass
class Rounds:
    """Scores round after round: what is asked of the model, how far it is, what halves said.

    Attributes:
        halving: whether the last round is to be scored in two halves, `halves`, of which the
            capture then holds the second only.
        halves: the scores of the first and of the second half of its batches.
    """

    rounds: int
    on_progress: Callable[[CalibrationProgress], None] | None
    logits_fn: LogitsFn
    estimator: Estimator
    check: bool
    halving: bool = False
    done: int = 0
    total: int | None = None
    batches: int = 0
    halves: list[dict[str, Tensor]] = field(default_factory=list)

    def score(self, capture: Capture, model: nn.Module, batches: Iterable[Any]) -> int:
        """Adds the scores of every sample of one round and returns their number."""
        samples = count = 0
        half = self._half(batches)
        for batch in batches:
            if count == half:
                self.halves = [capture.take()]
            if self.check and self.done == count == 0:
                self._test(capture, model, batch)
            logits = self._ask(capture, model, batch)
            for losses, share, last in self.estimator.losses(logits, self.done, samples):
                capture.backward(losses, share, last=last)
            samples += len(logits.values)
            del logits, losses  # and the activations with them: not every last backward frees them
            count += 1
            self._report(samples)
        if samples == 0 and self.done:
            raise TalosValueError(
                f"batches must be re-iterable, got none in round {self.done + 1} after "
                f"{self.total} samples in the first; pass a list or a DataLoader"
            )
        if samples == 0:
            raise TalosValueError(
                "batches must hold at least one sample, got 0; check the data set"
            )
        if self.halves:
            capture.check(self.halves[0])
            self.halves.append(capture.scores)
        capture.check()
        self.done, self.total, self.batches = self.done + 1, samples, count
        return samples

    def _half(self, batches: Iterable[Any]) -> int | None:
        """The batch with which the second half of the last round begins, where that is known."""
        if self.done + 1 < self.rounds or not self.halving:
            return None
        return (self.batches or known_length(batches) or 0) // 2 or None

    def _ask(self, capture: Capture, model: nn.Module, batch: Any) -> Logits:
        capture.forget()
        with _refusing_inference_tensors():
            return checked_logits(self.logits_fn(model, batch))

    def _test(self, capture: Capture, model: nn.Module, batch: Any) -> None:
        """Compares scores of three samples with those of single backwards, then forgets both."""
        logits = self._ask(capture, model, batch)
        count = len(logits.values)
        chosen = sorted({0, count // 2, count - 1})
        losses = self._any_losses(logits)
        only = torch.zeros_like(losses).index_fill_(
            0, torch.tensor(chosen, dtype=torch.int64, device="cpu").to(losses.device), 1.0
        )
        capture.backward(losses * only)
        ours = capture.take()
        with capture.plain():
            logits = self._ask(capture, model, batch)
            losses = self._any_losses(logits)
            capture.compare(ours, [losses[row] for row in chosen])

    def _any_losses(self, logits: Logits) -> Tensor:
        """Losses [B] that reach whatever any draw or class reaches."""
        return torch.stack([each for each, _, _ in self.estimator.losses(logits, 0, 0)]).sum(0)

    def _report(self, samples: int) -> None:
        if self.on_progress is not None:
            self.on_progress(CalibrationProgress(self.done + 1, self.rounds, samples, self.total))


@contextmanager
def _refusing_inference_tensors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        raise TalosRuntimeError(
            "batches and model must hold tensors that autograd can use, got some made under "
            "torch.inference_mode; clone() them outside of it, or make them under torch.no_grad"
        ) from error
