"""Bootstrap intervals of figures, of their means over tasks and of their ratios.

An estimate is a statistic of figures, with its 2.5 % and 97.5 % quantiles over resamples. In a
resample every task's examples are drawn with replacement, the same draw for all models: so
differences between models are paired. A model that was chosen on other examples is
chosen again in each resample (`Picked`). The draws of a task depend on the seed and its name
alone, so other tasks do not change its interval.

A model that answers all n examples of a task right (or wrong) gives the same figure in every
resample. Its accuracy is then drawn as U^(1/n) (or 1 - U^(1/n)), with U uniform in (0, 1) and the
same for all models of the task. The quantiles of these draws are the limits of Clopper and Pearson
(1934): for n = 100 right answers the interval is [96.4 %, 100 %]. Two models that agree on every
example differ by 0, with an interval of no width.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.evaluation.judging import ACCURACY, Metric
from talos.options import integer

__all__ = ["Bootstrap", "Estimate", "Model", "Picked", "Statistic", "over_tasks"]

# Entries of one gather of resampled outcomes, 8 bytes each: 2 MB.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Picked:
    """The outcomes of a model that was chosen, and of those that resamples choose.

    So an interval holds the uncertainty of the choice.

    Attributes:
        taken: `[n]`, of the chosen one.
        tried: `[k, n]`, of all that a resample chooses.
        picks: int64 `[resamples]`: the row of `tried` that each resample chooses.
    """

    taken: Tensor
    tried: Tensor
    picks: Tensor


Model = Tensor | Picked
"""Outcomes `[n]` of a model, or of one that was chosen."""

Statistic = Callable[[Mapping[str, Tensor]], Tensor]
Outcomes = Mapping[str, Model]


class Estimate(TypedDict):
    """A figure with its 95 % interval.

    Attributes:
        value: the figure on all examples.
        low: the lower end of the interval.
        high: its upper end.
        n: the number of examples.
    """

    value: float
    low: float
    high: float
    n: int


class Bootstrap:
    """Estimates of statistics, all over the same resamples.

    Args:
        examples: number of examples of each task.
        resamples: number of resamples.
        seed: of the draws.
        metric: reduces outcomes to figures.
        split: a word for the examples; those of another split are drawn independently.

    Raises:
        TalosValueError: a task has no example, or `resamples` is below 1.

    Example:
        >>> bootstrap = Bootstrap({"a": 4}, resamples=100)
        >>> entry = bootstrap.mean({"a": torch.tensor([True, True, False, True])})
        >>> entry["value"], entry["low"] <= 0.75 <= entry["high"], entry["n"]
        (0.75, True, 4)
    """

    def __init__(
        self,
        examples: Mapping[str, int],
        *,
        resamples: int = 2000,
        seed: int = 0,
        metric: Metric = ACCURACY,
        split: str = "",
    ) -> None:
        self.metric = metric
        self._split = split
        self._resamples = integer("resamples", resamples, 1)
        self._examples = {
            task: integer(f"examples of {task}", n, 1) for task, n in examples.items()
        }
        self._seed = integer("seed", seed, 0)

    def __call__(self, outcomes: Mapping[str, Sequence[Model]], statistic: Statistic) -> Estimate:
        """Estimate a statistic of figures.

        Args:
            outcomes: for each task one `[n]` per model, the same examples in the same order. Or a
                `Picked`.
            statistic: takes for each task the models' figures, float64 `[..., models]`, and
                returns `[...]`.

        Returns:
            The estimate; `n` is the number of examples of all tasks.

        Raises:
            TalosValueError: there is no task, a task is unknown or has another number of outcomes,
                or the metric is not defined for a resample.
        """
        found = self.resampled(outcomes, statistic)
        return _estimate(found, sum(self._examples[task] for task in outcomes))

    def resampled(self, outcomes: Mapping[str, Sequence[Model]], statistic: Statistic) -> Tensor:
        """Return a statistic of figures on all examples, and in each resample.

        Args:
            outcomes: as of a call.
            statistic: takes for each task the models' figures, float64 `[..., models]`, and
                returns `[..., k]`, or `[...]`.

        Returns:
            float64 `[1 + resamples, k]`, or `[1 + resamples]`.

        Raises:
            TalosValueError: as a call.
        """
        self._check(outcomes)
        models = {task: [self._picked(each) for each in own] for task, own in outcomes.items()}
        taken = {task: torch.stack([m.taken.double() for m in own]) for task, own in models.items()}
        whole = {task: self.metric.figures(each)[None] for task, each in taken.items()}
        drawn = {task: self._resampled(task, own) for task, own in models.items()}
        return torch.cat([statistic(whole), statistic(drawn)])

    def over_seeds(self, table: Tensor) -> Estimate:
        """Estimate the mean over seeds of a statistic of all tasks.

        Each resample draws seeds with replacement, too, and examples once for all seeds. Of n
        seeds, the share of the seeds in the variance is too small by the factor (n - 1) / n.

        Args:
            table: float64 `[1 + resamples, seeds]`, as of `resampled`.

        Returns:
            The estimate.

        Raises:
            TalosValueError: the table has another shape.
        """
        if table.dim() != 2 or len(table) != 1 + self._resamples or not table.shape[1]:
            raise TalosValueError(
                f"table must be [{1 + self._resamples}, seeds], as of `resampled`, got "
                f"{list(table.shape)}"
            )
        size = self._resamples, table.shape[1]
        generator = torch.Generator().manual_seed(self._seed)
        drawn = torch.randint(size[1], size, generator=generator, dtype=torch.int64, device="cpu")
        means = torch.cat([table[:1].mean(1), table[1:].gather(1, drawn).mean(1)])
        return _estimate(means, sum(self._examples.values()))

    def table(self, outcomes: Mapping[str, Tensor], statistic: Statistic) -> Tensor:
        """Return a statistic on all examples and in each resample, to choose a model by.

        Args:
            outcomes: `[models, n]` of each task.
            statistic: takes for each task the models' figures, float64 `[..., models]`, and
                returns `[..., k]`.

        Returns:
            float64 `[1 + resamples, k]`.
        """
        self._check(outcomes)
        whole, drawn = {}, {}
        for task, rows in outcomes.items():
            draws = self._draws(task, self._generator(task))
            whole[task] = self.metric.figures(rows)[None]
            parts = [torch.stack([self.metric.figures(row[d]) for row in rows], -1) for d in draws]
            drawn[task] = torch.cat(parts)
        return torch.cat([statistic(whole), statistic(drawn)])

    def mean(self, outcomes: Outcomes) -> Estimate:
        """Estimate a model's mean figure over tasks; of one task, its figure.

        Args:
            outcomes: `[n]` of each task.

        Returns:
            The estimate.
        """
        models = {task: [each] for task, each in outcomes.items()}
        return self(models, lambda figures: over_tasks(figures)[..., 0])

    def gain(self, after: Outcomes, before: Outcomes) -> Estimate:
        """Estimate the mean over tasks of the figure after minus the figure before, paired.

        Args:
            after: `[n]` of each task, of one model.
            before: the same of another model.

        Returns:
            The estimate.
        """
        pairs = {task: [after[task], before[task]] for task in after}
        return self(
            pairs,
            lambda figures: over_tasks({t: f[..., 0] - f[..., 1] for t, f in figures.items()}),
        )

    def normalised(self, merged: Outcomes, single: Outcomes) -> Estimate:
        """Estimate mean_t figure_t(merged) / figure_t(single).

        Args:
            merged: `[n]` of each task, of the merged model.
            single: `[n]` of each task, of the task's own model.

        Returns:
            The estimate.
        """
        pairs = {task: [merged[task], single[task]] for task in merged}
        return self(pairs, lambda figures: self._normalised(figures, 0))

    def normalised_gain(
        self, first: tuple[Outcomes, Outcomes], second: tuple[Outcomes, Outcomes]
    ) -> Estimate:
        """Estimate the difference of two normalised figures, paired.

        Args:
            first: outcomes of a merged model and of the single-task models, as of `normalised`.
            second: those that are subtracted.

        Returns:
            The estimate.
        """
        models = {task: [part[task] for part in (*first, *second)] for task in first[0]}
        return self(models, lambda each: self._normalised(each, 0) - self._normalised(each, 2))

    def _normalised(self, figures: Mapping[str, Tensor], at: int) -> Tensor:
        ratio = self.metric.ratio
        return over_tasks(
            {t: ratio(each[..., at], each[..., at + 1]) for t, each in figures.items()}
        )

    def _check(self, outcomes: Mapping[str, Iterable[Model]]) -> None:
        if not outcomes:
            raise TalosValueError("outcomes must be of at least one task, got none")
        for task, models in outcomes.items():
            if task not in self._examples:
                raise TalosValueError(
                    f"outcomes must be of the tasks {', '.join(self._examples)}, got {task}"
                )
            for each in models:
                shape = each.taken.shape if isinstance(each, Picked) else each.shape
                if shape != (self._examples[task],):
                    raise TalosValueError(
                        f"outcomes of {task} must be [{self._examples[task]}], one for each "
                        f"example, got {list(shape)}"
                    )

    def _picked(self, model: Model) -> Picked:
        if isinstance(model, Picked):
            return model
        once = torch.zeros(self._resamples, dtype=torch.int64, device="cpu")
        return Picked(model, model[None], once)

    def _generator(self, task: str) -> torch.Generator:
        key = f"{self._seed} {self._split} {task}" if self._split else f"{self._seed} {task}"
        digest = hashlib.sha256(key.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _draws(self, task: str, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield int64 [resamples, n] in parts: the places that the resamples draw."""
        count = self._examples[task]
        step = max(1, _CHUNK // count)
        for start in range(0, self._resamples, step):
            size = min(step, self._resamples - start), count
            yield torch.randint(count, size, generator=generator, dtype=torch.int64, device="cpu")

    def _end(self, outcomes: Tensor) -> bool | None:
        """Return whether all answers are right (True) or wrong (False); None: neither."""
        if outcomes.dtype != torch.bool or self.metric.reduce is not ACCURACY.reduce:
            return None
        first = bool(outcomes[0])
        return first if bool((outcomes == first).all()) else None

    def _resampled(self, task: str, models: Sequence[Picked]) -> Tensor:
        """Return the models' figures in each resample, float64 [resamples, models]."""
        generator = self._generator(task)
        rows = [model.tried.double() for model in models]
        parts: list[list[Tensor]] = [[] for _ in models]
        start = 0
        for draw in self._draws(task, generator):
            for model, tried, done in zip(models, rows, parts, strict=True):
                picks = model.picks[start : start + len(draw), None]
                done.append(self.metric.figures(tried[picks, draw]))
            start += len(draw)
        figures = torch.stack([torch.cat(done) for done in parts], dim=-1)
        count = self._resamples
        ranks = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        right = ((ranks.double() + 0.5) / count) ** (1 / self._examples[task])
        for place, model in enumerate(models):
            for row, each in enumerate(model.tried):
                if (end := self._end(each)) is not None:
                    at = model.picks == row
                    figures[at, place] = right[at] if end else 1 - right[at]
        return figures


def over_tasks(figures: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over the tasks."""
    return torch.stack(list(figures.values())).mean(0)


def _estimate(found: Tensor, n: int) -> Estimate:
    """Return the estimate of a statistic on all n examples, found[0], and in each resample."""
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    value, (low, high) = float(found[0]), found[1:].quantile(limits).tolist()
    return {"value": value, "low": min(low, value), "high": max(high, value), "n": n}
