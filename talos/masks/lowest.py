"""The k lowest or largest scores over named tensors."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from torch import Tensor

from talos_kernels import select_threshold

__all__ = ["lowest_entries"]


def lowest_entries(
    scores: Mapping[str, Tensor],
    k: int,
    among: Mapping[str, Tensor] | None = None,
    *,
    largest: bool = False,
    all_ties: bool = False,
) -> dict[str, Tensor]:
    """Select the k entries with the lowest or largest scores.

    Args:
        scores: not negative, any shapes, one device, dtypes that `select_threshold` takes. Entries
            that may not be selected are inf, or -inf if `largest`.
        k: how many, at most the number of entries that may be selected.
        among: bool, shaped as the scores: the entries to choose from. The scores of the others are
            overwritten with that infinity, which saves a second list of scores.
        largest: select the largest.
        all_ties: select all entries equal to the k-th, so that there may be more than `k`.

    Returns:
        bool tensors shaped as the scores, exactly k of them True; equal scores are taken in
        (tensor, flat position) order.

    Raises:
        TalosValueError: a score is NaN, negative or the other infinity; `k` does not fit.
        TalosTypeError: a dtype is not supported.

    Example:
        >>> import torch
        >>> scores = {"w": torch.tensor([1.0, 0.0, 1.0, 1.0])}
        >>> lowest_entries(scores, 2)["w"]
        tensor([ True,  True, False, False])
        >>> lowest_entries(scores, 2, all_ties=True)["w"]
        tensor([True, True, True, True])
    """
    if among is not None:
        for name, score in scores.items():
            score.masked_fill_(~among[name], -inf if largest else inf)
    threshold = select_threshold(list(scores.values()), k, largest, names=list(scores))
    if all_ties and k:
        threshold = replace(threshold, ties=None)
    return {name: threshold.select(i, score) for i, (name, score) in enumerate(scores.items())}
