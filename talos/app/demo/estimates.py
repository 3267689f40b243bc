"""Bootstrap intervals of accuracies, of their means and of their ratios.

An estimate is a statistic of the accuracies, with its 2.5 % and 97.5 % quantiles over resamples.
In a resample every task's examples are drawn with replacement, the same draw for all models: so
differences between models are paired.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Estimate", "Estimator", "ratio"]

Estimate = dict[str, float | int]
Statistic = Callable[[Mapping[str, Tensor]], Tensor]


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide accuracies, float64; a resample without a correct answer does not give infinity."""
    return above / below.clamp_min(1e-3)


class Estimator:
    """Estimates of statistics, all over the same resamples.

    Args:
        examples: number of test examples of each task.
        resamples: number of resamples.
        seed: of the draws.

    Example:
        >>> estimator = Estimator({"a": 4}, resamples=100, seed=0)
        >>> entry = estimator({"a": [torch.tensor([True, True, False, True])]},
        ...                   lambda accuracies: accuracies["a"][..., 0])
        >>> entry["value"], entry["low"] <= 0.75 <= entry["high"], entry["n"]
        (0.75, True, 4)
    """

    def __init__(self, examples: Mapping[str, int], *, resamples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._draws = {
            task: torch.randint(
                count, (resamples, count), generator=generator, dtype=torch.int64, device="cpu"
            )
            for task, count in examples.items()
        }

    def __call__(self, correct: Mapping[str, Sequence[Tensor]], statistic: Statistic) -> Estimate:
        """Estimate a statistic of accuracies.

        Args:
            correct: for each task one bool [n] per model: is the answer to an example correct?
            statistic: takes for each task the models' accuracies, float64 [..., models], and
                returns [...].

        Returns:
            `value`, `low`, `high` and `n`, the number of examples of all tasks.
        """
        outcomes = {task: torch.stack(list(each)).double() for task, each in correct.items()}
        value = statistic({task: each.mean(1) for task, each in outcomes.items()})
        resampled = statistic(
            {
                task: torch.stack([row[self._draws[task]].mean(1) for row in each], dim=-1)
                for task, each in outcomes.items()
            }
        )
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
        low, high = resampled.quantile(ends).tolist()
        count = sum(each.shape[1] for each in outcomes.values())
        return {"value": float(value), "low": low, "high": high, "n": count}

    def accuracy(self, task: str, correct: Tensor) -> Estimate:
        """Estimate one model's accuracy on a task from its correct answers, bool [n]."""
        return self({task: [correct]}, lambda accuracies: accuracies[task][..., 0])

    def gain(self, task: str, after: Tensor, before: Tensor) -> Estimate:
        """Estimate `after` minus `before`, the accuracies of two models on one task."""
        return self({task: [after, before]}, lambda each: each[task][..., 0] - each[task][..., 1])

    def mean(self, correct: Mapping[str, Tensor]) -> Estimate:
        """Estimate one model's mean accuracy over tasks."""
        return self({task: [each] for task, each in correct.items()}, _mean)

    def normalised(self, merged: Mapping[str, Tensor], single: Mapping[str, Tensor]) -> Estimate:
        """Estimate mean_t acc_t(merged) / acc_t(single).

        Args:
            merged: bool [n] of each task, of the merged model.
            single: bool [n] of each task, of the task's own model.
        """
        pairs = {task: [merged[task], single[task]] for task in merged}
        return self(pairs, lambda accuracies: _normalised(accuracies, 0))

    def difference(
        self,
        first: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        second: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> Estimate:
        """Estimate the difference of two normalised accuracies, each of (merged, single)."""
        models = {task: [part[task] for part in (*first, *second)] for task in first[0]}
        return self(models, lambda each: _normalised(each, 0) - _normalised(each, 2))


def _mean(accuracies: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([each[..., 0] for each in accuracies.values()]).mean(0)


def _normalised(accuracies: Mapping[str, Tensor], at: int) -> Tensor:
    ratios = [ratio(each[..., at], each[..., at + 1]) for each in accuracies.values()]
    return torch.stack(ratios).mean(0)
