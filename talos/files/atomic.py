"""Atomic writing: readers find the old file or folder or the whole new one, never a mix."""

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from talos.errors import TalosOSError

if sys.platform != "win32":
    import fcntl

__all__ = ["atomic_folder", "atomic_write", "sweep", "system_errors"]

_PREFIX, _SUFFIX = ".talos-", ".tmp"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file so that readers, also after a crash, find the old one or the whole new one.

    The new file is written in a temporary folder beside `path` and then renamed. File and folder
    are synchronised to the disk. A link stays; the file that it points to is replaced. An existing
    file keeps its permissions. The temporary folder is removed after every error. One that a killed
    process left is removed by the next writer. Of two simultaneous writers the last one wins.

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
    with _writable(target):
        if target.exists() and not target.is_file():
            raise TalosOSError(
                f"path must be a regular file, got {target}, a folder or device; choose another"
            )
        with _workplace(target.parent) as folder:
            new = Path(folder, "new")
            new.touch()
            mode = stat.S_IMODE((target if target.exists() else new).stat().st_mode)
            write(new)
            with new.open("r+b") as file:
                new.chmod(mode)
                os.fsync(file.fileno())
            new.replace(target)
        _synchronise(target.parent)


def atomic_folder(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False
) -> None:
    """Write a folder so that readers, also after a crash, find the old one or the whole new one.

    As `atomic_write`, but of two simultaneous writers the first one wins, unless `overwrite` is
    True.

    Args:
        path: the folder; the one around it must exist.
        write: called with an empty folder to write to.
        overwrite: replace an existing folder with all that it holds.

    Raises:
        TalosOSError: the folder cannot be written or is not empty, or the system cannot replace an
            existing one in one step.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_folder(Path(folder, "a"), lambda new: Path(new, "b").write_bytes(b"whole"))
        ...     Path(folder, "a", "b").read_bytes()
        b'whole'
    """
    target = Path(os.path.realpath(path))
    with _writable(target):
        with _workplace(target.parent) as folder:
            new = Path(folder, "new")
            new.mkdir()
            write(new)
            for each in new.rglob("*"):
                if each.is_file():
                    with each.open("rb") as file:
                        os.fsync(file.fileno())
                else:
                    _synchronise(each)
            _synchronise(new)
            if not (overwrite and target.exists()):
                new.rename(target)  # fails if the target holds files
            elif not _exchanged(new, target):
                raise TalosOSError(
                    f"path must not exist, got {target}, which this system cannot replace in one "
                    "step; remove it first"
                )
        _synchronise(target.parent)


def sweep(folder: Path) -> None:
    """Remove the temporary folders that killed writers left in a folder, none of a live one."""
    for abandoned in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with _locked(abandoned, wait=False) as locked:
            if locked:
                shutil.rmtree(abandoned, ignore_errors=True)


@contextlib.contextmanager
def system_errors(problem: str, remedy: str) -> Iterator[None]:
    """Raise a TalosOSError in place of an error of the system, whose words it holds.

    Args:
        problem: what must be, and what was found.
        remedy: what to do about it.

    Raises:
        TalosOSError: the block raised an OSError.
    """
    try:
        yield
    except TalosOSError:
        raise
    except OSError as error:
        raise TalosOSError(f"{problem} ({error.strerror or error}); {remedy}") from error


def _writable(target: Path) -> contextlib.AbstractContextManager[None]:
    return system_errors(
        f"path must be writable, got {target}",
        "check that its folder exists, may be written and has room",
    )


@contextlib.contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """Yield an empty folder inside `parent`, and remove it at the end.

    It is locked while its process lives. So the next writer knows those that a crash left behind.
    """
    sweep(parent)
    while True:
        folder = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, parent))
        with _locked(folder, wait=True):
            if not folder.exists():  # another writer took it for abandoned before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder; yield False if another has it, or the file system has no locks."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False: the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0


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
