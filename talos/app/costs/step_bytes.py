"""What an optimizer step must move at least, in bytes: the model that its bandwidth is had from.

| step | bytes |
|---|---|
| AdamW over `n` fp32 weights | 28 n: weight, both moments read and written, gradient read |
| the same with a masked gradient | 40 n: mask and gradient read, gradient written, besides |
| `SparseAdam` | 2 N f b + gradient + nnz (16 + masters) + index |

There `N` is the entries of the rows that hold selected ones, `b` the weights' bytes an entry and
`f` the share of 32-byte sectors with a selected entry, 1 - (1 - density)^(32 / b) if those lie at
random: memory is moved by sectors. A dense gradient is read as the weights are, N f b; a compact
one is 4 nnz. Weights narrower than fp32 have masters, 8 bytes a selected entry.
"""

from collections.abc import Iterable

__all__ = ["dense_step", "masked_step", "sector_share", "sparse_step"]

_SECTOR_BYTES = 32  # the smallest transfer of a GPU's memory


def sector_share(density: float, itemsize: int) -> float:
    """The share of memory sectors that hold a selected entry, if those lie at random.

    Args:
        density: the share of selected entries.
        itemsize: bytes an entry.

    Returns:
        In [0, 1].

    Example:
        >>> round(sector_share(0.1, 4), 2)
        0.57
    """
    return 1 - (1 - density) ** (_SECTOR_BYTES // itemsize)


def dense_step(numel: int) -> int:
    """AdamW over fp32 weights.

    Args:
        numel: how many.

    Returns:
        Bytes.
    """
    return 28 * numel


def masked_step(numel: int) -> int:
    """A gradient multiplied by its fp32 mask in place, then AdamW over fp32 weights.

    Args:
        numel: how many.

    Returns:
        Bytes.
    """
    return 12 * numel + dense_step(numel)


def sparse_step(
    parts: Iterable[tuple[int, int]],
    index_bytes: int,
    *,
    compact: bool,
    itemsize: int = 4,
    moment: int = 4,
) -> int:
    """One step of `SparseAdam`.

    Args:
        parts: of each tensor, the entries of the rows that hold selected ones, and the selected.
        index_bytes: of the compressed selection.
        compact: whether gradients are compact.
        itemsize: bytes of a weight, and of an entry of a dense gradient.
        moment: bytes of a moment.

    Returns:
        Bytes.

    Example:
        >>> sparse_step([(1000, 1000)], 0, compact=False)  # everything selected: AdamW
        28000
    """
    parts = list(parts)
    nnz = sum(selected for _, selected in parts)
    touched = sum(n * sector_share(selected / n, itemsize) for n, selected in parts if n)
    gradient = 4 * nnz if compact else touched * itemsize
    per_entry = 4 * moment + (0 if itemsize == 4 else 8)  # [and masters], read and written
    return int(2 * touched * itemsize + gradient) + nnz * per_entry + index_bytes
