"""Scaling coefficients: the grid of a search, and which of its points is taken."""

from collections.abc import Iterable, Sequence
from math import isfinite

from talos.errors import TalosTypeError, TalosValueError
from talos.options import as_real, integer

__all__ = ["best_place", "checked_coefs", "scaling_coefs", "why_zero"]

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


def best_place(coefs: Sequence[float], figures: Sequence[float], *, highest: bool) -> int:
    """Return the place of the best figure; of several equal ones that of the smallest coefficient.

    The smallest coefficient moves the weights least. Figures are equal if they differ by 1e-9 of
    the best one, which is rounding. An infinite figure, of a model that overflows, is never best.

    Args:
        coefs: the coefficients.
        figures: a figure of each.
        highest: the best figure is the highest one; False: the lowest.

    Returns:
        An index into both.

    Raises:
        TalosValueError: no figure is finite.

    Example:
        >>> best_place([0.0, 0.5, 1.0], [0.7, 0.8, 0.8], highest=True)
        1
    """
    signed = {i: each if highest else -each for i, each in enumerate(figures) if isfinite(each)}
    if not signed:
        raise TalosValueError(
            f"figures must be finite at one coefficient at least, got {figures[0]} at all; take "
            "smaller coefs"
        )
    top = max(signed.values())
    equal = [i for i, each in signed.items() if each >= top - _EQUAL * abs(top)]
    return min(equal, key=lambda i: abs(coefs[i]))


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
        highest: as of `best_place`.
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
    near = others[
        best_place([coefs[i] for i in others], [figures[i] for i in others], highest=highest)
    ]
    return (
        f"no coefficient {fails}: {coefs[near]:g} comes nearest, with {figures[near]:.4g} beside "
        f"{figures[place]:.4g}"
    )
