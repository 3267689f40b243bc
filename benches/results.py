"""What was measured, as result files and as the tables at the end of a session."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OURS, BASELINE = "ours", "nonlinear"
METHODS = "methods"  # the op of whole iterations, which have a table of their own
KEY = ("op", "shape", "form")


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
    """Shares of kept entries that a reference keeps too, by the name of a column."""
    comparable: bool = True
    """Whether the form does the same work, so that its time over ours is a ratio to quote."""

    def as_dict(self) -> dict[str, object]:
        """Return every field for a file, and what follows from them."""
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
        """Return the share of the copy bandwidth; a cache may lift it above 1."""
        return _ratio(self.bytes_per_second, self.bandwidth)

    @property
    def flops_per_second(self) -> float | None:
        return None if self.flops is None else self.flops / self.seconds

    @property
    def matrix_share(self) -> float | None:
        """Return the share of the rate of a product of large square matrices."""
        return _ratio(self.flops_per_second, self.matrix_rate)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none where there is no file."""
    return json.loads(path.read_text())["records"] if path.exists() else []


def add_result(folder: Path, record: Mapping[str, object]) -> Path:
    """Put a record in its op's file, in place of one of the same op, shape and form."""
    path = folder / f"{str(record['op']).strip('_')}.json"
    same = tuple(record[key] for key in KEY)
    kept = [old for old in read_results(path) if tuple(old[key] for key in KEY) != same]
    write_json(path, {"records": [*kept, dict(record)]})
    return path


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all, also where the process is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [line(titles), "|" + "---|" * len(titles), *map(line, safe), ""]


def table_lines(records: Sequence[Record]) -> list[str]:
    """Return one table for each op and shape, without the columns that no form fills.

    `x ours` is a form's time over ours, `peak x ours` its peak memory over ours.
    """
    lines: list[str] = []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.op, record.shape), []).append(record)
    for (op, shape), rows in groups.items():
        columns = [(title, [cell(row) for row in rows]) for title, cell in _columns(rows)]
        columns = [(title, cells) for title, cells in columns if any(cells)]
        body = zip(*(cells for _, cells in columns), strict=True)
        lines += [f"{op}, {shape}{_roofline(rows[0])}", ""]
        lines += markdown([title for title, _ in columns], body)
    return lines


def _columns(rows: Sequence[Record]) -> list[tuple[str, Callable[[Record], str]]]:
    ours = next((row for row in rows if row.form == OURS), None)
    names = dict.fromkeys(name for row in rows for name in row.overlaps or {})

    def overlap(name: str) -> Callable[[Record], str]:
        return lambda row: _number((row.overlaps or {}).get(name), "{:.4f}")

    def times_ours(row: Record, field: str) -> str:
        if ours is None or not row.comparable:
            return ""
        return _number(_ratio(getattr(row, field), getattr(ours, field)))

    return [
        ("form", lambda row: row.form),
        ("ms", lambda row: f"{row.seconds * 1e3:.3f}"),
        ("spread", lambda row: f"{row.spread * 1e3:.3f}"),
        ("GB moved", lambda row: _number(row.bytes_moved, "{:.3f}", 1e9)),
        ("GB/s", lambda row: _number(row.bytes_per_second, "{:.1f}", 1e9)),
        ("of copy", lambda row: _number(row.share)),
        ("GFLOP", lambda row: _number(row.flops, "{:.2f}", 1e9)),
        ("GFLOP/s", lambda row: _number(row.flops_per_second, "{:.0f}", 1e9)),
        ("of matrix", lambda row: _number(row.matrix_share)),
        *((name, overlap(name)) for name in names),
        ("state MB", lambda row: _number(row.state_bytes, "{:.1f}", 1e6)),
        ("peak MB", lambda row: _number(row.peak_bytes, "{:.1f}", 1e6)),
        ("peak x ours", lambda row: times_ours(row, "peak_bytes")),
        ("x ours", lambda row: times_ours(row, "seconds")),
    ]


def _roofline(row: Record) -> str:
    copy = _number(row.bandwidth, ", copy {:.1f} GB/s", 1e9)
    return copy + _number(row.matrix_rate, ", matrix product {:.0f} GFLOP/s", 1e9)


Costs = Sequence[Mapping[str, Any]]
"""Of the forms of one workload, as `Cost.as_dict` returns them."""

PAPER = {
    "vit-b-32": {
        "nonlinear": (0.3608, 0.0114, 6.5),
        "linearized": (0.6858, 0.0103, 10.2),
        "l_lora": (0.3270, 0.0036, 5.3),
        "lota": (0.3289, 0.1269, 6.8),
        "talos": (0.1256, 0.0388, 4.7),
    },
    "vit-l-14": {
        "nonlinear": (1.2174, 0.0156, 18.6),
        "linearized": (1.6200, 0.0262, 21.3),
        "l_lora": (0.5153, 0.0082, 9.7),
        "lota": (0.8438, 0.4449, 15.4),
        "talos": (0.1891, 0.1372, 7.8),
    },
    "t5-large": {
        "nonlinear": (0.9047, 0.0894, 30.0),
        "linearized": (1.7683, 0.1170, 35.1),
        "l_lora": (0.7452, 0.0136, 18.2),
        "lota": (0.8526, 0.3842, 32.1),
        "talos": (0.4358, 0.0509, 12.1),
    },
}
"""What the paper reports of its authors' machine, arXiv 2504.02620, by model and method: seconds of
forward and backward, seconds of the optimizer, peak GiB."""

COSTS_TITLES = (
    *("method", "forward-backward s", "optimizer s", "total s"),
    *("forward-backward x", "paper", "total x", "paper", "peak MB", "peak x", "paper"),
    *("weights", "gradients", "state", "activations MB", "launches", "step GB/s", "of copy"),
)


def ratios(forms: Costs, form: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return forward-backward, total and peak memory over those of non-linear fine-tuning."""
    base = next((each for each in forms if each["form"] == BASELINE), None)
    if base is None:
        return None
    times = tuple(form[key] / base[key] for key in ("forward_backward", "total"))
    return (*times, form["memory"]["peak"] / base["memory"]["peak"])


def paper_ratios(model: str, form: str) -> tuple[float, ...] | None:
    """Return the same of the paper's numbers; None where it has none."""
    reported = PAPER.get(model, {})
    if form not in reported:
        return None
    (forward, step, peak), (base_forward, base_step, base_peak) = reported[form], reported[BASELINE]
    total = (forward + step) / (base_forward + base_step)
    return forward / base_forward, total, peak / base_peak


def costs_lines(forms: Costs, model: str) -> list[str]:
    """Return one workload's table of methods, beside the paper's ratios."""
    rows = []
    for form in forms:
        own = ratios(forms, form) or (None,) * 3
        theirs = paper_ratios(model, form["form"]) or (None,) * 3
        pairs = [_number(each) for pair in zip(own, theirs, strict=True) for each in pair]
        memory = form["memory"]
        rows.append(
            [
                form["title"],
                *(f"{form[key]:.4f}" for key in ("forward_backward", "optimizer", "total")),
                *pairs[:4],
                _number(memory["peak"], "{:.0f}", 1e6),
                *pairs[4:],
                *(
                    _number(memory[part], "{:.0f}", 1e6)
                    for part in ("weights", "gradients", "state", "activations")
                ),
                str(form["launches"]),
                _number(form["bytes_per_second"], "{:.1f}", 1e9),
                _number(form["share"]),
            ]
        )
    return markdown(COSTS_TITLES, rows)


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def _number(value: float | None, style: str = "{:.2f}", unit: float = 1.0) -> str:
    return "" if value is None else style.format(value / unit)
