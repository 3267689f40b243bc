"""Text files that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from talos.errors import TalosOSError

__all__ = ["write_text"]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file: a temporary file beside it, fsync, rename.

    Args:
        path: the file; replaced when it exists.
        text: what it will hold, written as UTF-8.

    Raises:
        TalosOSError: the folder is missing, read-only or full; the old file is intact.
    """
    target = Path(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise TalosOSError(f"{target} must be writable, got {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
