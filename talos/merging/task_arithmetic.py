"""Task arithmetic and the mean: sums of scaled vectors.

    tau = sum_t c_t tau_t                       task arithmetic
    tau = sum_t (c_t / T) tau_t                 mean of T vectors

The same sum as `TaskVector.combine`. Source: Ilharco et al. 2023, arXiv 2212.04089; the mean of
the tuned weights is that of Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
"""

from dataclasses import dataclass

from talos.merging.base import Merge

__all__ = ["Mean", "TaskArithmetic"]


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Merge):
    """The sum.

    Example:
        >>> TaskArithmetic(scaling_coef=0.4).settings()
        {'method': 'task_arithmetic', 'scaling_coef': 0.4}
    """

    name = "task_arithmetic"
    adds = True


@dataclass(frozen=True, kw_only=True)
class Mean(Merge):
    """The sum divided by the number of vectors, at each entry, selected by all of them or not.

    Example:
        >>> Mean().settings()
        {'method': 'mean', 'scaling_coef': 1.0}
    """

    name = "mean"
    adds = True
    averages = True

    def _scale(self, count: int) -> float:
        return self.scaling_coef / count
