"""table.md from the stages' JSONs: the bars and predictions first, then each stage's records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.gpu.context import DONE, FAILED, LATE, RUNNING, StageResult, read_stage
from benches.gpu.questions import FIGURES
from benches.results import costs_lines, markdown

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
PREDICTIONS = "## Predictions and bars"


def page(out: Path, stages: Sequence[tuple[str, str, str]]) -> str:
    """Return the page; `stages` holds each one's name, title, and the command for it alone."""
    results = {name: read_stage(out / f"{name}.json") for name, _, _ in stages}
    machine = next((result.machine for result in results.values() if result.machine), {})
    lines = [f"# {machine.get('device', 'Nothing was measured')}", ""]
    if machine.get("rehearsed"):
        lines += ["A rehearsal at tiny sizes: its times mean nothing.", ""]
    lines += [" | ".join(f"{key} {value}" for key, value in machine.items()), ""]
    missing = [
        f"- {name}: {_state(results[name])}; `{command}`"
        for name, _, command in stages
        if not results[name].complete
    ]
    lines += ["What is missing:", "", *missing, ""] if missing else []
    records = {name: result.records for name, result in results.items()}
    rows = []
    for each in FIGURES:
        found = each.measured(records)
        measured = "not measured" if found is None else f"{found:.3g}"
        predicted = "" if each.predicted is None else f"{each.predicted:g}"
        rows.append([each.name, each.unit, predicted, measured, each.verdict(found)])
    lines += [PREDICTIONS, "", *markdown(["", "unit", "predicted", "measured", "bar"], rows)]
    for name, title, _ in stages:
        if results[name].records:
            lines += [f"## {name}: {title}", "", *stage_lines(results[name])]
    return "\n".join(lines) + "\n"


def summary(page: str) -> str:
    """Return what stands before the first stage: the machine, what is missing, the figures."""
    before, _, rest = page.partition(PREDICTIONS)
    return f"{before}{PREDICTIONS}{rest.partition('## ')[0]}"


def _state(result: StageResult) -> str:
    if not result.records:
        return "not run"
    counts = ((status, len(result.with_status(status))) for status in (FAILED, RUNNING, LATE))
    parts = [f"{count} {status}" for status, count in counts if count]
    return ", ".join([*parts, *([] if result.ended else ["it was cut short"])])


def stage_lines(result: StageResult) -> list[str]:
    """Return one table for all records with the same fields, then what failed or was not done."""
    groups: dict[tuple[str, ...], list[tuple[str, Mapping[str, Any]]]] = {}
    costs: dict[str, list[Mapping[str, Any]]] = {}
    rest: list[str] = []
    for key, record in result.records.items():
        if record["status"] != DONE:
            reason = f", {record['error']}" if "error" in record else ""
            rest.append(f"- {key}: {record['status']}{reason}")
        elif "forward_backward" in record:
            costs.setdefault(f"{record['model']}, batch {record['batch']}", []).append(record)
        else:
            groups.setdefault(tuple(sorted(record)), []).append((key, record))
    lines: list[str] = []
    for label, forms in costs.items():  # beside the paper's numbers
        lines += [label, "", *costs_lines(forms, forms[0]["model"])]
    for rows in groups.values():
        columns = [name for name in rows[0][1] if name not in HIDDEN]
        titles = ["", *(UNITS.get(name, (name, 1.0, ""))[0] for name in columns)]
        cells = [[key, *(_cell(name, record[name]) for name in columns)] for key, record in rows]
        lines += markdown(titles, cells)
    return [*lines, *rest, *([""] if rest else [])]


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
