"""Linearity: is an edited model still the first-order expansion of its base?

    f_lin(x; theta) = f(x; theta_0) + J_theta0(x) (theta - theta_0),   theta = theta_0 + coef tau

Both are judged at the same tuned weights. Where they agree, training stayed in the linear regime,
in which task vectors add up.

Source: Iurada et al. 2025, arXiv 2504.02620, appendix A.4 (figure 6); the expansion of a trained
model is from Ortiz-Jimenez et al. 2023, arXiv 2305.12827, section 4.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation.intervals import Estimate
from talos.evaluation.outcomes import Outcomes, checked_vectors
from talos.methods import LinearizedModel, LogitsFunction
from talos.names import named_parameters
from talos.task_vectors import TaskVector
from talos.task_vectors.editing import touched_weights
from talos.tensors import place

__all__ = ["Linearity", "linearity"]


@dataclass(frozen=True)
class Linearity:
    """One task's tuned model beside its expansion.

    Attributes:
        tuned: the figure of f at the tuned weights.
        expansion: the figure of f_lin at the same weights.
        gain: `expansion` minus `tuned`, paired.
        equal: the share of examples with equal outcomes; of equal predictions, if the judges
            return predictions. None: the outcomes are floating-point numbers.
        outcomes: those of f and those of f_lin, `[n]` each, on the CPU.
    """

    tuned: Estimate
    expansion: Estimate
    gain: Estimate
    equal: float | None
    outcomes: tuple[Tensor, Tensor] = field(repr=False)


def linearity(
    outcomes: Outcomes,
    vectors: Mapping[str, TaskVector],
    *,
    coef: float = 1.0,
    logits_fn: LogitsFunction | None = None,
) -> dict[str, Linearity]:
    """Judge each task's tuned model, and its first-order expansion at the same weights.

    In memory are copies of the weights that the vectors touch, and the difference of all weights.

    Args:
        outcomes: of the model, with judges of test examples. They are called with a
            `talos.methods.LinearizedModel`, too, which returns the logits themselves, a tensor.
            `talos.batches.default_logits(model, batch)` returns the logits of both.
        vectors: the vector of each task.
        coef: the scaling coefficient.
        logits_fn: `logits_fn(module, batch)`, the function to expand; None: the model is called as
            `talos.fine_tune` calls it.

    Returns:
        Both figures of each task.

    Raises:
        TalosValueError: a vector does not fit the model or touches a weight that requires no
            gradient, or a module is wrapped.
        TalosTypeError: a judge fails on the expansion, because it reads `.logits` of its output or
            passes more than one batch.

    Example:
        >>> import torch
        >>> from talos import Mask
        >>> from talos.evaluation import right_answers
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> judges = {"a": right_answers([(torch.eye(2), torch.tensor([0, 0]))])}
        >>> mask = Mask.from_dense({"0.weight": torch.eye(2) > 0})
        >>> vectors = {"a": TaskVector(mask, torch.full((2,), 1e-4))}
        >>> found = linearity(Outcomes(model, judges), vectors)["a"]
        >>> found.tuned["value"] == found.expansion["value"], found.equal
        (True, 1.0)
    """
    copies: dict[Hashable, Tensor] = {}
    for task, vector in checked_vectors(vectors).items():
        for name, weight in touched_weights(outcomes.edited, vector.mask).items():
            if not weight.requires_grad:
                raise TalosValueError(
                    f"model must have requires_grad=True where it is edited, got {name} without, "
                    f"which the vector of {task} touches; call requires_grad_() on it"
                )
            if place(weight) not in copies:
                copies[place(weight)] = weight.detach().clone()
    linear = outcomes.through(
        {task: _expansion(each, copies, logits_fn) for task, each in outcomes.modules.items()}
    )
    found = {}
    for task, vector in vectors.items():
        tuned = outcomes.of("test", vector, coef, [task])
        expanded = _judged(linear, vector, coef, task)
        bootstrap = outcomes.bootstrap
        counted = not (tuned[task].is_floating_point() or expanded[task].is_floating_point())
        found[task] = Linearity(
            tuned=bootstrap.mean(tuned),
            expansion=bootstrap.mean(expanded),
            gain=bootstrap.gain(expanded, tuned),
            equal=float((tuned[task] == expanded[task]).double().mean()) if counted else None,
            outcomes=(tuned[task], expanded[task]),
        )
    return found


def _judged(linear: Outcomes, vector: TaskVector, coef: float, task: str) -> dict[str, Tensor]:
    try:
        return linear.of("test", vector, coef, [task])
    except (AttributeError, TypeError) as error:
        raise TalosTypeError(
            f"judge of {task} must work with the first-order expansion, too, whose call "
            f"model(batch) returns logits, a tensor, got {type(error).__name__}: {error}; take the "
            "logits from talos.batches.default_logits(model, batch), which works with both"
        ) from error


def _expansion(
    model: nn.Module, copies: Mapping[Hashable, Tensor], logits_fn: LogitsFunction | None
) -> LinearizedModel:
    """Return the expansion of a model around its present weights; only the copied ones may move."""
    params = named_parameters(model)
    base = {name: copies.get(place(param), param.detach()) for name, param in params.items()}
    return LinearizedModel(model, logits_fn, base=base)
