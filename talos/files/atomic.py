"""Writing a file so that its readers find the old one or the whole new one, never a mix."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from talos.errors import TalosOSError

__all__ = ["atomic_write"]

_REMEDIES = {
    errno.ENOENT: "create its folder first",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "raise the limit on file sizes or choose another disk",
}


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that its readers, also after a crash, find the old one or the whole new one.

    The bytes go to a temporary file in the same folder, which then takes the name; both the file
    and the folder are synchronised to the disk. A link is followed: the file it points to is
    replaced, the link stays. Whatever goes wrong, the temporary file is removed. Of two writers at
    a time the one that ends last wins.

    Args:
        path: the file; its folder must exist.
        write: is given the open binary file.

    Raises:
        TalosOSError: the file cannot be written, or is not a regular one (a folder, a device).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder, "a"), lambda file: file.write(b"whole"))
        ...     Path(folder, "a").read_bytes()
        b'whole'
    """
    target = Path(os.path.realpath(path))
    # Its own short name: a target whose name is as long as the system allows can be written too.
    temporary = target.parent / f".talos-{secrets.token_hex(8)}.tmp"
    try:
        mode = target.stat().st_mode if target.exists() else None
        if mode is not None and not stat.S_ISREG(mode):
            raise TalosOSError(
                f"path must be a regular file, got {target}, a folder or device; choose another"
            )
        with temporary.open("xb") as file:
            if mode is not None:
                temporary.chmod(stat.S_IMODE(mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _synchronise(target.parent)
    except TalosOSError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
        raise TalosOSError(
            f"path must be writable, got {target} ({error.strerror or error}); {remedy}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _synchronise(folder: Path) -> None:
    """Bring the folder's new entry to the disk, on systems where a folder can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems keep no order to wait for
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
