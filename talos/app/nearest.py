"""What a message proposes for a word that is not known, and long lists cut short."""

import difflib
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path

__all__ = ["beside", "did_you_mean", "several"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that proposes the most similar word, or nothing.

    Args:
        word: what was given.
        known: what it may be.

    Example:
        >>> did_you_mean("calibrat", ["calibrate", "train"])
        '; did you mean calibrate?'
        >>> did_you_mean("xyz", ["calibrate", "train"])
        ''
    """
    lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def beside(path: Path) -> list[str]:
    """Return what lies in the folder of a path, as it would be given: at most 1,000 names."""
    try:
        return [str(path.parent / each.name) for each in islice(path.parent.iterdir(), 1000)]
    except OSError:
        return []


def several(names: Collection[str], word: str = "", *, most: int = 5) -> str:
    """List names; of many, those most like a word and the number of the others.

    Args:
        names: the names.
        word: what was given; empty: the first names are listed.
        most: how many are listed.

    Example:
        >>> several(["a", "b", "c"])
        'a, b, c'
        >>> several(["ViT-B-16", "ViT-B-32", "RN50", "RN101"], "ViT-B", most=2)
        'ViT-B-32, ViT-B-16 and 2 more'
    """
    if len(names) <= most:
        return ", ".join(names)
    near = difflib.get_close_matches(word, names, n=most, cutoff=0.0) if word else list(names)
    return f"{', '.join(near[:most])} and {len(names) - most:,} more"
