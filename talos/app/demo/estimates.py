"""Bootstrap intervals of accuracies, their means and their ratios, paired over the same examples.

estimate: statistic(mean over the examples), and its 2.5 % and 97.5 % quantiles over resamples
in which every task's examples are drawn with replacement, the same draw for all models.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Estimate", "Estimator", "ratio"]

Estimate = dict[str, float | int]
Statistic = Callable[[Mapping[str, Tensor]], Tensor]


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divides accuracies; a resample without one correct answer must not end in infinity.

    Args:
        above: float64 accuracies.
        below: float64 accuracies of the same shape.

    Returns:
        float64, of the same shape.
    """
    return above / below.clamp_min(1e-3)


class Estimator:
    """Draws the same resamples for every statistic.

    Args:
        examples: number of test examples of each task.
        resamples: how many to draw.
        seed: the seed.

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
        """Estimates a statistic of accuracies.

        Args:
            correct: for each task the models' bool [n], right or wrong on its n examples.
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
        """Estimates one model's accuracy on one task.

        Args:
            task: the task.
            correct: bool [n].

        Returns:
            The estimate.
        """
        return self({task: [correct]}, lambda accuracies: accuracies[task][..., 0])

    def gain(self, task: str, after: Tensor, before: Tensor) -> Estimate:
        """Estimates by how much one model is better than another on the same examples.

        Args:
            task: the task.
            after: bool [n] of the one.
            before: bool [n] of the other.

        Returns:
            The estimate of after minus before.
        """
        return self({task: [after, before]}, lambda each: each[task][..., 0] - each[task][..., 1])

    def mean(self, correct: Mapping[str, Tensor]) -> Estimate:
        """Estimates one model's mean accuracy over tasks.

        Args:
            correct: bool [n] of each task.

        Returns:
            The estimate.
        """
        return self({task: [each] for task, each in correct.items()}, _mean)

    def normalised(self, merged: Mapping[str, Tensor], single: Mapping[str, Tensor]) -> Estimate:
        """Estimates mean_t acc_t(merged) / acc_t(single).

        Args:
            merged: bool [n] of each task, of the merged model.
            single: bool [n] of each task, of the task's own model.

        Returns:
            The estimate.
        """
        pairs = {task: [merged[task], single[task]] for task in merged}
        return self(pairs, lambda accuracies: _normalised(accuracies, 0))

    def difference(
        self,
        first: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        second: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> Estimate:
        """Estimates the difference of two methods' normalised accuracies on the same examples.

        Args:
            first: merged and single, as `normalised` takes them.
            second: the same of the other method.

        Returns:
            The estimate of first minus second.
        """
        models = {task: [part[task] for part in (*first, *second)] for task in first[0]}
        return self(models, lambda each: _normalised(each, 0) - _normalised(each, 2))


def _mean(accuracies: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([each[..., 0] for each in accuracies.values()]).mean(0)


def _normalised(accuracies: Mapping[str, Tensor], at: int) -> Tensor:
    ratios = [ratio(each[..., at], each[..., at + 1]) for each in accuracies.values()]
    return torch.stack(ratios).mean(0)
