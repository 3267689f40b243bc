"""Bootstrap intervals of figures, of their means over tasks and of their ratios.

An estimate is a statistic of figures, with its 2.5 % and 97.5 % quantiles over resamples. In a
resample every task's examples are drawn with replacement, the same draw for all models: so
differences between models are paired. The draws of a task depend on the seed and its name alone, so
other tasks do not change its interval.

A model that answers all n examples of a task right (or wrong) gives the same figure in every
resample. Its accuracy is then drawn as U^(1/n) (or 1 - U^(1/n)), with U uniform in (0, 1) and the
same for all models of the task. The quantiles of these draws are the limits of Clopper and Pearson
(1934): for n = 100 right answers the interval is [96.4 %, 100 %]. Two models that agree on every
example differ by 0, with an interval of no width.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.evaluation.judging import ACCURACY, Metric
from talos.options import integer

__all__ = ["Bootstrap", "Estimate"]

# Entries of one gather of resampled outcomes, 8 bytes each: 2 MB.
_CHUNK = 1 << 18

Statistic = Callable[[Mapping[str, Tensor]], Tensor]
Outcomes = Mapping[str, Tensor]


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
    ) -> None:
        self.metric = metric
        self._resamples = integer("resamples", resamples, 1)
        self._examples = {
            task: integer(f"examples of {task}", n, 1) for task, n in examples.items()
        }
        self._seed = integer("seed", seed, 0)

    def __call__(self, outcomes: Mapping[str, Sequence[Tensor]], statistic: Statistic) -> Estimate:
        """Estimate a statistic of figures.

        Args:
            outcomes: for each task one `[n]` per model, the same examples in the same order.
            statistic: takes for each task the models' figures, float64 `[..., models]`, and
                returns `[...]`.

        Returns:
            The estimate; `n` is the number of examples of all tasks.

        Raises:
            TalosValueError: there is no task, a task is unknown or has another number of outcomes,
                or the metric is not defined for a resample.
        """
        self._check(outcomes)
        rows = {
            task: torch.stack([each.double() for each in models])
            for task, models in outcomes.items()
        }
        value = float(statistic({task: self.metric.figures(each) for task, each in rows.items()}))
        ends = {task: [self._end(each) for each in models] for task, models in outcomes.items()}
        resampled = statistic(
            {task: self._resampled(task, rows[task], ends[task]) for task in rows}
        )
        limits = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
        low, high = resampled.quantile(limits).tolist()
        if any(end is not None for each in ends.values() for end in each):
            low, high = min(low, value), max(high, value)
        return {
            "value": value,
            "low": low,
            "high": high,
            "n": sum(self._examples[task] for task in rows),
        }

    def mean(self, outcomes: Outcomes) -> Estimate:
        """Estimate a model's mean figure over tasks; of one task, its figure.

        Args:
            outcomes: `[n]` of each task.

        Returns:
            The estimate.
        """
        return self({task: [each] for task, each in outcomes.items()}, _mean)

    def gain(self, after: Outcomes, before: Outcomes) -> Estimate:
        """Estimate the mean over tasks of the figure after minus the figure before, paired.

        Args:
            after: `[n]` of each task, of one model.
            before: the same of another model.

        Returns:
            The estimate.
        """
        pairs = {task: [after[task], before[task]] for task in after}
        return self(pairs, lambda each: _over_tasks(f[..., 0] - f[..., 1] for f in each.values()))

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
        return _over_tasks(
            self.metric.ratio(each[..., at], each[..., at + 1]) for each in figures.values()
        )

    def _check(self, outcomes: Mapping[str, Sequence[Tensor]]) -> None:
        if not outcomes:
            raise TalosValueError("outcomes must be of at least one task, got none")
        for task, models in outcomes.items():
            if task not in self._examples:
                raise TalosValueError(
                    f"outcomes must be of the tasks {', '.join(self._examples)}, got {task}"
                )
            for each in models:
                if each.shape != (self._examples[task],):
                    raise TalosValueError(
                        f"outcomes of {task} must be [{self._examples[task]}], one for each "
                        f"example, got {list(each.shape)}"
                    )

    def _generator(self, task: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {task}".encode()).digest()
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

    def _resampled(self, task: str, rows: Tensor, ends: Sequence[bool | None]) -> Tensor:
        """Return the models' figures in each resample, float64 [resamples, models].

        Args:
            task: the task.
            rows: float64 [models, n].
            ends: for each model whether all its answers are right or wrong.
        """
        generator = self._generator(task)
        parts = [
            torch.stack([self.metric.figures(row[part]) for row in rows], dim=-1)
            for part in self._draws(task, generator)
        ]
        figures = torch.cat(parts)
        count = self._resamples
        ranks = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        right = ((ranks + 0.5) / count) ** (1 / self._examples[task])
        for place, end in enumerate(ends):
            if end is not None:
                figures[:, place] = right if end else 1 - right
        return figures


def _mean(figures: Mapping[str, Tensor]) -> Tensor:
    return _over_tasks(each[..., 0] for each in figures.values())


def _over_tasks(figures: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(figures)).mean(0)
