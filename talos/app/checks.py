"""Checks of what a user passes, before anything is loaded."""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

from talos.errors import TalosOSError, TalosValueError

__all__ = ["check_choice", "check_fraction", "check_input", "check_output", "check_positive"]


def check_fraction(name: str, value: float) -> None:
    """Refuse a number outside (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise TalosValueError(f"{name} must be in (0, 1], got {value:g}")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise TalosValueError(f"{name} must be positive and finite, got {value:g}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise TalosValueError(f"{name} must be {' or '.join(choices)}, got {value}")


def check_input(name: str, path: Path) -> None:
    """Refuse a file that does not exist."""
    if not path.is_file():
        raise TalosOSError(f"{name} must be an existing file, got {path}")


def check_output(path: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    """Refuse an --out that could not be written, or that exists without --overwrite."""
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
