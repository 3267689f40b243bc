"""Estimate the diagonal Fisher information: which labels are drawn, and what is differentiated.

    F_jj = sum_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta_j)^2 ]

The expectation over labels is taken in one of three ways:

- sampled: y ~ p, the mean over `draws` of them;
- importance: y ~ q with log p(y|x) scaled by sqrt(p_y / q_y). q_c is proportional to
  p_c ||e_c - p||, the norm of the gradient with respect to the logits. The square has the same
  expectation and a smaller variance: one such draw is as good as several;
- exact: the sum over all classes of sqrt(p_c) log p(c|x), squared, one backward a class.

Sequences [B, T, V] have a label at every counted position, and their log-probabilities add up.
There the scaled ones get random signs. The gradient of log p(y|x) has mean 0 over y ~ p but not
over y ~ q: without signs the products of two positions would not vanish.

Labels depend on (seed, round, sample, draw) alone, so scores do not depend on the batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.options import integer

__all__ = ["Draws", "Estimator", "Labels", "Logits", "Target", "checked_logits"]

Target = Literal["log_prob", "logit"]
Labels = Literal["sampled", "importance"]
Draws = int | Literal["exact"]


@dataclass(frozen=True)
class Logits:
    """The logits of a batch.

    Attributes:
        values: floating point [B, C] or [B, T, V], finite or -inf.
        positions: bool [B, T], which positions of [B, T, V] have a label; None: all of them.
    """

    values: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Estimator:
    """How samples are scored: the options that `fisher_diag` and `calibrate` share.

    Args:
        target: "log_prob", or "logit": the drawn class's logit.
        draws: labels per sample, or "exact".
        labels: "sampled" or "importance".
        seed: of the labels.

    Raises:
        TalosValueError: an option is out of range, or two of them contradict each other.
    """

    target: Target = "log_prob"
    draws: Draws = 1
    labels: Labels = "sampled"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in ("log_prob", "logit"):
            raise TalosValueError(f"target must be 'log_prob' or 'logit', got {self.target!r}")
        if self.labels not in ("sampled", "importance"):
            raise TalosValueError(f"labels must be 'sampled' or 'importance', got {self.labels!r}")
        if self.draws != "exact":
            draws = integer("draws", self.draws, 1, "a number of labels a sample or 'exact'")
            object.__setattr__(self, "draws", draws)
        if self.labels == "importance" and (self.target == "logit" or self.draws == "exact"):
            raise TalosValueError(
                "labels='importance' must go with target='log_prob' and a number of draws, got "
                f"target={self.target!r} and draws={self.draws!r}; use labels='sampled'"
            )
        object.__setattr__(self, "seed", integer("seed", self.seed, 0))

    def losses(
        self, logits: Logits, round_index: int, first: int
    ) -> Iterator[tuple[Tensor, float, bool]]:
        """Yield the losses whose gradients are squared, one number per sample.

        Args:
            logits: of a batch.
            round_index: of the calibration, from 0.
            first: number of the batch's first sample in the round.

        Yields:
            fp32 or fp64 [B]; the share of its squares; whether it is the last.

        Raises:
            TalosValueError: all label sequences would have to be visited, or there is one class.
        """
        if self.target == "log_prob" and logits.values.shape[-1] == 1:
            raise TalosValueError(
                f"logits must be of at least two classes, got {list(logits.values.shape)}: the "
                "probability of a single one is always 1; for a model of one output use "
                "target='logit'"
            )
        wide = logits.values.to(torch.promote_types(logits.values.dtype, torch.float32))
        values = wide.log_softmax(-1) if self.target == "log_prob" else wide
        probs = wide.detach().double().softmax(-1)
        if self.draws == "exact":
            yield from self._exact(values, probs)
            return
        for draw in range(self.draws):
            chance = self._proposal(probs)
            rngs = [
                np.random.default_rng([self.seed, round_index, first + row, draw])
                for row in range(len(probs))
            ]
            uniform = _each_position(rngs, logits, lambda rng, count: rng.random(count))
            labels = _by_inversion(chance, uniform)[..., None]
            chosen = values.gather(-1, labels)[..., 0]
            if self.labels == "importance":
                ratio = probs.gather(-1, labels) / chance.gather(-1, labels)
                weights = ratio.sqrt()[..., 0]
                if chosen.dim() > 1:
                    weights *= _each_position(
                        rngs, logits, lambda rng, count: rng.integers(0, 2, count) * 2.0 - 1.0
                    )
                chosen = chosen * weights.to(chosen.dtype)
            if chosen.dim() > 1:
                if logits.positions is not None:
                    chosen = torch.where(logits.positions, chosen, 0.0)
                chosen = chosen.sum(1)
            yield chosen, 1.0 / self.draws, draw + 1 == self.draws

    def _exact(self, values: Tensor, probs: Tensor) -> Iterator[tuple[Tensor, float, bool]]:
        if probs.dim() != 2:
            raise TalosValueError(
                f"draws must be a number for logits [B, T, V], got 'exact' for "
                f"{list(probs.shape)}, whose label sequences cannot all be visited"
            )
        for label in range(probs.shape[1]):
            weight = probs[:, label].sqrt().to(values.dtype)
            possible = torch.where(weight > 0, values[:, label], 0.0)  # 0 * log 0 is 0
            yield weight * possible, 1.0, label + 1 == probs.shape[1]

    def _proposal(self, probs: Tensor) -> Tensor:
        """Return the distribution to draw labels from, fp64 [..., C], not normalised."""
        if self.labels == "sampled":
            return probs
        squares = probs.square().sum(-1, keepdim=True)
        chance = probs * (1.0 - 2.0 * probs + squares).clamp_min_(0.0).sqrt_()
        total = chance.sum(-1, keepdim=True)
        # A class that is certain has no gradient, whatever is drawn.
        return torch.where(total > 0, chance / total.clamp_min(1e-300), probs)


def _each_position(rngs: list[np.random.Generator], logits: Logits, draw: Any) -> Tensor:
    """Random numbers from each sample's generator, 0 at positions not counted: fp64 [B(, T)]."""
    shape = logits.values.shape[:-1]
    numbers = np.zeros(shape)
    if logits.positions is None:
        for row, rng in enumerate(rngs):
            numbers[row] = draw(rng, shape[1:])
    else:
        counted = logits.positions.cpu().numpy()
        for row, rng in enumerate(rngs):
            numbers[row, counted[row]] = draw(rng, int(counted[row].sum()))
    return torch.from_numpy(numbers).to(logits.values.device)


