"""`talos inspect`: what a mask or task-vector file holds."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from talos.app.cli.console import next_step, say, stdout
from talos.app.cli.options import check_input

__all__ = ["EXAMPLES", "inspect"]

EXAMPLES = (
    "talos inspect masks/docstring_topic.safetensors",
    "talos inspect edit.safetensors --layers",
)


def inspect(
    file: Annotated[Path, typer.Argument(help="A mask or task-vector file.")],
    layers: Annotated[bool, typer.Option("--layers", help="A row for each layer, too.")] = False,
) -> None:
    """Show what a mask or a task vector holds: entries, layers and types, bytes, what made it.

    Every checksum of the file is verified; nothing is unpickled.
    """
    check_input("FILE", file)
    from talos.app.report.results import megabytes
    from talos.masks import Mask
    from talos.task_vectors import TaskVector

    size = file.stat().st_size
    console = stdout()
    if _kind(file) == "task_vector":
        vector = TaskVector.load(file)
        mask, metadata = vector.mask, vector.metadata
        say(
            console,
            f"{file}: a task vector of {mask.nnz:,} entries in {str(vector.values.dtype)[6:]}, "
            f"norm {float(vector.values.float().norm()):.4g}",
        )
    else:
        mask = Mask.load(file)
        metadata = mask.metadata
        say(console, f"{file}: a mask of {mask.nnz:,} entries")
    per_entry = f", {size / mask.nnz:.2f} a selected entry" if mask.nnz else ""
    say(
        console,
        f"density {mask.density:.4f} (sparsity {1 - mask.density:.4f}) of {mask.numel:,} entries; "
        f"{megabytes(size)}: {size:,} bytes{per_entry}",
    )
    console.print(_structure(mask, layers))
    if metadata:
        console.print("\n[bold]made by[/bold]")
        table = Table(box=None, show_header=False, pad_edge=False)
        for key, value in metadata.items():
            table.add_row(Text(str(key), style="dim"), Text(_plain(value)))
        console.print(table)
    next_step(
        console,
        f"talos eval --data TASK --vector {file} --scale grid"
        if _kind(file) == "task_vector"
        else f"talos train --data TASK --mask {file} --out vector.safetensors",
    )


def _kind(file: Path) -> str:
    """Reads what a file says it is; the loader, which checks everything, tells what is wrong."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return str(json.loads((opened.metadata() or {})["talos"])["kind"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return "mask"


def _structure(mask: Any, layers: bool) -> Table:
    table = Table(box=None, header_style="bold")
    if layers:
        table.add_column("layer")
    table.add_column("type")
    for column in ("tensors", "entries", "selected", "density"):
        table.add_column(column, justify="right")
    table.add_column("encoding")
    table.add_column("index bytes", justify="right")
    described = mask.describe()
    rows = [*(described.by_layer_and_kind() if layers else described.by_kind()), described.total()]
    for row in rows:
        table.add_row(
            *(["" if row.layer is None else str(row.layer)] if layers else []),
            row.kind,
            f"{row.tensors:,}",
            f"{row.numel:,}",
            f"{row.nnz:,}",
            f"{row.density:.4f}",
            row.encoding,
            f"{row.nbytes:,}",
            style="bold" if row.kind == "total" else None,
        )
    return table


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
