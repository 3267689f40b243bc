"""Scaling coefficients: the grid of a search, and which of its points is taken."""

from collections.abc import Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.options import as_real, integer

__all__ = ["checked_coefs", "choose", "scaling_coefs", "why_zero"]

# Figures that differ by less than this share are equal: they differ by rounding.
_EQUAL = 1e-9


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
    """Choose a coefficient on all examples, and again in each resample of them.

    Those on the plateau are candidates: their figure is at most one standard error below the best.
    The standard error is that of the difference from the best, over the same resamples, so it is
    paired. Of the candidates the middle one is taken, of an even number the smaller. The
    coefficient 0 is taken if none is better than it, and only then.

    A coefficient with an infinite figure, of a model that overflows, is never taken.

    Args:
        coefs: the coefficients, `C` of them.
        figures: float64 `[1 + resamples, C]`: on all examples, then in each resample.
        highest: the best figure is the highest one; False: the lowest.
        kept: bool `[1 + resamples, C]`: which ones may be taken; None: all.

    Returns:
        int64 `[1 + resamples]`: a place in `coefs` for each row. A row that keeps none takes the
        coefficient nearest to 0.

    Raises:
        TalosValueError: no coefficient has finite figures.

    Example:
        >>> figures = torch.tensor([[0.7, 0.8, 0.8, 0.8], [0.7, 0.8, 0.8, 0.8]]).double()
        >>> choose([0.0, 0.2, 0.4, 0.6], figures, highest=True).tolist()
        [2, 2]
    """
    finite = figures.isfinite().all(0)
    if not finite.any():
        raise TalosValueError(
            f"figures must be finite at one coefficient at least, got {float(figures[0, 0])} at "
            "all; take smaller coefs"
        )
    numbers = torch.tensor(coefs, dtype=torch.float64, device="cpu")
    order = numbers.abs().argsort(stable=True)  # of equal figures that of the smallest is the best
    order = order[finite[order]]
    signed = (figures if highest else -figures)[:, order]
    allowed = torch.ones_like(signed, dtype=torch.bool) if kept is None else kept[:, order].clone()
    allowed[~allowed.any(1), 0] = True
    least = torch.where(allowed, signed, -torch.inf)
    top, best = least.max(1, keepdim=True)
    covariance = signed[1:].T.cov(correction=0).reshape(len(order), len(order))
    spread = covariance.diag()
    error = (spread + spread[:, None] - 2 * covariance).clamp_min(0).sqrt()
    rounding = _EQUAL * top.abs()
    plateau = least >= top - error[best[:, 0]] - rounding
    if (zero := numbers[order] == 0).any():
        at = int(zero.nonzero()[0])
        unbeaten = least[:, at] >= top[:, 0] - rounding[:, 0]
        plateau[:, at] = False
        plateau[unbeaten] = zero
    ascending = numbers[order].argsort(stable=True)
    counts = plateau[:, ascending].cumsum(1)
    middle = (counts == (counts[:, -1:] + 1) // 2).int().argmax(1)
    return order[ascending[middle]]


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
