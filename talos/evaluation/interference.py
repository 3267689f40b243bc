"""Interference: what the vector of one task does to another.

    interference_ij = figure_j(theta_0 + tau_i) / figure_j(theta_0)

1 off the diagonal: task i's vector leaves task j alone.
"""

from collections.abc import Mapping

from talos.evaluation.intervals import Estimate
from talos.evaluation.outcomes import Outcomes, checked_vectors
from talos.task_vectors import TaskVector

__all__ = ["interference"]


def interference(
    outcomes: Outcomes, vectors: Mapping[str, TaskVector]
) -> dict[str, dict[str, Estimate]]:
    """Evaluate each task's vector on the test examples of every task.

    Args:
        outcomes: of the model, with judges of test examples.
        vectors: the vector of each task.

    Returns:
        `[i][j]`: the ratio of task j's figure with task i's vector to that of the pretrained model,
        paired. i goes over the vectors, j over all judged tasks.

    Raises:
        TalosValueError: a vector does not fit the model.

    Example:
        >>> import torch
        >>> from talos import Mask
        >>> from talos.evaluation import right_answers
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> judges = {"left": right_answers([(torch.eye(2), torch.tensor([0, 0]))])}
        >>> mask = Mask.from_dense({"weight": torch.tensor([[False, True], [False, False]])})
        >>> vectors = {"left": TaskVector(mask, torch.tensor([4.0]))}
        >>> matrix = interference(Outcomes(model, judges), vectors)
        >>> matrix["left"]["left"]["value"]
        2.0
    """
    before = outcomes.of("test")
    matrix = {}
    for name, vector in checked_vectors(vectors).items():
        after = outcomes.of("test", vector)
        matrix[name] = {
            task: outcomes.bootstrap.normalised({task: each}, {task: before[task]})
            for task, each in after.items()
        }
    return matrix
