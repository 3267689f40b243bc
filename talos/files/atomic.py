"""Atomic writing: readers find the old file or the whole new one, never a mix."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from talos.errors import TalosOSError

__all__ = ["atomic_write"]


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file so that readers, also after a crash, find the old one or the whole new one.

    The new file is written in a temporary folder beside `path` and then renamed. File and folder
    are synchronised to the disk. A link stays; the file that it points to is replaced. An existing
    file keeps its permissions. The temporary folder is removed after every error. Of two
    simultaneous writers the last one wins.

    Args:
        path: the file; its folder must exist.
        write: called with the path to write to, which holds an empty file.

    Raises:
        TalosOSError: the file cannot be written, or `path` is a folder or a device.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder, "a"), lambda new: new.write_bytes(b"whole"))
        ...     Path(folder, "a").read_bytes()
        b'whole'
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise TalosOSError(
                f"path must be a regular file, got {target}, a folder or device; choose another"
            )
        with tempfile.TemporaryDirectory(
            prefix=".talos-", dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            new = Path(folder, "new")
            new.touch()
            mode = stat.S_IMODE((target if target.exists() else new).stat().st_mode)
            write(new)
            with new.open("r+b") as file:
                new.chmod(mode)
                os.fsync(file.fileno())
            new.replace(target)
        _synchronise(target.parent)
    except TalosOSError:
        raise
    except OSError as error:
        raise TalosOSError(
            f"path must be writable, got {target} ({error.strerror or error}); check that its "
            "folder exists, may be written and has room"
        ) from error


def _synchronise(folder: Path) -> None:
    """Write the folder's new entry to the disk, on systems where a folder can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot synchronise a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