def _by_inversion(chance: Tensor, uniform: Tensor) -> Tensor:
    """Labels by the inverse of the distribution function: fp64 [..., C] to int64 [...]."""
    totals = chance.cumsum(-1)
    labels = torch.searchsorted(totals, uniform[..., None] * totals[..., -1:], right=True)[..., 0]
    return labels.clamp_(max=chance.shape[-1] - 1)


def checked_logits(found: object) -> Logits:
    """Check what `logits_fn` returned.

    Args:
        found: logits [B, C] or [B, T, V], an object with `.logits`, or a pair of logits [B, T, V]
            and the positions, bool [B, T], that have a label.

    Raises:
        TalosTypeError: the logits are no floating-point tensor, or the positions are not bool.
        TalosValueError: a shape does not fit, logits are NaN or infinite, or a sample has no
            position.
    """
    positions = None
    if isinstance(found, tuple) and len(found) == 2 and not hasattr(found, "logits"):
        found, positions = found
    values = getattr(found, "logits", found)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TalosTypeError(
            f"logits_fn must return a floating-point tensor, got {type(values).__name__}; pass "
            "logits_fn=lambda model, batch: ..."
        )
    if values.dim() not in (2, 3) or 0 in values.shape:
        raise TalosValueError(
            f"logits_fn must return logits [B, C] or [B, T, V], got {list(values.shape)}"
        )
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dtype != torch.bool:
            raise TalosTypeError(
                "logits_fn must return positions as a bool tensor beside logits, got "
                f"{getattr(positions, 'dtype', type(positions).__name__)}"
            )
        if values.dim() != 3 or positions.shape != values.shape[:2]:
            raise TalosValueError(
                f"logits_fn must return positions {list(values.shape[:2])} beside logits "
                f"[B, T, V], got {list(positions.shape)} beside {list(values.shape)}"
            )
        if not bool(positions.any(1).all()):
            raise TalosValueError(
                "logits_fn must return a position for every sample, got a sample without one: "
                "its labels are all -100 or its attention_mask is 0"
            )
        values = torch.where(positions[..., None], values, 0.0)  # padding may be anything
    if bool((values.isnan() | values.isposinf()).any()):  # -inf rules a class out
        raise TalosValueError(
            "logits must be finite, got NaN or infinity; look for NaN in the weights and inputs, "
            "or for overflow in the model, which float32 may cure"
        )
    return Logits(values, positions)
