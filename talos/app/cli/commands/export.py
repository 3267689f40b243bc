"""`talos export`: base and task vectors as a checkpoint, a dense delta or a patch."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.commands.merge import parse_term
from talos.app.cli.console import Bars, command, next_step, on_interrupt, print_line, stdout
from talos.app.cli.options import (
    Json,
    Overwrite,
    as_options,
    check_choice,
    check_input,
    check_output,
)
from talos.app.cli.records import check_json, write_record
from talos.errors import TalosOSError, TalosValueError
from talos.options import finite

__all__ = ["EXAMPLES", "export"]

EXAMPLES = (
    "talos export vector.safetensors --base base --out edited",
    "talos export vector.safetensors:0.4 edit.safetensors:-0.2 --base base --out edited",
    "talos export vector.safetensors --format delta --out delta.safetensors",
)
_FORMATS = ("checkpoint", "delta", "patch")


def export(
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE:COEFFICIENT",
            help="Task vectors, each with its scaling coefficient (1 when left out). Several are "
            "added.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The folder or file to write; a checkpoint is as its base."),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help="The checkpoint that is edited: a .safetensors file, or a folder that holds one "
            "or shards and their index. A delta needs none.",
        ),
    ] = None,
    scale: Annotated[float, typer.Option("--scale", help="Multiplies every coefficient.")] = 1.0,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="checkpoint: base plus vectors, in the files and names of the base; delta: the "
            "vectors' sum alone, dense; patch: the new values of the weights that change.",
        ),
    ] = "checkpoint",
    force: Annotated[
        bool,
        typer.Option("--force", metavar="", help="Edit a base with other fingerprints, too."),
    ] = False,
    json: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a base with task vectors on it as a checkpoint, for transformers, vLLM or open_clip.

    The base is read and written tensor by tensor, so that a large model needs no room in memory.
    The checkpoint appears whole or not at all.
    """
    check_choice("--format", form, _FORMATS)
    finite("--scale", scale)
    check_json(json, overwrite)
    parsed = [parse_term(term) for term in terms]
    for path, _ in parsed:
        check_input("a term", path)
    if (base is None) != (form == "delta"):
        got = "none" if base is None else f"{base}, which a delta does not need"
        raise TalosValueError(f"--base must be given unless --format is delta, got {got}")
    if base is not None and not base.exists():
        raise TalosOSError(f"--base must be an existing file or folder, got {base}")
    if form != "checkpoint":
        check_output(out, overwrite)
    elif os.path.lexists(out) and not overwrite:
        raise TalosOSError(f"--out must not exist, got {out}; pass --overwrite to replace it")
    from talos.files import Checkpoint
    from talos.task_vectors import Patch, TaskVector
    from talos.tensors import readable_size

    with as_options({"path": "--base"}):
        source = None if base is None else Checkpoint(base)
    words = {"path must be a readable": "--base must be a readable", "path": "--out"}
    with as_options(words), on_interrupt("nothing was written"), Bars() as bars:
        edit = TaskVector.combine((coef, TaskVector.load(path)) for path, coef in parsed)
        if source is None:
            (scale * edit).export_dense(out)
        elif form == "patch":
            Patch.between(source, edit, scale, force).save(out)
        else:
            edit.export(
                source,
                out,
                scale,
                force,
                overwrite=overwrite,
                on_tensor=lambda done, total: bars.show("write", done, total, unit="tensors"),
            )
    written = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    nbytes = sum(path.stat().st_size for path in written)
    files = f"{len(written)} files, " if out.is_dir() else ""
    print_line(
        stdout(json),
        f"{out}: {files}{readable_size(nbytes)}; {len(edit):,} entries were edited",
    )
    write_record(
        json,
        "export",
        {
            "out": str(out),
            "files": sorted(str(path) for path in written),
            "bytes": nbytes,
            "entries": len(edit),
            "metadata": edit.metadata,
        },
    )
    if (out / "config.json").is_file():
        next_step(_next(out))


def _next(folder: Path) -> str:
    """Return what loads the checkpoint: `talos eval`, or transformers where that does not fit."""
    from talos.app.models import can_load, class_name

    if can_load(folder):
        return command("eval", "--model", folder, "--data", "TASK")
    code = (
        f"import transformers; transformers.{class_name(folder)}.from_pretrained({str(folder)!r})"
    )
    return shlex.join(["python", "-c", code])
