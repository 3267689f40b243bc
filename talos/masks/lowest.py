"""The k lowest or largest scores over named tensors."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from talos.distributed import as_part, local, sharding, whole
from talos.errors import TalosTypeError, TalosValueError
from talos_kernels import select_threshold

__all__ = ["lowest_entries", "marked_scores", "warn_if_equal"]


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
            that may not be selected are inf, or -inf if `largest`. Or all of them are sharded by
            rows over the same ranks, which all call this.
        k: how many, at most the number of entries that may be selected.
        among: bool, shaped as the scores: the entries to choose from. The scores of the others are
            overwritten with that infinity, which saves a second list of scores.
        largest: select the largest.
        all_ties: select all entries equal to the k-th, so that there may be more than `k`.

    Returns:
        bool tensors shaped and sharded as the scores, exactly k of them True; equal scores are
        taken in (tensor, flat position) order.

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
    parts = {name: local(score) for name, score in scores.items()}
    if among is not None:
        for name, part in parts.items():
            part.masked_fill_(~local(among[name]), -inf if largest else inf)
    shards = sharding(next(iter(scores.values()), None))
    group = None if shards is None else shards[0].get_group()
    threshold = select_threshold(list(parts.values()), k, largest, group, names=list(parts))
    if all_ties and k:
        threshold = replace(threshold, ties=None)
    return {
        name: as_part(threshold.select(i, part), scores[name])
        for i, (name, part) in enumerate(parts.items())
    }


def marked_scores(
    scores: Mapping[str, Tensor], rows: Mapping[str, tuple[int, int]] | None, last: float
) -> tuple[dict[str, Tensor], int]:
    """Check scores, and mark the entries that may not be selected.

    Args:
        scores: by tensor; sharded ones are gathered, so that all ranks must call this.
        rows: the rows of dimension 0 that may be selected, by tensor; None: the `rows` of the
            scores if they have some.
        last: what marks the others, inf or -inf.

    Returns:
        The scores, and how many entries may be selected.

    Raises:
        TalosTypeError: the scores are no mapping, or no floating-point tensors.
        TalosValueError: a score is NaN, infinite or negative; `rows` does not fit.
    """
    if not isinstance(scores, Mapping):
        raise TalosTypeError(
            f"scores must be a mapping of names to tensors, got {type(scores).__name__}"
        )
    rows = getattr(scores, "rows", None) if rows is None else rows
    scores = {name: whole(local(score), score) for name, score in scores.items()}
    for name, score in scores.items():
        _check_score(name, score)
    barred = {
        name: _barred(name, scores[name], span)
        for name, span in (rows or {}).items()
        if name in scores
    }
    entries = sum(score.numel() for score in scores.values())
    entries -= sum(int(each.count_nonzero()) for each in barred.values())
    marked = {
        name: score.masked_fill(barred[name], last) if name in barred else score
        for name, score in scores.items()
    }
    return marked, entries


def _check_score(name: str, score: Tensor) -> None:
    if not score.is_floating_point():
        raise TalosTypeError(f"scores[{name!r}] must be floating point, got {score.dtype}")
    if not bool(torch.isfinite(score).all()):
        raise TalosValueError(
            f"scores[{name!r}] must be finite, got NaN or infinity; "
            "look for overflow in the model's loss or leave the tensor out"
        )
    if bool((score < 0).any()):
        raise TalosValueError(
            f"scores[{name!r}] must not be negative, got {float(score.min())}; "
            "take the absolute value or the square"
        )


def _barred(name: str, score: Tensor, rows: tuple[int, int]) -> Tensor:
    """Return the entries outside of the rows that may be selected."""
    first, last = rows
    if score.dim() == 0 or not 0 <= first < last <= score.shape[0]:
        raise TalosValueError(
            f"rows[{name!r}] must lie in the first dimension of {tuple(score.shape)}, "
            f"got [{first}, {last})"
        )
    barred = torch.ones_like(score, dtype=torch.bool)
    barred[first:last] = False
    return barred


def warn_if_equal(marked: Mapping[str, Tensor], nnz: int, entries: int) -> None:
    """Warn of scores, as `marked_scores` returns them, that do not tell entries apart."""
    if nnz == entries:
        return
    usable = [score[score.isfinite()] for score in marked.values()]
    lows = [float(score.min()) for score in usable if score.numel()]
    highs = [float(score.max()) for score in usable if score.numel()]
    if min(lows) == max(highs):
        warnings.warn(
            f"all {entries} scores equal {lows[0]}: the first {nnz} entries are selected, whatever "
            "the model; check that the gradients reach its weights",
            stacklevel=3,
        )
