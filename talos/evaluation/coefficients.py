"""Scaling coefficients: the grid of a search, and which of its points is taken."""

from collections.abc import Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.options import as_real, integer

__all__ = ["RANKS", "checked_coefs", "choose", "scaling_coefs", "stand_ins", "why_zero"]

# Figures that differ by less than this share are equal: they differ by rounding.
_EQUAL = 1e-9

# Which of the resamples' coefficients are tested beside the chosen one: the outer ones of the three
# points that have the moments of a normal distribution, at -1.73 and 1.73 deviations. Their
# intervals differ little from those of 20 quantiles (benches/bench_coefficients.py).
RANKS = (0.042, 0.958)


def scaling_coefs(count: int = 21) -> list[float]:
    """Return linspace(0, 1, count).

    Args:
        count: number of coefficients, at least 2.

    Returns:
        The coefficients, ascending.

    Raises:
        TalosValueError: `count` is no integer of at least 2.

    Example:
        >>> scaling_coefs(5)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    count = integer("count", count, 2)
    return [round(i / (count - 1), 10) for i in range(count)]


def checked_coefs(coefs: Iterable[object]) -> list[float]:
    """Return the coefficients of a search as floats.

    Raises:
        TalosTypeError: they cannot be listed.
        TalosValueError: there is none, or one is no finite real number.
    """
    if not isinstance(coefs, Iterable):
        raise TalosTypeError(f"coefs must be a list of numbers, got {coefs!r}")
    numbers = []
    for coef in coefs:
        number = as_real(coef)
        if number is None or not isfinite(number):
            raise TalosValueError(f"coefs must be finite real numbers, got {coef!r}")
        numbers.append(number)
    if not numbers:
        raise TalosValueError("coefs must hold at least one coefficient, got none")
    return numbers


def choose(
    coefs: Sequence[float], figures: Tensor, *, highest: bool, kept: Tensor | None = None
) -> Tensor:
    """Choose a coefficient on all examples, and the best one in each resample of them.

    Near the best coefficient figures hardly differ, and a few examples decide which one is the
    best. So the one that is nearest to the mean of the resamples' best coefficients is taken
    (bagging; Breiman 1996), of those that are better on all examples than the coefficient 0. That
    one is taken if no other one is better, and only then.

    Of several best ones in a resample the middle one counts. A coefficient with an infinite figure,
    of a model that overflows, is never taken.

    Args:
        coefs: the coefficients, `C` of them.
        figures: float64 `[1 + resamples, C]`: on all examples, then in each resample.
        highest: the best figure is the highest one; False: the lowest.
        kept: bool `[1 + resamples, C]`: which ones may be taken; None: all.

    Returns:
        int64 `[1 + resamples]`: a place in `coefs` for each row.

    Raises:
        TalosValueError: no coefficient has finite figures.

    Example:
        >>> figures = torch.tensor([[0.8, 0.9, 0.8], [0.8, 0.9, 0.7], [0.8, 0.8, 0.9]]).double()
        >>> choose([0.0, 0.4, 0.6], figures, highest=True).tolist()
        [1, 1, 2]
    """
    finite = figures.isfinite().all(0)
    if not finite.any():
        raise TalosValueError(
            f"figures must be finite at one coefficient at least, got {float(figures[0, 0])} at "
            "all; take smaller coefs"
        )
    numbers = torch.tensor(coefs, dtype=torch.float64, device="cpu")
    order = numbers.argsort(stable=True)
    order = order[finite[order]]
    numbers = numbers[order]
    allowed = torch.ones_like(figures, dtype=torch.bool) if kept is None else kept
    signed = torch.where(allowed, figures if highest else -figures, -torch.inf)[:, order]
    top = signed.amax(1, keepdim=True)
    best = signed >= top - _EQUAL * top.abs()
    counts = best.cumsum(1)
    middle = (counts == (counts[:, -1:] + 1) // 2).int().argmax(1)
    zero = numbers == 0
    unbeaten = best[0] & zero
    others = signed[0] > (signed[0][zero].max() if zero.any() else -torch.inf)
    away = torch.where(others, (numbers - numbers[middle[1:]].mean()).abs(), torch.inf)
    middle[0] = unbeaten.int().argmax() if unbeaten.any() else away.argmin()
    return order[middle]


def stand_ins(
    coefs: Sequence[float], places: Tensor, ranks: Sequence[float] = RANKS
) -> tuple[list[int], Tensor]:
    """Choose few coefficients that stand for those that resamples choose: the nearest one does.

    Args:
        coefs: the coefficients.
        places: int64 `[1 + resamples]`, as `choose` returns them.
        ranks: quantiles of the resamples' coefficients, each in [0, 1).

    Returns:
        Places in `coefs`, ascending, the chosen one among them; and for each resample, int64
        `[resamples]`, which of them stands for its coefficient.

    Example:
        >>> stand_ins([0.0, 0.1, 0.5, 0.6], torch.tensor([2, 2, 3, 1, 2]))
        ([1, 2, 3], tensor([1, 2, 0, 1]))
    """
    numbers = torch.tensor(coefs, dtype=torch.float64, device="cpu")
    ordered = places[1:][numbers[places[1:]].argsort()]
    ends = [int(ordered[int(rank * len(ordered))]) for rank in ranks]
    used = sorted({int(places[0]), *ends})
    nearest = (numbers[:, None] - numbers[used]).abs().argmin(1)
    return used, nearest[places[1:]]


def why_zero(
    coefs: Sequence[float],
    figures: Sequence[float],
    place: int,
    *,
    highest: bool,
    fails: str = "beats the pretrained model on validation examples",
) -> str | None:
    """Say what no coefficient does, and how near one came, if 0 was taken.

    Args:
        coefs: the coefficients.
        figures: a figure of each.
        place: of the coefficient that was taken.
        highest: as of `choose`.
        fails: what no coefficient does.

    Returns:
        None: the coefficient that was taken is not 0, or no other one was tried.

    Example:
        >>> why_zero([0.0, 0.5, 1.0], [0.5, 0.6, 0.7], 0, highest=False, fails="lowers it")
        'no coefficient lowers it: 0.5 comes nearest, with 0.6 beside 0.5'
    """
    others = [i for i, coef in enumerate(coefs) if coef != 0]
    if coefs[place] != 0 or not others:
        return None
    near = max(others, key=lambda i: figures[i] if highest else -figures[i])
    return (
        f"no coefficient {fails}: {coefs[near]:g} comes nearest, with {figures[near]:.4g} beside "
        f"{figures[place]:.4g}"
    )
