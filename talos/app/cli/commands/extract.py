"""`talos extract`: a task vector from two checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from talos.app.cli.console import (
    Bars,
    command,
    next_step,
    note,
    on_interrupt,
    print_line,
    stdout,
    table,
)
from talos.app.cli.options import (
    Json,
    Out,
    Overwrite,
    as_options,
    check_choice,
    check_input,
    check_output,
)
from talos.app.cli.records import check_json, write_record
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from talos.masks import Mask
    from talos.task_vectors import TaskVector

__all__ = ["EXAMPLES", "extract"]

EXAMPLES = (
    "talos extract base tuned --mask changed --out vector.safetensors",
    "talos extract base tuned --mask mask.safetensors --dtype bfloat16 --out vector.safetensors",
)
_MASKS = ("all", "changed")
_DTYPES = ("float32", "bfloat16", "float16")


def extract(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="The pretrained checkpoint: a .safetensors file, or a folder that holds one or "
            "shards and their index.",
        ),
    ],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned checkpoint.")],
    out: Out,
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            help="The entries to keep: all; changed, those that differ; or a mask file, outside of "
            "which nothing may differ.",
        ),
    ] = "all",
    drop: Annotated[
        bool,
        typer.Option("--drop", metavar="", help="Drop what differs outside of the mask file."),
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help=f"Of the values in the file: {', '.join(_DTYPES)}.")
    ] = "float32",
    json: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a task vector of two checkpoints: tuned minus base.

    They are read tensor by tensor, so that a large model needs no room in memory. Only safetensors
    files are read, never pickle.
    """
    check_choice("--dtype", dtype, _DTYPES)
    if mask not in _MASKS:
        check_input("--mask", Path(mask), _MASKS)
    elif drop:
        raise TalosValueError(
            f"--drop must be left out with --mask {mask}, got it; it is for a mask file"
        )
    check_output(out, overwrite)
    check_json(json, overwrite)
    import torch

    from talos.task_vectors import TaskVector
    from talos.tensors import readable_size

    made = {"base": base.resolve().name, "tuned": tuned.resolve().name}
    words = {
        "strict": "--drop",
        "path must be writable": "--out must be writable",
        "path": "BASE and TUNED",
        "base and tuned": "BASE and TUNED",
    }
    with as_options(words), on_interrupt("nothing was written"), Bars() as bars:
        vector = TaskVector.from_models(
            base,
            tuned,
            _entries(mask),
            strict=not drop,
            metadata={"extracted": made},
            on_tensor=lambda done, total: bars.show("read", done, total, unit="tensors"),
        )
        vector.save(out, getattr(torch, dtype), overwrite=overwrite)
    console, nbytes, shares = stdout(json), out.stat().st_size, _shares(vector)
    print_line(
        console,
        f"{out}: {len(vector):,} entries, norm {vector.norm():.4g}, {readable_size(nbytes)}",
    )
    console.print(_shares_table(shares))
    figures = {"file": str(out), "bytes": nbytes, "entries": len(vector), "norm": vector.norm()}
    write_record(json, "extract", {**figures, "types": shares, "metadata": vector.metadata})
    if inexact := vector.metadata.get("inexact"):
        note(
            f"{inexact:,} entries are not the tuned weights' to the last bit when the vector is "
            "added; talos.Patch.from_models gives them",
        )
    next_step(
        command("inspect", out),
        command("export", out, "--base", base, "--out", f"{base.resolve().name}-edited"),
    )


def _entries(mask: str) -> "Mask | Literal['changed'] | None":
    from talos.masks import Mask

    if mask == "changed":
        return "changed"
    return None if mask == "all" else Mask.load(mask)


def _shares(vector: "TaskVector") -> list[dict[str, Any]]:
    """Count the values that are not 0, for each type of layer and in all."""
    from talos.task_vectors.sums import slices_of

    counts = {
        name: int(vector.values[part].count_nonzero())
        for name, part in slices_of(vector.mask).items()
    }
    described = vector.mask.describe()
    counted = []
    for row in [*described.by_kind(), described.total()]:
        own = [each for each in described.rows if row.kind in (each.kind, "total")]
        changed = sum(counts[each.name] for each in own)
        of = {"type": row.kind, "tensors": row.tensors, "entries": row.numel}
        counted.append({**of, "changed": changed})
    return counted


def _shares_table(counted: list[dict[str, Any]]) -> Table:
    """Return the counts as a table, with their shares."""
    shown = table(["type"], ["tensors", "entries", "changed", "share"])
    for row in counted:
        share = f"{100 * row['changed'] / row['entries']:.2f} %" if row["entries"] else ""
        cells = [f"{row[key]:,}" for key in ("tensors", "entries", "changed")]
        style = "bold" if row["type"] == "total" else None
        shown.add_row(row["type"], *cells, share, style=style)
    return shown
