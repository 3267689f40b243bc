"""What was measured, as a file and as a table beside the paper's numbers.

A `costs.json`, version 1:

schema, schema_version  "talos-costs", 1
created, machine, versions  when, where and with what
settings   model, batch, tokens, layers, dtype, rounds, iterations, trainable, selected
forms      a list, in the table's order: the fields of `Cost`, seconds and bytes
left_out   form -> why it was not measured
paper      form -> forward_backward, optimizer (seconds), peak_gib; the authors' machine

Machines differ, so what is compared are ratios to non-linear fine-tuning, on either side.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from talos.app.costs.forms import BASELINE
from talos.app.costs.iteration import Cost
from talos.app.costs.paper import PAPER
from talos.app.demo.machine import machine, versions
from talos.files import atomic_write

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "paper_ratios",
    "ratios",
    "results_of",
    "save_results",
    "table_lines",
    "table_rows",
]

SCHEMA, SCHEMA_VERSION = "talos-costs", 1
HEADER = (
    *("method", "forward-backward s", "optimizer s", "total s"),
    *("forward-backward x", "paper", "total x", "paper", "peak MB", "peak x", "paper"),
    *("weights", "gradients", "state", "activations MB", "launches", "step GB/s", "of copy"),
)


def results_of(
    costs: Sequence[Cost], settings: Mapping[str, Any], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """Puts together what a file holds.

    Args:
        costs: what was measured.
        settings: of the measurement; `model` says which numbers of the paper are its.
        left_out: why forms are missing.

    Returns:
        The results, as the module's docstring lists them.
    """
    paper = {name: asdict(each) for name, each in PAPER.get(settings["model"], {}).items()}
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "forms": [cost.as_dict() for cost in costs],
        "left_out": dict(left_out),
        "paper": paper,
    }


def save_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes the file whole or not at all.

    Args:
        results: of `results_of`.
        path: the file.
    """
    text = json.dumps(results, indent=1) + "\n"
    atomic_write(path, lambda new: new.write_bytes(text.encode()))


def ratios(forms: Sequence[Mapping[str, Any]], form: Mapping[str, Any]) -> tuple[float, ...] | None:
    """A form's costs over those of non-linear fine-tuning.

    Args:
        forms: all, as a file has them.
        form: the one.

    Returns:
        Of forward-backward, total and peak memory; None: non-linear was not measured.
    """
    base = next((each for each in forms if each["form"] == BASELINE), None)
    if base is None:
        return None
    times = tuple(form[key] / base[key] for key in ("forward_backward", "total"))
    return (*times, form["memory"]["peak"] / base["memory"]["peak"])


def paper_ratios(model: str, form: str) -> tuple[float, ...] | None:
    """The same of the paper's numbers.

    Args:
        model: the architecture.
        form: the form's name.

    Returns:
        Of forward-backward, total and peak memory; None: the paper has none.
    """
    reported = PAPER.get(model, {})
    if form not in reported:
        return None
    one, base = reported[form], reported[BASELINE]
    times = one.forward_backward / base.forward_backward, one.total / base.total
    return (*times, one.peak_gib / base.peak_gib)


def table_rows(forms: Sequence[Mapping[str, Any]], model: str) -> list[tuple[str, ...]]:
    """The cells of a table under `HEADER`.

    Args:
        forms: as a file has them.
        model: the architecture.

    Returns:
        A row a form.
    """
    rows = []
    for form in forms:
        ours = ratios(forms, form) or (None,) * 3
        theirs = paper_ratios(model, form["form"]) or (None,) * 3
        pairs = [_number(each) for pair in zip(ours, theirs, strict=True) for each in pair]
        memory = form["memory"]
        parts = ("weights", "gradients", "state", "activations")
        rate = form["bytes_per_second"]
        rows.append(
            (
                form["title"],
                *(f"{form[key]:.4f}" for key in ("forward_backward", "optimizer", "total")),
                *pairs[:4],
                f"{memory['peak'] / 1e6:.0f}",
                *pairs[4:],
                *(f"{memory[part] / 1e6:.0f}" for part in parts),
                str(form["launches"]),
                _number(None if rate is None else rate / 1e9, "{:.1f}"),
                _number(form["share"]),
            )
        )
    return rows


def table_lines(forms: Sequence[Mapping[str, Any]], model: str) -> list[str]:
    """The same as lines of Markdown.

    Args:
        forms: as a file has them.
        model: the architecture.

    Returns:
        Header and rows.
    """
    rows = [HEADER, ("---",) * len(HEADER), *table_rows(forms, model)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _number(value: float | None, style: str = "{:.2f}") -> str:
    return "" if value is None else style.format(value)
