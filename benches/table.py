"""The table at the end of a session: every form of one op beside ours."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

OURS = "ours"


@dataclass(frozen=True)
class Record:
    """One measured form of one op on one shape."""

    op: str
    shape: str
    form: str
    seconds: float
    spread: float
    bytes_moved: int
    bandwidth: float
    state_bytes: int | None = None
    peak_bytes: int | None = None
    comparable: bool = True
    """Whether the form does the same work, so that its time over ours is a ratio to quote."""

    def as_dict(self) -> dict[str, object]:
        """For a result file: every field and what follows from them."""
        return asdict(self) | {"bytes_per_second": self.bytes_per_second, "share": self.share}

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_moved / self.seconds

    @property
    def share(self) -> float:
        """Of the copy bandwidth; the bytes are the model's, so a cache may lift it above 1."""
        return self.bytes_per_second / self.bandwidth


def table_lines(records: Sequence[Record]) -> list[str]:
    """Markdown lines, one table an op and shape; `x ours` is a form's time over ours."""
    lines: list[str] = []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.op, record.shape), []).append(record)
    for (op, shape), rows in groups.items():
        ours = next((row.seconds for row in rows if row.form == OURS), None)
        lines += [
            f"{op}, {shape}, copy {rows[0].bandwidth / 1e9:.1f} GB/s",
            "",
            "| form | ms | spread | GB moved | GB/s | of copy | state MB | peak MB | x ours |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            ratio = f"{row.seconds / ours:.2f}" if ours and row.comparable else ""
            lines.append(
                f"| {row.form} | {row.seconds * 1e3:.3f} | {row.spread * 1e3:.3f} "
                f"| {row.bytes_moved / 1e9:.3f} | {row.bytes_per_second / 1e9:.1f} "
                f"| {row.share:.2f} | {_megabytes(row.state_bytes)} "
                f"| {_megabytes(row.peak_bytes)} | {ratio} |"
            )
        lines.append("")
    return lines


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"
