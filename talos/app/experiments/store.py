"""The folder of an experiment: a JSON for each cell, its vectors and masks, and one run at a time.

    OUT/cells/KIND/NAME.json     written last, in one atomic step: what makes a cell done
    OUT/vectors/NAME.safetensors
    OUT/masks/NAME.safetensors

NAME is made of readable words and 8 hex digits of the key's hash. The key holds everything that
decides a cell: settings, seeds, fingerprints of weights and data. So a cell of an edited recipe is
made anew if, and only if, something that decides it has changed.
"""

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talos.app.experiments.machine import made_by
from talos.app.report.results import json_text
from talos.errors import TalosOSError
from talos.files import atomic_write
from talos.files.atomic import system_errors
from talos.masks import Mask
from talos.task_vectors import TaskVector

if sys.platform != "win32":
    import fcntl

__all__ = ["Cell", "Key", "Store", "kept", "opened"]

_SCHEMA, _VERSION = "talos-cell", 1
_FILES = ("vectors", "masks")
_OWN = ("results.json", "report.html", "cells", *_FILES)
_LONGEST = 120  # letters of a name, before its hash


@dataclass(frozen=True)
class Key:
    """What decides a cell, and where it is written.

    Attributes:
        kind: the kind of cell.
        words: for its name: of the model, the method, the task.
        content: everything that decides it, JSON-able.
    """

    kind: str
    words: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """64 hex digits of the content."""
        return _digest(self.content)

    @property
    def name(self) -> str:
        """The name of its files, without a suffix."""
        words = (re.sub(r"[^\w.+-]+", "_", word).strip("._") or "_" for word in self.words)
        return f"{'-'.join(words)[:_LONGEST]}-{self.digest[:8]}"


@dataclass(frozen=True)
class Cell:
    """A finished cell.

    Attributes:
        key: what decided it.
        found: what was found, with numbers that repeat bit for bit.
        seconds: how long it took.
        peak_bytes: the most memory of the process, or of its GPU; None: not known.
        step_seconds: the median of a training step, of a cell that trains.
        made_by: the versions and the processor; they decide its last bits, and not its name.
    """

    key: Key
    found: dict[str, Any]
    seconds: float
    peak_bytes: int | None = None
    step_seconds: float | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)


