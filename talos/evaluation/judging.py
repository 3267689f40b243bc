"""Judges and metrics: numbers for examples, and how they become one figure.

A *judge* evaluates a module with the weights that it has at the moment of the call. It returns one
number for each example, in the same order at every call: its *outcomes*. A *metric* reduces the
outcomes to a figure.

    figure(theta) = reduce(judge(f(.; theta)))          accuracy: the mean of right (1) or wrong (0)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from talos.batches import default_logits, evaluation_mode, labels_of
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.methods import LogitsFunction
from talos.names import check_module
from talos.options import positive

__all__ = [
    "ACCURACY",
    "Judge",
    "Metric",
    "Models",
    "ask",
    "losses",
    "predictions",
    "right_answers",
]

Judge = Callable[[nn.Module], Tensor]
"""Maps a module to one number for each example, `[n]`: bool, integers or floating point."""

Models = nn.Module | Mapping[str, nn.Module]
"""One module, or one for each task: heads of their own around shared weights."""


def mean(outcomes: Tensor) -> Tensor:
    """Return the mean over the examples, the last dimension."""
    return outcomes.mean(-1)


@dataclass(frozen=True)
class Metric:
    """How the outcomes of examples become one figure, and whether a higher figure is better.

    Attributes:
        reduce: maps outcomes, float64 `[..., n]`, to figures `[...]`, none of them NaN; default:
            the mean. The bootstrap reduces many resamples at once.
        better: "higher" or "lower".
        floor: a figure below it counts as this much where it divides another one.

    Raises:
        TalosValueError: `better` is another word, or `floor` is not positive.

    Example:
        >>> perplexity = Metric(lambda losses: losses.mean(-1).exp(), better="lower")
        >>> perplexity.figure(torch.tensor([0.0, 0.0]))
        1.0
        >>> ACCURACY.figure(torch.tensor([True, True, False, True]))
        0.75
    """

    reduce: Callable[[Tensor], Tensor] = mean
    better: Literal["higher", "lower"] = "higher"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.better not in ("higher", "lower"):
            raise TalosValueError(f"better must be higher or lower, got {self.better!r}")
        object.__setattr__(self, "floor", positive("floor", self.floor))

    def figure(self, outcomes: Tensor) -> float:
        """Return the figure of outcomes `[n]`.

        Raises:
            TalosValueError: `reduce` returns several numbers or NaN.
        """
        return float(self.figures(outcomes))

    def figures(self, outcomes: Tensor) -> Tensor:
        """Return the figures `[...]` of outcomes `[..., n]`, float64.

        Raises:
            TalosValueError: `reduce` returns another shape or NaN.
        """
        figures = self.reduce(outcomes.double())
        if not isinstance(figures, Tensor) or figures.shape != outcomes.shape[:-1]:
            got = list(figures.shape) if isinstance(figures, Tensor) else type(figures).__name__
            raise TalosValueError(
                f"reduce must return {list(outcomes.shape[:-1])}, one number of "
                f"{outcomes.shape[-1]} outcomes, got {got}; reduce the last dimension, as "
                "outcomes.mean(-1) does"
            )
        if bool(figures.isnan().any()):
            raise TalosValueError(
                f"reduce must return one number of {outcomes.shape[-1]} outcomes, got NaN; return "
                "another number where some of the examples are not enough"
            )
        return figures.double()

    def ratio(self, above: Tensor, below: Tensor) -> Tensor:
        """Divide figures; a divisor below `floor` counts as `floor`.

        Raises:
            TalosValueError: a figure is negative, so that a ratio says nothing.
        """
        least = float(torch.minimum(above.amin(), below.amin()))
        if least < 0:
            raise TalosValueError(
                f"figures must be at least 0 where they are divided, got {least:g}; take a metric "
                "such as an accuracy or a perplexity"
            )
        return above / below.clamp_min(self.floor)


ACCURACY = Metric()
"""The share of right answers: the mean of bool outcomes."""


def right_answers(batches: Iterable[Any], logits_fn: LogitsFunction | None = None) -> Judge:
    """Return a judge that compares the class of the highest logit with the label.

    Args:
        batches: re-iterable; a mapping with `labels`, int64 [B], or a pair (inputs, labels). Labels
            may lie on another device than the logits.
        logits_fn: `logits_fn(model, batch)` returns logits [B, C]; None: the model is called as
            `talos.fine_tune` calls it.

    Returns:
        A judge with outcomes bool `[n]`, on the CPU.

    Raises:
        TalosValueError: `batches` is an iterator. The judge raises it if there is no example, or if
            logits or labels have another shape.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> judge = right_answers([(torch.eye(2), torch.tensor([0, 0]))])
        >>> judge(model)
        tensor([ True, False])
    """

    def outcomes(logits: Tensor, batch: Any) -> Tensor:
        return logits.argmax(1) == _labels(logits, batch)

    return _judge(batches, logits_fn, outcomes)


def predictions(batches: Iterable[Any], logits_fn: LogitsFunction | None = None) -> Judge:
    """Return a judge that returns the class of the highest logit; it needs no labels.

    Args:
        batches: as of `right_answers`.
        logits_fn: as of `right_answers`.

    Returns:
        A judge with outcomes int64 `[n]`, on the CPU.

    Raises:
        TalosValueError: as `right_answers`.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> predictions([torch.eye(2)])(model)
        tensor([0, 1])
    """
    return _judge(batches, logits_fn, lambda logits, batch: logits.argmax(1))


def losses(batches: Iterable[Any], logits_fn: LogitsFunction | None = None) -> Judge:
    """Return a judge of the cross-entropy of each example, in nats.

    Args:
        batches: as of `right_answers`.
        logits_fn: as of `right_answers`.

    Returns:
        A judge with outcomes float32 `[n]`, on the CPU.

    Raises:
        TalosValueError: as `right_answers`.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> losses([(torch.eye(2), torch.tensor([0, 0]))])(model)
        tensor([0.6931, 0.6931])
    """

    def outcomes(logits: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(logits.float(), _labels(logits, batch), reduction="none")

    return _judge(batches, logits_fn, outcomes)


def ask(judge: Judge, module: nn.Module, what: str) -> Tensor:
    """Call a judge in evaluation mode without gradients, and check its outcomes.

    Args:
        judge: the judge.
        module: what it judges; the modes of its modules are restored.
        what: names the judge in errors, "judge of cars".

    Returns:
        A copy of the outcomes `[n]` on the CPU.

    Raises:
        TalosTypeError: the module is none, or the outcomes are no tensor of real numbers.
        TalosValueError: there is no outcome, their shape is not [n], or one is NaN.
        TalosRuntimeError: the judge wrote a weight, as torch counts writes.

    Example:
        >>> ask(lambda module: torch.tensor([True, False]), nn.Linear(1, 1), "judge of cars")
        tensor([ True, False])
    """
    check_module(module)
    before = _versions(module)
    with evaluation_mode(module), torch.no_grad():
        outcomes = judge(module)
    if _versions(module) != before:
        raise TalosRuntimeError(
            f"{what} must only read the model, got one that wrote its weights; load them again"
        )
    if not isinstance(outcomes, Tensor) or outcomes.is_complex():
        got = outcomes.dtype if isinstance(outcomes, Tensor) else type(outcomes).__name__
        raise TalosTypeError(f"{what} must return a tensor of real numbers, got {got}")
    if outcomes.dim() != 1 or not len(outcomes):
        raise TalosValueError(
            f"{what} must return one number for each of at least one example, [n], got shape "
            f"{list(outcomes.shape)}"
        )
    if outcomes.is_floating_point() and bool(outcomes.isnan().any()):
        first = int(outcomes.isnan().nonzero()[0, 0])
        raise TalosValueError(
            f"{what} must return numbers, got NaN for example {first}; look at the example, or "
            "take a smaller coefficient"
        )
    return outcomes.detach().to("cpu", copy=True)


def _versions(module: nn.Module) -> list[int]:
    """Return how often torch wrote each parameter; inference tensors do not count."""
    return [each._version for each in module.parameters() if not each.is_inference()]


def _judge(
    batches: Iterable[Any],
    logits_fn: LogitsFunction | None,
    outcomes: Callable[[Tensor, Any], Tensor],
) -> Judge:
    """Return a judge that maps the logits of each batch, and the batch, to outcomes [B]."""
    if isinstance(batches, Iterator):
        raise TalosValueError(
            "batches must be re-iterable, got an iterator; pass a list or a DataLoader"
        )
    call = logits_fn or default_logits

    def judge(model: nn.Module) -> Tensor:
        check_module(model)
        found = []
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                logits = call(model, batch)
                _check_logits(logits)
                found.append(outcomes(logits, batch))
        if not any(len(each) for each in found):
            raise TalosValueError("batches must yield at least one example, got none")
        return torch.cat(found).cpu()

    return judge


def _check_logits(logits: object) -> None:
    """Refuse what is no logits [B, C], and NaN, which counts as the highest of all."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.shape[1]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TalosValueError(
            f"logits must be [B, C], got {got}; pass logits_fn, for example talos.choice_logits, "
            "or a judge of your own"
        )
    if bool(logits.isnan().any()):
        raise TalosValueError(
            "logits must be numbers, got NaN; look at the batch, or take a smaller coefficient"
        )


def _labels(logits: Tensor, batch: Any) -> Tensor:
    """Return the labels [B] of a batch, on the device of its logits [B, C]."""
    labels = labels_of(batch).to(logits.device)
    if labels.shape != logits.shape[:1]:
        raise TalosValueError(
            f"labels must be [B], one for each example, got {list(labels.shape)} for logits "
            f"{list(logits.shape)}"
        )
    classes = logits.shape[1]
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= classes)).any()):
        got = labels.dtype if labels.is_floating_point() else sorted(set(labels.tolist()))[:5]
        raise TalosValueError(f"labels must be classes from 0 to {classes - 1}, got {got}")
    return labels.long()
