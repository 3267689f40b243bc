"""The list of tensors in a file's metadata, checked before a size in it is used."""

from collections import Counter
from math import prod
from typing import Any

from talos.errors import TalosValueError

__all__ = ["check_entries"]

_MOST_EMPTY = 1 << 36  # dense entries; the index keeps 8 bytes for 65536 of them


def check_entries(entries: Any) -> None:
    """Refuse a list that is not of `name`, `shape`, `encoding` and `nnz` of each tensor.

    Args:
        entries: the parsed `tensors` of a file, which is not trusted.

    Raises:
        TalosValueError: its structure differs, a size is negative or no integer, a name comes
            twice, or tensors without a selected entry, for which the file holds no buffer, are
            larger than any model.

    Example:
        >>> check_entries([{"name": "w", "shape": [2], "encoding": "full", "nnz": 2}])
    """
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and set(entry) == {"name", "shape", "encoding", "nnz"}
        and isinstance(entry["name"], str)
        and isinstance(entry["shape"], list)
        and all(type(size) is int and size >= 0 for size in [*entry["shape"], entry["nnz"]])
        for entry in entries
    ):
        raise TalosValueError("tensors must list name, shape, encoding and nnz of each")
    names = Counter(entry["name"] for entry in entries)
    if len(names) < len(entries):
        raise TalosValueError(f"tensors must name {names.most_common(1)[0][0]!r} once, not twice")
    empty = sum(prod(entry["shape"]) for entry in entries if entry["nnz"] == 0)
    if empty > _MOST_EMPTY:
        raise TalosValueError(f"tensors without a selected entry must be smaller, got {empty}")
