"""The table at the end of a session: every form of one op beside ours."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

OURS = "ours"
METHODS = "methods"  # the op of whole iterations, which have a table of their own


@dataclass(frozen=True)
class Record:
    """One measured form of one op on one shape."""

    op: str
    shape: str
    form: str
    seconds: float
    spread: float
    bytes_moved: int | None = None
    """What the form must move, by its byte model."""
    bandwidth: float | None = None
    flops: int | None = None
    """What the work takes at least, the same for every form."""
    matrix_rate: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    overlaps: dict[str, float] | None = None
    """Shares of kept entries that are those of a reference, by the name of a column."""
    accuracy: float | None = None
    """Of a model that the form trained."""
    comparable: bool = True
    """Whether the form does the same work, so that its time over ours is a ratio to quote."""

    def as_dict(self) -> dict[str, object]:
        """For a result file: every field and what follows from them."""
        return asdict(self) | {
            "bytes_per_second": self.bytes_per_second,
            "share": self.share,
            "flops_per_second": self.flops_per_second,
            "matrix_share": self.matrix_share,
        }

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.seconds

    @property
    def share(self) -> float | None:
        """Of the copy bandwidth; the bytes are the model's, so a cache may lift it above 1."""
        return _ratio(self.bytes_per_second, self.bandwidth)

    @property
    def flops_per_second(self) -> float | None:
        return None if self.flops is None else self.flops / self.seconds

    @property
    def matrix_share(self) -> float | None:
        """Of the rate of a product of large square matrices."""
        return _ratio(self.flops_per_second, self.matrix_rate)


def table_lines(records: Sequence[Record]) -> list[str]:
    """Markdown lines, one table an op and shape, without the columns that no form fills.

    `x ours` is a form's time over ours, `peak x ours` its peak memory over ours.
    """
    lines: list[str] = []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.op, record.shape), []).append(record)
    for (op, shape), rows in groups.items():
        columns = [(title, [cell(row) for row in rows]) for title, cell in _columns(rows)]
        columns = [(title, cells) for title, cells in columns if any(cells)]
        lines += [
            f"{op}, {shape}{_roofline(rows[0])}",
            "",
            _line(title for title, _ in columns),
            "|" + "---|" * len(columns),
            *(_line(cells) for cells in zip(*(cells for _, cells in columns), strict=True)),
            "",
        ]
    return lines


def _columns(rows: Sequence[Record]) -> list[tuple[str, Callable[[Record], str]]]:
    ours = next((row for row in rows if row.form == OURS), None)
    names = dict.fromkeys(name for row in rows for name in row.overlaps or {})

    def overlap(name: str) -> Callable[[Record], str]:
        return lambda row: _number((row.overlaps or {}).get(name), "{:.4f}")

    def times_ours(row: Record, field: str) -> str:
        if ours is None or not row.comparable:
            return ""
        return _number(_ratio(getattr(row, field), getattr(ours, field)), "{:.2f}")

    return [
        ("form", lambda row: row.form),
        ("ms", lambda row: f"{row.seconds * 1e3:.3f}"),
        ("spread", lambda row: f"{row.spread * 1e3:.3f}"),
        ("GB moved", lambda row: _number(row.bytes_moved, "{:.3f}", 1e9)),
        ("GB/s", lambda row: _number(row.bytes_per_second, "{:.1f}", 1e9)),
        ("of copy", lambda row: _number(row.share, "{:.2f}")),
        ("GFLOP", lambda row: _number(row.flops, "{:.2f}", 1e9)),
        ("GFLOP/s", lambda row: _number(row.flops_per_second, "{:.0f}", 1e9)),
        ("of matrix", lambda row: _number(row.matrix_share, "{:.2f}")),
        *((name, overlap(name)) for name in names),
        ("accuracy", lambda row: _number(row.accuracy, "{:.4f}")),
        ("state MB", lambda row: _number(row.state_bytes, "{:.1f}", 1e6)),
        ("peak MB", lambda row: _number(row.peak_bytes, "{:.1f}", 1e6)),
        ("peak x ours", lambda row: times_ours(row, "peak_bytes")),
        ("x ours", lambda row: times_ours(row, "seconds")),
    ]


def _roofline(row: Record) -> str:
    copy = _number(row.bandwidth, ", copy {:.1f} GB/s", 1e9)
    return copy + _number(row.matrix_rate, ", matrix product {:.0f} GFLOP/s", 1e9)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def _number(value: float | None, style: str, unit: float = 1.0) -> str:
    return "" if value is None else style.format(value / unit)
