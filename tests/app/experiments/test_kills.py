"""Experiments that are stopped at any moment: they end with the same numbers, bit for bit."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from talos.app.experiments.run import run_experiment
from talos.app.models import Encoder
from talos.errors import TalosOSError
from tests.app.experiments.tiny_experiment import (
    run_tiny,
    tiny_encoder,
    tiny_recipe,
    tiny_tasks,
)
from tests.training.test_kills import alone, forked

KILLS = 10
SHORT: dict[str, Any] = {"seeds": [0], "evaluation": {"measures": ["addition", "interference"]}}


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """The results without what differs from run to run."""
    return {k: v for k, v in results.items() if k not in ("created", "machine", "timings")}


def run(out: Path, encoder: Encoder, **options: Any) -> dict[str, Any]:
    given = {"encoders": {"tiny": encoder}, "tasks": tiny_tasks()}
    return numbers(run_experiment(tiny_recipe(**SHORT), out, **given | options))


def check_folder(out: Path, files: set[str]) -> None:
    """Nothing is left of a write that was cut off."""
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == files


def run_in_child(out: Path, encoder: Encoder, _: int) -> None:
    run(out, encoder)


def killed_at_random(place: Path) -> int:
    encoder = tiny_encoder(place / "model")
    start = time.monotonic()
    whole = run(place / "whole", encoder)
    most = (time.monotonic() - start) / 6
    files = {path.relative_to(place / "whole").as_posix() for path in (place / "whole").rglob("*")}
    draw, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        out = place / f"run-{number}"
        child, progress = forked(run_in_child, out, encoder)
        time.sleep(draw.uniform(0, most))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(progress)
        kills += status < 0
        if status == 0 or kills == KILLS:
            assert run(out, encoder) == whole
            check_folder(out, files)
            number += 1
    return kills


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_ten_times_ends_with_the_same_numbers(tmp_path: Path) -> None:
    assert alone(killed_at_random, tmp_path, seconds=300) == KILLS


def test_a_run_stopped_after_every_few_steps_ends_with_the_same_numbers(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    encoder = tiny_encoder(tmp_path / "model")
    whole = run(tmp_path / "whole", encoder)
    files = {p.relative_to(tmp_path / "whole").as_posix() for p in (tmp_path / "whole").rglob("*")}
    out, stops = tmp_path / "out", 0

    def stop_after(count: int) -> Callable[[object], None]:
        calls = iter(range(count))

        def stop(_: object) -> None:
            if next(calls, None) is None:
                raise Stopped

        return stop

    found = None
    while found is None:
        done = len(list(out.glob("cells/*/*.json")))  # each is one call
        with suppress(Stopped):
            found = run(out, encoder, on_progress=stop_after(done + 17))
        stops += found is None
    assert stops > 3
    assert found == whole
    check_folder(out, files)


def test_a_full_disk_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    calls, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TalosOSError, match="No space left"):
            run_tiny(out, tiny_recipe(**SHORT))
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert done
    assert not list(out.rglob(".talos-*"))
    again = run_tiny(out, tiny_recipe(**SHORT))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert numbers(again) == numbers(run_tiny(tmp_path / "whole", tiny_recipe(**SHORT)))
