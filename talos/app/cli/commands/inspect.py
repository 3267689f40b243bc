"""`talos inspect`: show the content of a mask, a task vector or a patch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from talos.app.cli.console import command, next_step, print_line, stdout
from talos.app.cli.options import check_input
from talos.app.cli.suggestions import after_vector, model_option

__all__ = ["EXAMPLES", "inspect"]

EXAMPLES = (
    "talos inspect masks/docstring_topic.safetensors",
    "talos inspect edit.safetensors --layers",
)


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A mask, task vector or patch.")],
    layers: Annotated[
        bool, typer.Option("--layers", metavar="", help="Show a row for each layer.")
    ] = False,
) -> None:
    """Show what a mask, a task vector or a patch holds: entries, layers and types, bytes, origin.

    Every checksum of the file is verified; nothing is unpickled.
    """
    check_input("FILE", file)
    from talos.files import claimed_kind
    from talos.masks import Mask
    from talos.task_vectors import Patch, TaskVector
    from talos.task_vectors.sums import is_merge, is_sum
    from talos.tensors import readable_size

    size = file.stat().st_size
    console, kind = stdout(), claimed_kind(file)
    if kind == "task_vector":
        vector = TaskVector.load(file)
        shown, metadata = vector.mask.describe(layers=layers), vector.metadata
        print_line(
            console,
            f"{file}: a task vector of {len(vector):,} entries in {str(vector.values.dtype)[6:]}, "
            f"norm {float(vector.values.float().norm()):.4g}",
        )
    elif kind == "patch":
        patch = Patch.load(file)
        shown, metadata = patch.describe(layers=layers), {}
        print_line(console, f"{file}: a patch of {len(patch):,} entries")
    else:
        mask = Mask.load(file)
        shown, metadata = mask.describe(layers=layers), mask.metadata
        print_line(console, f"{file}: a mask of {mask.nnz:,} entries")
    all_of_it = shown.total()
    per_entry = f", {size / all_of_it.nnz:.2f} per selected entry" if all_of_it.nnz else ""
    density = all_of_it.density
    print_line(
        console,
        f"density {density:.4f} (sparsity {1 - density:.4f}) of {all_of_it.numel:,} entries; "
        f"{readable_size(size)}: {size:,} bytes{per_entry}",
    )
    print_line(console, str(shown))
    if metadata:
        console.print("\n[bold]made by[/bold]")
        table = Table(box=None, show_header=False, pad_edge=False)
        key_of_parts = "sum" if is_sum(metadata) else "sources"
        parts = metadata[key_of_parts] if is_sum(metadata) or is_merge(metadata) else []
        for part in parts:
            kept = f"; kept {part['kept']:,} entries" if "kept" in part else ""
            text = Text(f"{_plain(part['of'])}{kept}")
            table.add_row(Text(f"{_plain(part['scale'])} ×", style="dim"), text)
        for key, value in metadata.items():
            if not parts or key != key_of_parts:
                table.add_row(Text(str(key), style="dim"), Text(_plain(value)))
        console.print(table)
    if kind == "patch":
        return
    model = model_option(metadata)
    next_step(
        after_vector(file, metadata, model)
        if kind == "task_vector"
        else command(
            *("train", *model, "--data", "TASK", "--mask", file, "--out", "vector.safetensors")
        ),
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
