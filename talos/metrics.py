"""Accuracies with confidence intervals."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from talos.app.models import evaluation_mode
from talos.batches import default_logits, labels_of
from talos.errors import TalosValueError


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its bootstrap confidence interval.

    Attributes:
        value: Share of right answers, in [0, 1].
        n: Number of answers.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    n: int
    low: float
    high: float

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return round(self.value * self.n)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


def accuracy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    logits_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Accuracy:
    """Measures how often the largest logit is the label's.

    The model is in evaluation mode meanwhile; afterwards each module is in its own again.

    Args:
        model: The model; it returns logits [B, C] or an object with `.logits`.
        batches: Mappings of tensors with `labels` int64 [B], or pairs (inputs, labels); they are
            moved to the model's device.
        logits_fn: Returns the logits [B, C] of a model and a batch, where calling does not.
        level: Coverage of the interval.
        draws: Bootstrap resamples of the answers.
        seed: Seed of the resamples.

    Returns:
        The accuracy with the percentile bootstrap interval.

    Raises:
        TalosTypeError: The model returns something else than logits; give `logits_fn`.
        TalosValueError: There are no examples or no labels, a logit is NaN, logits and labels do
            not fit together, or `level` or `draws` is out of range.

    Example:
        >>> class Sign(nn.Module):
        ...     def forward(self, batch):
        ...         return torch.stack([-batch["x"], batch["x"]], dim=1)
        >>> batch = {"x": torch.tensor([-1.0, 2.0, 3.0]), "labels": torch.tensor([0, 1, 0])}
        >>> result = accuracy(Sign(), [batch])
        >>> result.correct, result.n
        (2, 3)
    """
    if not 0 < level < 1:
        raise TalosValueError(f"level must be in (0, 1), got {level}")
    if draws < 1:
        raise TalosValueError(f"draws must be at least 1, got {draws}")
    device = next((parameter.device for parameter in model.parameters()), None)
    correct = n = 0
    with torch.no_grad(), evaluation_mode(model):
        for given in batches:
            batch = given if device is None else _moved(given, device)
            logits = default_logits(model, batch) if logits_fn is None else logits_fn(model, batch)
            labels = labels_of(batch)
            _check(logits, labels)
            correct += int((logits.argmax(1) == labels).sum())
            n += len(labels)
    if n == 0:
        raise TalosValueError("batches must hold at least one example, got none")
    # How many right answers a resample of n answers holds is binomial.
    shares = np.random.default_rng(seed).binomial(n, correct / n, size=draws) / n
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return Accuracy(value=correct / n, n=n, low=float(low), high=float(high))


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_moved(value, device) for value in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise TalosValueError(
            f"model must return logits [B, C] for labels [B], got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}; give logits_fn"
        )
    if logits.isnan().any():
        raise TalosValueError(
            "model must return logits that are numbers, got NaN; look for weights that are "
            "not finite"
        )
