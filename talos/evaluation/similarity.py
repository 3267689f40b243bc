"""Similarity of masks: how far the entries that tasks train are the same ones.

    IoU(a, b) = |a and b| / |a or b|

Two random masks of densities d and e over the same tensors have an IoU of about
d e / (d + e - d e): .053 at a tenth each. Task vectors whose masks overlap write to the same
entries; masks of the least sensitive entries overlap because unrelated tasks find the same entries
unimportant.

Source: Iurada et al. 2025, arXiv 2504.02620, appendix A.7 (figure 11).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.masks import Mask

__all__ = ["MaskSimilarity", "mask_similarity"]


@dataclass(frozen=True)
class MaskSimilarity:
    """The overlap of every pair of masks.

    Attributes:
        tasks: the order of rows and columns.
        iou: float64 `[tasks, tasks]`, symmetric, 1 on the diagonal.
        by_chance: float64 `[tasks, tasks]`, what random masks of the same densities would have.
    """

    tasks: tuple[str, ...]
    iou: Tensor
    by_chance: Tensor


def mask_similarity(masks: Mapping[str, Mask]) -> MaskSimilarity:
    """Compare masks pair by pair, in their compressed form.

    Args:
        masks: by task.

    Raises:
        TalosValueError: there is no mask, or two differ in the shape of a tensor.

    Example:
        >>> left = Mask.from_dense({"w": torch.tensor([True, True, False, False])})
        >>> right = Mask.from_dense({"w": torch.tensor([False, True, True, False])})
        >>> found = mask_similarity({"a": left, "b": right})
        >>> found.iou[0, 1].item(), found.by_chance[0, 1].item()
        (0.3333333333333333, 0.3333333333333333)
    """
    if not masks:
        raise TalosValueError("masks must hold at least one mask, got none")
    tasks = tuple(masks)
    iou, by_chance = (torch.eye(len(tasks), dtype=torch.float64, device="cpu") for _ in range(2))
    for i, j in combinations(range(len(tasks)), 2):
        one, other = masks[tasks[i]], masks[tasks[j]]
        iou[i, j] = iou[j, i] = one.iou(other)
        both = one.density * other.density
        either = one.density + other.density - both
        by_chance[i, j] = by_chance[j, i] = both / either if either else 1.0
    return MaskSimilarity(tasks, iou, by_chance)
