"""What writers that were killed leave, and who removes it."""

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from talos.files import atomic_write
from tests.training.test_kills import alone, forked


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".tmp"]


def holding(path: Path, started: int) -> None:
    """Begins to write a file, and ends when there is a file `go`."""

    def write(new: Path) -> None:
        new.write_bytes(b"whole")
        os.write(started, b"x")
        until = time.monotonic() + 60  # it outlives no test
        while not path.with_name("go").exists() and time.monotonic() < until:
            time.sleep(0.002)

    atomic_write(path, write)


def killed_and_alive(place: Path) -> int:
    """Leaves what a killed writer left, beside a writer that lives."""
    dead, started = forked(holding, place / "dead")
    os.read(started, 1)
    (left,) = leftovers(place)
    live, started = forked(holding, place / "live")
    os.read(started, 1)
    assert left.exists()  # its writer still lives
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    assert len(leftovers(place)) == 2
    atomic_write(place / "new", lambda new: new.write_bytes(b"new"))
    assert len(leftovers(place)) == 1
    assert not left.exists()

    (place / "go").touch()
    assert os.waitpid(live, 0)[1] == 0
    assert leftovers(place) == []
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        "live": b"whole", "new": b"new", "go": b""
    }  # fmt: skip
    return 0


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_of_a_live_one(
    tmp_path: Path,
) -> None:
    alone(killed_and_alive, tmp_path)


def test_where_there_are_no_locks_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".talos-of-somebody.tmp").mkdir()
    atomic_write(tmp_path / "a", lambda new: new.write_bytes(b"whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".talos-of-somebody.tmp"}
