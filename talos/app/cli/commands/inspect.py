"""`talos inspect`: show the content of a mask, a task vector or a patch, or of two side by side."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from talos.app.cli.console import command, next_step, note, print_line, stdout, table
from talos.app.cli.options import Json, Overwrite, check_input
from talos.app.cli.records import check_json, write_record
from talos.app.cli.suggestions import after_vector, model_option
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from rich.console import Console

    from talos.app.cli.contents import Content

__all__ = ["EXAMPLES", "inspect"]

EXAMPLES = (
    "talos inspect masks/docstring_topic.safetensors",
    "talos inspect edit.safetensors --layers",
    "talos inspect a.safetensors b.safetensors",
)


def inspect(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="A mask, task vector or patch; or two to compare."),
    ],
    layers: Annotated[
        bool, typer.Option("--layers", metavar="", help="Show a row for each layer.")
    ] = False,
    json: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Show what a mask, a task vector or a patch holds: entries, layers and types, bytes, origin.

    Of two files it shows how many entries both select, in all and by type, the cosine of two
    vectors on these entries, and the metadata that differ.

    Every checksum of a file is verified; nothing is unpickled.
    """
    if len(files) > 2:
        raise TalosValueError(f"FILE must be given once or twice, got {len(files)}")
    if layers and len(files) > 1:
        raise TalosValueError("--layers must be left out with two files, got it")
    for file in files:
        check_input("FILE", file)
    check_json(json, overwrite)
    from talos.app.cli.contents import overlap, read_content

    contents = [read_content(file) for file in files]
    figures: dict[str, Any] = {"files": [each.record() for each in contents]}
    console = stdout(json)
    if len(contents) == 2:
        figures["overlap"] = overlap(*contents)
        _show_overlap(console, contents, figures["overlap"])
    else:
        _show(console, contents[0], layers)
    write_record(json, "inspect", figures)
    if len(contents) == 1 and (step := _next(contents[0])) is not None:
        next_step(step)


def _show(console: "Console", content: "Content", layers: bool) -> None:
    """Print the content of one file."""
    from talos.app.cli.contents import made
    from talos.tensors import readable_size

    whole, size = content.table.total(), content.nbytes
    values = f" in {content.dtype}, norm {content.norm:.4g}" if content.vector else ""
    print_line(console, f"{content.file}: a {content.kind} of {whole.nnz:,} entries{values}")
    per_entry = f", {size / whole.nnz:.2f} per selected entry" if whole.nnz else ""
    print_line(
        console,
        f"density {whole.density:.4f} (sparsity {1 - whole.density:.4f}) of {whole.numel:,} "
        f"entries; {readable_size(size)}: {size:,} bytes{per_entry}",
    )
    print_line(console, str(replace(content.table, layers=layers)))
    _show_parents(console, content)
    if texts := made(content.metadata):
        console.print("\n[bold]made by[/bold]")
        shown = table(["", ""], [])
        shown.show_header = False
        for key, text in texts.items():
            shown.add_row(f"[dim]{escape(key)}[/dim]", escape(text))
        console.print(shown)


def _show_parents(console: "Console", content: "Content") -> None:
    """Print a row for each vector that a sum or merge was made of."""
    from talos.app.cli.contents import parents

    found = list(parents(content.metadata))
    if not found:
        return
    console.print("\n[bold]parents[/bold]")
    counted = any(each.kept is not None for each in found)
    shown = table(["coefficient", "task", "method", "model"], ["entries kept"] if counted else [])
    for each in found:
        merge = each.made.get("merge")
        method = merge.get("method") if isinstance(merge, dict) else each.made.get("method")
        known = (each.made.get("task"), method, each.made.get("model"))
        cells = [escape("" if text is None else str(text)) for text in known]
        kept = [] if not counted else ["" if each.kept is None else f"{each.kept:,}"]
        shown.add_row(f"{'  ' * each.depth}{_scale(each.scale)}", *cells, *kept)
    console.print(shown)


def _scale(scale: Any) -> str:
    if isinstance(scale, dict):  # a coefficient for each pattern of names
        return escape(", ".join(f"{name} {_scale(each)}" for name, each in scale.items()))
    return f"{scale:g}" if isinstance(scale, float | int) else escape(str(scale))


def _show_overlap(console: "Console", contents: list["Content"], found: dict[str, Any]) -> None:
    """Print two files side by side."""
    from talos.app.cli.contents import made, parents

    names = [{row.name for row in each.table.rows} for each in contents]
    if not names[0] & names[1]:
        note("the files have no tensor in common: do they belong to one model?")
    shown = table(["", *(escape(str(each.file)) for each in contents)], [])
    for column in shown.columns:
        column.overflow = "fold"
    whole = [each.table.total() for each in contents]
    shown.add_row("holds", *(f"a {each.kind}" for each in contents))
    shown.add_row("selected entries", *(f"{each.nnz:,}" for each in whole))
    shown.add_row("density", *(f"{each.density:.4f}" for each in whole))
    shown.add_row("bytes", *(f"{each.nbytes:,}" for each in contents))
    if any(each.vector for each in contents):
        shown.add_row("values in", *(each.dtype or "" for each in contents))
        shown.add_row("norm", *("" if e.norm is None else f"{e.norm:.4g}" for e in contents))
    shares = [f"{100 * found['entries'] / each.nnz:.1f} %" if each.nnz else "" for each in whole]
    shown.add_row("selected by both", *shares)
    texts = [made(each.metadata) for each in contents]
    for place, each in enumerate(contents):
        made_of = [e for e in parents(each.metadata) if not e.depth]
        if made_of:
            terms = (f"{_scale(e.scale)} × {e.made.get('task', 'a merge')}" for e in made_of)
            texts[place]["parents"] = ", ".join(terms)
    for key in dict.fromkeys([*texts[0], *texts[1]]):
        one, other = (each.get(key, "") for each in texts)
        if one != other:
            shown.add_row(f"[dim]{escape(key)}[/dim]", escape(one), escape(other))
    console.print(shown)
    console.print("\n[bold]selected entries[/bold]")
    counts = table(["type"], ["entries", "first", "second", "both", "IoU"])
    for row in found["types"]:
        iou = "" if row["iou"] is None else f"{row['iou']:.3f}"
        cells = [f"{row[key]:,}" for key in ("entries", "first", "second", "both")]
        style = "bold" if row["type"] == "total" else None
        counts.add_row(row["type"], *cells, iou, style=style)
    console.print(counts)
    print_line(
        console,
        f"\nintersection over union {found['iou']:.3f} ({found['iou_by_chance']:.3f} by chance)",
    )
    if found["cosine"] is not None:
        shared = f"the {found['entries']:,} entries that both select"
        print_line(console, f"cosine {found['cosine']:.3f} on {shared}")


def _next(content: "Content") -> str | None:
    """Return the command that a user would run next with a file."""
    model = model_option(content.metadata)
    if content.vector is not None:
        return after_vector(content.file, content.metadata, model)
    if content.mask is None:
        return None
    words = ("train", *model, "--data", "TASK", "--mask", content.file)
    return command(*words, "--out", "vector.safetensors")
