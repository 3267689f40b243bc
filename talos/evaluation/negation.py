"""Negation: make a model forget one task and keep its others.

    theta = theta_0 - coef * tau_target
    coef  = the one with the worst target figure among those that keep the control:
            control(theta) >= control_share * control(theta_0)         (a higher figure is better)
            control(theta) <= control(theta_0) / control_share         (a lower one is better)

on validation examples, as the mean of the best ones of resamples (`coefficients.choose`). The
control is the mean of the control tasks. The coefficient 0 always keeps it, so it is always tried;
if it is chosen, `why_zero` says why no other one helps. The model is evaluated on test examples: at
the chosen coefficient, and for the intervals at those that resamples of the validation examples
choose.

Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089, section 3.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation.coefficients import checked_coefs, choose, scaling_coefs, why_zero
from talos.evaluation.intervals import Estimate, Picked, over_tasks
from talos.evaluation.outcomes import Outcomes
from talos.options import fraction
from talos.task_vectors import TaskVector

__all__ = ["Negation", "NegationPoint", "negation"]

# After so many points in a row that break the control, no larger coefficient is tried.
_GIVE_UP = 4


@dataclass(frozen=True)
class NegationPoint:
    """The model at one coefficient, on validation examples.

    Attributes:
        scaling_coef: the coefficient, which is subtracted.
        target: the figure of the task to forget; None: not evaluated, because the control breaks.
        control: the mean figure of the control tasks.
    """

    scaling_coef: float
    target: float | None
    control: float


@dataclass(frozen=True)
class Negation:
    """What negation found.

    Attributes:
        grid: a point for each coefficient that was tried, on validation examples.
        scaling_coef: the coefficient that was chosen; 0: no other one helps.
        why_zero: why no other one helps, and how near they came; None: it is not 0.
        target: the figure of the task to forget on test examples.
        control: the mean figure of the control tasks on test examples.
        target_zero_shot: `target` of the pretrained model.
        control_zero_shot: `control` of the pretrained model.
        picked: the outcomes of the target and of each control task on test examples.
    """

    grid: list[NegationPoint] = field(repr=False)
    scaling_coef: float
    why_zero: str | None
    target: Estimate
    control: Estimate
    target_zero_shot: Estimate
    control_zero_shot: Estimate
    picked: dict[str, Picked] = field(repr=False)


def negation(
    outcomes: Outcomes,
    vector: TaskVector,
    target: str,
    *,
    control: Iterable[str] | None = None,
    control_share: float = 0.95,
    coefs: Iterable[float] | None = None,
    on_point: Callable[[NegationPoint], object] | None = None,
) -> Negation:
    """Subtract a task's vector as far as the control allows.

    The control is evaluated first; where it breaks, the target is not evaluated. After four such
    points in a row no larger coefficient is tried.

    Args:
        outcomes: of the model, with judges of validation and test examples.
        vector: the vector of the task to forget.
        target: the task to forget.
        control: the tasks to keep; None: all others.
        control_share: share of the pretrained model's control figure that must be kept, in (0, 1].
        coefs: the coefficients to try, at least 0; None: 0, 0.05, ..., 1.
        on_point: called after each coefficient that was tried.

    Returns:
        The grid, the coefficient, and the estimates on test examples.

    Raises:
        TalosValueError: the target has no judge or is a control, there is no control, its figure is
            negative, a coefficient is negative, or the vector does not fit the model.
        TalosTypeError: `control` or `coefs` cannot be listed.

    Example:
        >>> import torch
        >>> from talos import Mask
        >>> from talos.evaluation import right_answers
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> judges = {
        ...     task: right_answers([(torch.eye(2)[[i]], torch.tensor([i]))])
        ...     for i, task in enumerate(("left", "right"))
        ... }
        >>> mask = Mask.from_dense({"weight": torch.tensor([[False, False], [True, False]])})
        >>> vector = TaskVector(mask, torch.tensor([-4.0]))
        >>> forgot = negation(Outcomes(model, judges, judges), vector, "left")
        >>> forgot.scaling_coef, forgot.target["value"], forgot.control["value"]
        (0.65, 0.0, 1.0)
    """
    others = _controls(outcomes, target, control)
    control_share = fraction("control_share", control_share)
    numbers = sorted({0.0, *(scaling_coefs() if coefs is None else checked_coefs(coefs))})
    if numbers[0] < 0:
        raise TalosValueError(f"coefs must be at least 0, got {numbers[0]}; they are subtracted")
    higher = outcomes.metric.better == "higher"
    pretrained = _mean(outcomes, None, 0.0, others)
    if pretrained < 0:
        raise TalosValueError(
            f"the control's figure must be at least 0, got {pretrained:g}, of which no share can "
            "be kept; take a metric such as an accuracy or a perplexity"
        )
    grid: list[NegationPoint] = []
    controls: list[dict[str, Tensor]] = []
    broken = 0
    share = control_share if higher else 1 / control_share
    with outcomes.resident(vector):
        for coef in numbers:
            reached = None
            controls.append(outcomes.of("control", vector, -coef, others))
            figure = _mean(outcomes, vector, -coef, others)
            if figure >= share * pretrained if higher else figure <= share * pretrained:
                found = outcomes.of("validation", vector, -coef, [target])
                reached = outcomes.metric.figure(found[target])
            broken = broken + 1 if reached is None else 0
            grid.append(NegationPoint(coef, reached, figure))
            if on_point is not None:
                on_point(grid[-1])
            if broken == _GIVE_UP:
                break
        kept = outcomes.table("control", controls, over_tasks)
        floor = share * kept[:, :1]  # the first coefficient is 0
        kept = kept >= floor if higher else kept <= floor
        as_found = [point.target is not None for point in grid]
        kept[0] = torch.tensor(as_found, dtype=torch.bool, device="cpu")
        some = kept.any(0).nonzero()[:, 0].tolist()  # in a resample another one may keep it
        tried = [grid[i].scaling_coef for i in some]
        targets = [outcomes.of("validation", vector, -coef, [target]) for coef in tried]
        table = outcomes.table("validation", targets, over_tasks)
        places = choose(tried, table, highest=not higher, kept=kept[:, some])
        test = outcomes.picked(vector, [-coef for coef in tried], places, [target, *others])
    chosen = tried[int(places[0])]
    before = outcomes.of("test", tasks=[target, *others])
    mean = outcomes.bootstrap.mean
    return Negation(
        grid=grid,
        scaling_coef=chosen,
        why_zero=_why_zero(grid, control_share, higher) if chosen == 0 else None,
        target=mean({target: test[target]}),
        control=mean({task: test[task] for task in others}),
        target_zero_shot=mean({target: before[target]}),
        control_zero_shot=mean({task: before[task] for task in others}),
        picked=test,
    )


def _why_zero(grid: Sequence[NegationPoint], share: float, higher: bool) -> str | None:
    """Say which condition no coefficient meets."""
    kept = [(point.scaling_coef, point.target) for point in grid if point.target is not None]
    coefs, figures = zip(*kept, strict=True)
    place = coefs.index(0)
    keeps, change = f"keeps {100 * share:g} % of the control", "lowers" if higher else "raises"
    broken = [point for point in grid if point.target is None]
    if not broken:
        fails = f"{change} the target's figure"
        return why_zero(coefs, figures, place, highest=not higher, fails=fails)
    near = max(broken, key=lambda point: point.control if higher else -point.control)
    came = f"with {near.control:.4g} beside {grid[0].control:.4g}"
    if len(kept) == 1:
        return f"no coefficient but 0 {keeps}: {near.scaling_coef:g} comes nearest, {came}"
    fails = f"that {keeps} {change} the target's figure"
    reason = why_zero(coefs, figures, place, highest=not higher, fails=fails)
    return f"{reason}; of the others {near.scaling_coef:g} keeps most of the control, {came}"


def _controls(outcomes: Outcomes, target: str, control: Iterable[str] | None) -> list[str]:
    if target not in outcomes.tasks:
        raise TalosValueError(
            f"target must be one of the judged tasks {', '.join(outcomes.tasks)}, got {target}"
        )
    if isinstance(control, str):
        raise TalosTypeError(f"control must be a list of tasks, got {control!r}; put it in a list")
    others = [t for t in outcomes.tasks if t != target] if control is None else list(control)
    if not others or target in others:
        raise TalosValueError(
            f"control must name at least one task other than the target {target}, got "
            f"{', '.join(others) or 'none'}; give a judge of another task"
        )
    return others


def _mean(
    outcomes: Outcomes, vector: TaskVector | None, coef: float, tasks: Iterable[str]
) -> float:
    figures = outcomes.figures(outcomes.of("control", vector, coef, tasks))
    return sum(figures.values()) / len(figures)
