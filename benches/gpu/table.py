"""table.md from the stages' JSONs: the bars and predictions first, then each stage's records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.gpu.context import DONE, FAILED, LATE, RUNNING, StageResult, read_stage
from benches.gpu.predictions import PREDICTIONS, Prediction
from talos.app.costs.results import table_lines as costs_lines

UNITS: dict[str, tuple[str, float, str]] = {
    "seconds": ("ms", 1e-3, "{:.4g}"),
    "spread": ("spread, ms", 1e-3, "{:.2g}"),
    "bytes_moved": ("GB moved", 1e9, "{:.3g}"),
    "bytes_per_second": ("GB/s", 1e9, "{:.4g}"),
    "flops": ("GFLOP", 1e9, "{:.4g}"),
    "flops_per_second": ("TFLOP/s", 1e12, "{:.4g}"),
    "peak_bytes": ("peak MB", 1e6, "{:.1f}"),
    "state_bytes": ("state MB", 1e6, "{:.1f}"),
}
HIDDEN = {"status", "item_seconds", "shape", "density", "form", "model"}
"""What the key says too, and what no reader asks for."""


def page(out: Path, stages: Sequence[tuple[str, str, str]]) -> str:
    """The whole page; `stages` holds each one's name, title, and the command that runs it alone."""
    results = {name: read_stage(out / f"{name}.json") for name, _, _ in stages}
    machine = next((result.machine for result in results.values() if result.machine), {})
    lines = [f"# {machine.get('device', 'Nothing was measured')}", ""]
    if machine.get("rehearsed"):
        lines += ["A rehearsal at tiny sizes: its times say nothing.", ""]
    lines += [" | ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += [*_missing(results, stages), *_predictions(results)]
    for name, title, _ in stages:
        if results[name].records:
            lines += [f"## {name}: {title}", "", *stage_lines(results[name])]
    return "\n".join(lines) + "\n"


def summary(page: str) -> str:
    """What stands before the first stage: the machine, what is missing, predictions and bars."""
    before, _, rest = page.partition("## Predictions and bars")
    return f"{before}## Predictions and bars{rest.partition('## ')[0]}"


def _missing(
    results: Mapping[str, StageResult], stages: Sequence[tuple[str, str, str]]
) -> list[str]:
    lines = []
    for name, _, command in stages:
        result = results[name]
        if result.complete:
            continue
        if not result.records:
            said = "not run"
        else:
            counts = (
                (status, len(result.with_status(status))) for status in (FAILED, RUNNING, LATE)
            )
            parts = [f"{count} {status}" for status, count in counts if count]
            said = ", ".join([*parts, *([] if result.ended else ["it was cut short"])])
        lines.append(f"- {name}: {said}; `{command}`")
    return ["What is missing:", "", *lines, ""] if lines else []


def _predictions(results: Mapping[str, StageResult]) -> list[str]:
    rows = []
    for each in PREDICTIONS:
        measured = each.measured({name: result.records for name, result in results.items()})
        rows.append(
            [each.name, each.unit, _predicted(each), _measured(measured), each.verdict(measured)]
        )
    return [
        "## Predictions and bars",
        "",
        *markdown(["", "unit", "predicted", "measured", "bar"], rows),
    ]


def _predicted(each: Prediction) -> str:
    return "" if each.predicted is None else f"{each.predicted:g}"


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def stage_lines(result: StageResult) -> list[str]:
    """One table for all records with the same values, then what failed or was not done."""
    groups: dict[tuple[str, ...], list[tuple[str, Mapping[str, Any]]]] = {}
    costs: dict[str, list[Mapping[str, Any]]] = {}
    for key, record in result.records.items():
        if record["status"] != DONE:
            continue
        if "forward_backward" in record:
            costs.setdefault(f"{record['model']}, batch {record['batch']}", []).append(record)
        else:
            groups.setdefault(tuple(sorted(record)), []).append((key, record))
    lines: list[str] = []
    for label, forms in costs.items():  # beside the paper's numbers
        lines += [label, "", *costs_lines(forms, forms[0]["model"]), ""]
    for rows in groups.values():
        columns = [name for name in rows[0][1] if name not in HIDDEN]
        titles = ["", *(UNITS.get(name, (name, 1.0, ""))[0] for name in columns)]
        cells = [[key, *(_cell(name, record[name]) for name in columns)] for key, record in rows]
        lines += markdown(titles, cells)
    rest = [(key, record) for key, record in result.records.items() if record["status"] != DONE]
    told = [f"- {key}: {record['status']}{_reason(record)}" for key, record in rest]
    return [*lines, *told, *([""] if told else [])]


def _reason(record: Mapping[str, Any]) -> str:
    return f", {record['error']}" if "error" in record else ""


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in UNITS and isinstance(value, int | float):
        _, unit, style = UNITS[name]
        return style.format(value / unit)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list):
        return "<br>".join(map(str, value))
    return str(value)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [line(titles), "|" + "---|" * len(titles), *map(line, safe), ""]
