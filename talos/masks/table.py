"""A mask as a table: one row a tensor, summed by layer and kind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from talos.architecture.layers import KINDS

__all__ = ["MaskTable", "MaskTableRow", "text_table"]


@dataclass(frozen=True)
class MaskTableRow:
    """One tensor of a mask, or a sum of tensors.

    Attributes:
        name: the tensor's name, or the sum's.
        layer: number of its layer; None outside of the layers and for sums over layers.
        kind: one of `talos.architecture.layers.KINDS`; `total` for sums over kinds.
        numel: entries.
        nnz: selected entries.
        encoding: of the index; of a sum several, joined by `+`.
        nbytes: bytes of the index.
        tensors: number of tensors.
    """

    name: str
    layer: int | None
    kind: str
    numel: int
    nnz: int
    encoding: str
    nbytes: int
    tensors: int = 1

    @property
    def density(self) -> float:
        """Fraction selected."""
        return self.nnz / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class MaskTable:
    """The table of a mask; `str()` of it has one row a kind, or one a layer and kind.

    Attributes:
        rows: one a tensor, in the mask's order.
        layers: whether `str()` has a row for each layer and kind.
    """

    rows: tuple[MaskTableRow, ...]
    layers: bool = False

    def by_kind(self) -> list[MaskTableRow]:
        """Return one row a kind, in the order of `KINDS`."""
        order = [kind for kind in KINDS if any(row.kind == kind for row in self.rows)]
        return [_sum([row for row in self.rows if row.kind == kind], kind) for kind in order]

    def by_layer_and_kind(self) -> list[MaskTableRow]:
        """Return one row a layer and kind; what is outside of the layers comes first."""
        pairs = sorted(
            {(row.layer, row.kind) for row in self.rows},
            key=lambda pair: (-1 if pair[0] is None else pair[0], KINDS.index(pair[1])),
        )
        return [
            _sum([row for row in self.rows if (row.layer, row.kind) == (layer, kind)], kind, layer)
            for layer, kind in pairs
        ]

    def total(self) -> MaskTableRow:
        """Return the sum of all rows."""
        return _sum(self.rows, "total")

    def __str__(self) -> str:
        header = ("type", "tensors", "entries", "selected", "density", "encoding", "bytes")
        rows = self.by_layer_and_kind() if self.layers else self.by_kind()
        lines = [
            (
                row.name,
                f"{row.tensors:,}",
                f"{row.numel:,}",
                f"{row.nnz:,}",
                f"{row.density:.3f}",
                row.encoding,
                f"{row.nbytes:,}",
            )
            for row in [*rows, self.total()]
        ]
        return text_table([header, *lines], left=(0, 5))


def _sum(rows: Sequence[MaskTableRow], kind: str, layer: int | None = None) -> MaskTableRow:
    encodings = dict.fromkeys(row.encoding for row in rows if row.nnz)
    return MaskTableRow(
        kind if layer is None else f"{layer} {kind}",
        layer,
        kind,
        sum(row.numel for row in rows),
        sum(row.nnz for row in rows),
        "+".join(encodings) or "none",
        sum(row.nbytes for row in rows),
        len(rows),
    )


def text_table(rows: Iterable[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> str:
    """Align columns with two spaces between; columns in `left` are flush left."""
    lines = list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
