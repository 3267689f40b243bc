"""What `--json` writes: the figures that a command prints, as one JSON object.

Each begins with the same four keys; docs/format.md lists the others of each command.

schema, schema_version  "talos-COMMAND", 1
created, versions       when and with which versions it was made
"""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from talos.app.cli.console import note
from talos.app.cli.options import as_options, check_output

if TYPE_CHECKING:
    from talos.masks.table import MaskTable, MaskTableRow

__all__ = ["check_json", "finite", "table_record", "write_record"]

_VERSION = 1


def check_json(json: str | None, overwrite: bool) -> None:
    """Refuse a --json that could not be written."""
    if json not in (None, "-"):
        check_output(Path(json), overwrite, ".json", name="--json")


def write_record(json: str | None, command: str, figures: Mapping[str, Any]) -> None:
    """Write figures to the file of --json, or to stdout for "-"; None writes nothing.

    Args:
        json: the option --json.
        command: the command, which the schema is named after.
        figures: what it prints, with finite numbers only.
    """
    if json is None:
        return
    from talos.app.experiments.machine import versions
    from talos.app.report.results import json_text, write_json

    record = {
        "schema": f"talos-{command}",
        "schema_version": _VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **figures,
    }
    if json == "-":
        typer.echo(json_text(record), nl=False)
    else:
        with as_options({"path": "--json"}):
            write_json(record, json)
        note(f"{json}: the figures as JSON")


def table_record(table: "MaskTable") -> dict[str, Any]:
    """Return how many entries a mask selects: in all, and of each layer and type."""
    return {**_counts(table.total()), "layers": list(_rows(table.by_layer_and_kind()))}


def finite(value: float) -> float | None:
    """Return a number, or None where it is NaN or infinite: JSON has no such numbers.

    Example:
        >>> finite(1.5), finite(float("nan"))
        (1.5, None)
    """
    return value if math.isfinite(value) else None


def _rows(rows: "Iterable[MaskTableRow]") -> Iterable[dict[str, Any]]:
    for row in rows:
        yield {"layer": row.layer, "type": row.kind, "tensors": row.tensors, **_counts(row)}


def _counts(row: "MaskTableRow") -> dict[str, Any]:
    return {"entries": row.numel, "selected": row.nnz, "density": row.density}
