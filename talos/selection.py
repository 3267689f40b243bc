"""The k lowest scores over a list of tensors, exactly k, ties in (tensor, position) order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["lowest_entries"]


def lowest_entries(
    scores: Mapping[str, Tensor], k: int, among: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Select the k entries with the lowest scores.

    Args:
        scores: finite, any shapes and floating-point dtypes, one device.
        k: how many, at most the number of True in `among`.
        among: bool, shaped as the scores: the entries to choose from.

    Returns:
        bool tensors shaped as the scores, exactly k True in all; equal scores are taken in
        (tensor, flat position) order.

    Example:
        >>> scores = {"w": torch.tensor([1.0, 0.0, 1.0, 1.0])}
        >>> lowest_entries(scores, 2, {"w": torch.ones(4) > 0})["w"]
        tensor([ True,  True, False, False])
    """
    if k == 0:
        return {name: torch.zeros_like(choice) for name, choice in among.items()}
    candidates = torch.cat([score[among[name]] for name, score in scores.items()])
    scores = {name: score.to(candidates.dtype) for name, score in scores.items()}
    threshold = candidates.kthvalue(k).values
    ties = k - int((candidates < threshold).count_nonzero())
    chosen = {}
    for name, score in scores.items():
        below = (score < threshold) & among[name]
        equal = ((score == threshold) & among[name]).flatten().nonzero()[:ties, 0]
        below.view(-1)[equal] = True
        ties -= equal.numel()
        chosen[name] = below
    return chosen
