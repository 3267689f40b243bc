"""The output folder of a demo: its check, and the removal of an earlier demo's files."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from talos.errors import TalosOSError

__all__ = ["check", "clear", "kept", "prepare"]

_PATTERNS = ("results.json", "report.html", "vectors/*.safetensors", "masks/*.safetensors")
_ALL = (*_PATTERNS, *(f"cells/*/{pattern}" for pattern in _PATTERNS))  # of a sweep, too


def check(out: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be used; it must hold no file unless `overwrite` is set.

    Raises:
        TalosOSError: it is a file, or holds files.
    """
    if out.exists() and not out.is_dir():
        raise TalosOSError(f"out must be a folder, got the file {out}")
    if not overwrite and any(not path.is_dir() for path in out.rglob("*")):
        raise TalosOSError(
            f"out must be an empty or new folder, got {out} with files in it; pass --overwrite "
            "to replace an earlier demo's files"
        )


def prepare(out: Path, overwrite: bool, folders: Sequence[str] = ("vectors", "masks")) -> Path:
    """Check the folder, and make it and its subfolders.

    Raises:
        TalosOSError: it is a file, holds files, or cannot be written.
    """
    check(out, overwrite)
    try:
        for folder in ("", *folders):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TalosOSError(f"out must be writable, got {out} ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise TalosOSError(f"out must be writable, got {out}")
    return out


def clear(out: Path) -> None:
    """Remove the files of an earlier demo, and the folders of its runs.

    Raises:
        TalosOSError: a file cannot be removed.
    """
    for path in _files(out):
        try:
            path.unlink()
        except OSError as error:
            raise TalosOSError(f"out must be writable, got {path} ({error.strerror})") from error
    for folder in (*out.glob("cells/*/*"), *out.glob("cells/*"), out / "cells"):
        with suppress(OSError):  # it is none, or holds other files
            folder.rmdir()


def kept(out: Path) -> str:
    """Describe what an interrupted run leaves in the folder."""
    files = _files(out)
    if not files:
        return "nothing was written"
    count = "1 finished file is" if len(files) == 1 else f"{len(files)} finished files are"
    return f"{count} kept in {out}; run again with --overwrite"


def _files(out: Path) -> list[Path]:
    return [path for pattern in _ALL for path in sorted(out.glob(pattern))]
