"""Gradient drift: how far training moves the gradient of the output from where it began.

    drift(i) = mean over batches of || g(theta_i) - g(theta_0) ||^2
    g(theta) = mean over a batch's examples of the gradient of f_y(x; theta), the label's logit

f is the model's output, not its loss. In the linear regime the gradient of a logit stays as it was
while the gradient of a loss or of log p changes with the predictions, so that theirs would measure
the progress of training. A batch of one example gives the figure of the paper, example by example;
in a larger batch the examples' changes average out, so that its drift is a lower bound.

Source: Iurada et al. 2025, arXiv 2504.02620, section 4.3 and appendix A.4 (figure 7).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from talos.batches import default_logits, labels_of
from talos.calibration.fisher import evaluating
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods import LogitsFunction
from talos.methods.base import logits_with, trainable
from talos.names import match_tensors, named_parameters, unwrapped
from talos.options import integer
from talos_kernels import gather_grad_

__all__ = ["DriftPoint", "GradientDrift"]

Gradient = dict[str, Tensor]


class Step(Protocol):
    """The part of a `talos.FineTuneStep` that is read."""

    @property
    def step(self) -> int:
        """Its number, from 1."""

    @property
    def steps(self) -> int:
        """How many there will be."""


@dataclass(frozen=True)
class DriftPoint:
    """The drift after a step of training.

    Attributes:
        step: its number, from 1.
        squared: mean over batches of the squared distance from the initial gradient.
    """

    step: int
    squared: float


class GradientDrift:
    """Measures the drift while `talos.fine_tune` trains: pass it as `on_step`.

    The model is read in eval mode, its flags and `.grad` stay as they are. In memory are the
    initial gradient of each batch at the measured entries, and one dense gradient while one is
    computed. So a mask saves memory: without one each batch costs as much as the model.

    Args:
        model: the model that will be trained, with its initial weights.
        batches: a few batches with labels; they are kept.
        mask: measure only the entries that it selects; None: every parameter that requires a
            gradient.
        every: measure after every so many steps, and after the last one.
        logits_fn: `logits_fn(model, batch)` returns logits [B, C]; by default as `talos.calibrate`.

    Attributes:
        initial: mean over batches of the squared norm of the initial gradient; what a drift is
            large or small beside.
        points: a `DriftPoint` for each measured step, in order.

    Raises:
        TalosValueError: there is no batch, a batch has no labels or logits of another shape,
            `every` is out of range, or the mask does not fit the model.
        TalosTypeError: `model` is no module.

    Example:
        >>> from talos import fine_tune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> drift = GradientDrift(model, data, every=2)
        >>> vector = fine_tune(model, data, steps=3, on_step=drift)
        >>> [point.step for point in drift.points], drift.points[-1].squared > 0
        ([2, 3], True)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        mask: Mask | None = None,
        *,
        every: int = 1,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        self._every = integer("every", every, 1)
        self._model = unwrapped(model)
        self._logits_fn = logits_fn or default_logits
        self._mask = mask
        self._params = _measured(self._model, mask)
        self._batches = list(batches)
        if not self._batches:
            raise TalosValueError("batches must hold at least one batch, got none")
        self._reference = [self._gradient(batch) for batch in self._batches]
        self.initial = sum(map(_square, self._reference)) / len(self._batches)
        self.points: list[DriftPoint] = []

    def __call__(self, step: Step) -> None:
        """Measure after this step if it is one of every so many, or the last."""
        if step.step % self._every == 0 or step.step == step.steps:
            self.points.append(DriftPoint(step.step, self.measure()))

    def measure(self) -> float:
        """Return the drift of the present weights."""
        total = 0.0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            now = self._gradient(batch)
            total += _square({name: now[name] - reference[name] for name in now})
        return total / len(self._batches)

    def _gradient(self, batch: Any) -> Gradient:
        """Return the gradient of the labels' mean logit at the measured entries, flat."""
        own = {id(param): name for name, param in self._model.named_parameters()}
        # Leaves of their own: frozen weights have gradients, too, and no hook of an optimizer runs.
        leaves = {name: param.detach().requires_grad_() for name, param in self._params.items()}
        swapped = {own[id(self._params[name])]: leaf for name, leaf in leaves.items()}
        with evaluating(self._model):
            logits = logits_with(self._model, self._logits_fn, swapped, batch)
            mean = _mean_logit(logits, batch)
            grads = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)
        return {
            name: self._selected(name, leaf, grad)
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    def _selected(self, name: str, param: Tensor, grad: Tensor | None) -> Tensor:
        wide = torch.promote_types(param.dtype, torch.float32)
        if self._mask is None:
            return torch.zeros_like(param, dtype=wide) if grad is None else grad.to(wide)
        index = self._mask.pack([name], param.device)
        out = torch.empty(index.nnz, dtype=wide, device=param.device)
        gather_grad_(out, [grad], index)
        return out


def _measured(model: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """Return the parameters to measure, by the mask's names or the model's."""
    if mask is None:
        return dict(trainable(model))
    matched = match_tensors(mask.shapes, named_parameters(model, remove_duplicate=False))
    found = {name: param for name, param in matched.items() if mask.indices[name].nnz}
    if not found:
        raise TalosValueError("mask must select at least one entry, got none")
    return found


def _mean_logit(logits: Tensor, batch: Any) -> Tensor:
    labels = labels_of(batch)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise TalosValueError(
            "logits_fn must return logits [B, C] for labels [B], got "
            f"{list(logits.shape)} and {list(labels.shape)}; of [B, T, V] choose a position, "
            "as logits_fn=lambda model, batch: talos.batches.default_logits(model, batch)[:, -1] "
            "does, and give its labels; or pass logits_fn=talos.choice_logits"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(1, labels.to(logits.device)[:, None].long()).mean()


def _square(gradient: Mapping[str, Tensor]) -> float:
    return sum(
        float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2
        for each in gradient.values()
    )