class Store:
    """The cells of a folder; see `opened`.

    Args:
        folder: the folder.
        on_note: called with a sentence for each damaged cell.
    """

    def __init__(self, folder: Path, on_note: Callable[[str], object]) -> None:
        self.folder = folder
        self._on_note = on_note
        self._now = made_by()
        self._noted: list[Mapping[str, str]] = []

    def save(self, key: Key, value: Mask | TaskVector) -> dict[str, Any]:
        """Write a cell's vector or mask.

        Args:
            key: of the cell.
            value: the vector or mask.

        Returns:
            `file` and `bytes`, as a cell holds them.

        Raises:
            TalosOSError: it cannot be written.
        """
        name = f"{key.kind}s/{key.name}.safetensors"
        path = self.folder / name
        _make(path.parent)
        try:
            value.save(path)
        except TalosOSError as error:
            raise TalosOSError(str(error).replace("path must", "out must", 1)) from error
        return {"file": name, "bytes": path.stat().st_size}

    def read(self, key: Key) -> Cell | None:
        """Return a finished cell; None: it must be made.

        A cell that is damaged, or whose vector or mask is missing, must be made anew.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if (read["schema"], read["schema_version"]) != (_SCHEMA, _VERSION):
                raise ValueError("of another version")
            if _canonical(read["key"]) != _canonical(key.content):
                raise ValueError("of another cell")
            if read["digest"] != _digest(read["found"]):
                raise ValueError("its numbers have changed")
            facts = (read["seconds"], read["peak_bytes"], read["step_seconds"])
            cell = Cell(key, dict(read["found"]), *facts, dict(read["made_by"]))
            self._check_file(cell.found)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            self._on_note(f"{path} is damaged ({error}) and is made anew")
            return None
        self._compare(cell.made_by)
        return cell

    def forget(self, cell: Cell, why: object) -> None:
        """Remove a cell whose mask or vector is damaged, and say so.

        Raises:
            TalosOSError: a file cannot be removed.
        """
        path = self.folder / cell.found["file"]
        self._on_note(f"{path} is damaged ({why}) and is made anew")
        with _writable(path):
            self._path(cell.key).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def write(
        self,
        key: Key,
        found: Mapping[str, Any],
        seconds: float,
        peak_bytes: int | None,
        step_seconds: float | None,
    ) -> Cell:
        """Write a finished cell, and return it as it will be read.

        Raises:
            TalosOSError: it cannot be written.
            TalosValueError: a number is NaN or infinite.
        """
        path = self._path(key)
        _make(path.parent)
        text = json_text(
            {
                "schema": _SCHEMA,
                "schema_version": _VERSION,
                "kind": key.kind,
                "key": dict(key.content),
                "found": dict(found),
                "digest": _digest(found),
                "made_by": self._now,
                "seconds": round(seconds, 3),
                "peak_bytes": peak_bytes,
                "step_seconds": step_seconds,
            }
        )
        atomic_write(path, lambda new: new.write_text(text, encoding="utf-8"))
        read = json.loads(text)
        facts = (read["seconds"], peak_bytes, step_seconds)
        return Cell(key, read["found"], *facts, read["made_by"])

    def _compare(self, made: Mapping[str, str]) -> None:
        """Say once that cells of other versions or of another processor are kept."""
        others = [
            f"{name} {made.get(name, 'unknown')} (now {now})"
            for name, now in self._now.items()
            if made.get(name) != now
        ]
        if others and made not in self._noted:
            self._noted.append(made)
            self._on_note(
                f"cells of an earlier run are kept, which were made with {', '.join(others)}; "
                "their last digits may differ, pass --overwrite to make all anew"
            )

    def _path(self, key: Key) -> Path:
        return self.folder / "cells" / key.kind / f"{key.name}.json"

    def _check_file(self, found: Mapping[str, Any]) -> None:
        if "file" in found:
            size = (self.folder / found["file"]).stat().st_size
            if size != found["bytes"]:
                raise ValueError(f"{found['file']} has {size} bytes, not {found['bytes']}")


@contextmanager
def opened(
    out: Path, *, overwrite: bool = False, on_note: Callable[[str], object] = lambda note: None
) -> Iterator[Store]:
    """Open the folder of an experiment for one run; a run that was stopped goes on there.

    Args:
        out: a new or empty folder, or that of an earlier run.
        overwrite: remove what an earlier run made; other files stay.
        on_note: called with a sentence for each damaged cell.

    Yields:
        The cells that are done already, and the place for new ones.

    Raises:
        TalosOSError: it is a file, holds other files, cannot be written, or another run uses it.
    """
    check(out, overwrite=overwrite)
    with _writable(out):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with _alone(out):
        if overwrite:
            clear(out)
        yield Store(out, on_note)


def check(out: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that an experiment cannot be written to; nothing is changed.

    Args:
        out: the folder.
        overwrite: whether other files in it are left alone instead of refused.

    Raises:
        TalosOSError: it is a file, or holds other files than those of an experiment.
    """
    if out.exists() and not out.is_dir():
        raise TalosOSError(f"out must be a folder, got the file {out}")
    if overwrite or not out.exists():
        return
    others = [path for path in out.rglob("*") if path.is_file()]
    if others and not (out / "cells").is_dir():
        raise TalosOSError(
            f"out must be a new folder or that of an experiment, got {out} with files in it; take "
            "another, or pass --overwrite to leave them there"
        )


def clear(out: Path) -> None:
    """Remove what an experiment made in a folder.

    Raises:
        TalosOSError: a file cannot be removed.
    """
    with _writable(out):
        for path in _files(out):
            path.unlink()
    for folder in (*sorted(out.glob("cells/*")), *(out / name for name in ("cells", *_FILES))):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def kept(out: Path) -> str:
    """Say what a run that was stopped leaves in its folder."""
    count = len(list(out.glob("cells/*/*.json")))
    if not count:
        return "nothing was written"
    cells = "1 finished cell is" if count == 1 else f"{count} finished cells are"
    return f"{cells} kept in {out}; the same command goes on from there"


def _files(out: Path) -> list[Path]:
    patterns = ("results.json", "report.html", "cells/*/*.json")
    return [
        path
        for pattern in (*patterns, *(f"{folder}/*.safetensors" for folder in _FILES))
        for path in sorted(out.glob(pattern))
    ]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TalosOSError(
                f"out must be a folder that no other run writes, got {folder}, where one is at "
                "work; wait for it, or take another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _writable(out: Path) -> Any:
    return system_errors(f"out must be writable, got {out}", "check its permissions and the disk")


def _digest(content: Any) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False)
