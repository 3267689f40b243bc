"""Sensitivity transfer: do other tasks need the entries that one task does not?

The least sensitive entries of task i are pruned: these weights become 0. Then task j is judged:

    transfer_ij = figure_j(theta_0, the entries of i at 0) / figure_j(theta_0)

1 everywhere: the entries that matter little to one task matter little to all.

Source: Iurada et al. 2025, arXiv 2504.02620, section 4.1 (figure 1), with a tenth of the entries.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation.interference import interference
from talos.evaluation.intervals import Estimate
from talos.evaluation.outcomes import Outcomes
from talos.masks import Mask
from talos.task_vectors import TaskVector
from talos.task_vectors.editing import touched_weights

__all__ = ["sensitivity_transfer"]


def sensitivity_transfer(
    outcomes: Outcomes,
    least: Mapping[str, Mask | Mapping[str, Tensor]],
    *,
    density: float = 0.1,
) -> dict[str, dict[str, Estimate]]:
    """Prune each task's least sensitive entries, and judge every task.

    The pruned weights are exactly 0, and are afterwards bit for bit as before.

    Args:
        outcomes: of the model, with judges of test examples.
        least: for each task a mask of its least sensitive entries, or its scores from
            `talos.fisher_diag`.
        density: fraction of the scored entries to prune, where scores are given.

    Returns:
        `[i][j]`: the ratio of task j's figure without the entries of task i to that of the
        pretrained model, paired. i goes over `least`, j over all judged tasks.

    Raises:
        TalosValueError: there is no task, a mask does not fit the model, or `density` is out of
            range.
        TalosTypeError: a pruned weight is float64.

    Example:
        >>> from talos import fisher_diag
        >>> from talos.evaluation import right_answers
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> scores = fisher_diag(model, data, params="weight")
        >>> outcomes = Outcomes(model, {"a": right_answers(data)})
        >>> sorted(sensitivity_transfer(outcomes, {"a": scores})["a"])
        ['a']
    """
    if not least:
        raise TalosValueError("least must hold the mask or scores of at least one task, got none")
    masks = {
        task: each if isinstance(each, Mask) else Mask.from_scores(each, density)
        for task, each in least.items()
    }
    pruning = {task: _minus_weights(outcomes.edited, mask) for task, mask in masks.items()}
    return interference(outcomes, pruning)


def _minus_weights(model: nn.Module, mask: Mask) -> TaskVector:
    """Return the vector that makes the selected weights 0: w + (-w) is exactly 0.

    Raises:
        TalosTypeError: a weight is float64, which the vector's float32 values do not hold exactly.
    """
    values = [torch.empty(0, dtype=torch.float32, device="cpu")]
    for name, weight in touched_weights(model, mask).items():
        if weight.dtype == torch.float64:
            raise TalosTypeError(
                f"model must be float32, bfloat16 or float16 to be pruned, got {name} of "
                "torch.float64; convert it"
            )
        where = mask.indices[name].positions_int64().to(weight.device)
        values.append(-weight.detach().reshape(-1)[where].float().cpu())
    return TaskVector(mask, torch.cat(values))
