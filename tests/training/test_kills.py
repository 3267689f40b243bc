"""Trainings that are killed: a complete checkpoint is always found, and no bit is lost after it."""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import talos
from talos.files import load_file
from talos.training.checkpoints import steps_in
from tests.training.test_checkpoints import attention_and_data, only, train
from tests.training.test_loop import half_mask

CONTEXT = multiprocessing.get_context("forkserver")
# More by hand: TALOS_KILLS=200 python -m pytest tests/training/test_kills.py
KILLS = int(os.environ.get("TALOS_KILLS", "6"))
CALLS = {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "fsync", "write"}


def training(
    folder: Path, steps: int, every: int, progress: int | None = None, keep: int = 1
) -> talos.TaskVector:
    """Trains in a folder, or goes on there; writes a byte to `progress` for each step reached."""
    model, data = attention_and_data()
    options: dict[str, Any] = {"steps": steps, "every": every, "keep": keep, "resume": True}

    def on_step(event: talos.FineTuneStep) -> None:
        if progress is not None:
            os.write(progress, bytes([event.step]))

    return train(model, data, folder, mask=half_mask(model), on_step=on_step, **options)[1]


def dying(number: int, folder: Path, steps: int, every: int, progress: int) -> None:
    """Trains, and dies before a call of the system that changes the folder, counted from 0."""
    calls = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in CALLS and str(arguments[0]).startswith(str(folder)):
            calls += 1
            if calls > number:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, save = os.fsync, safetensors.torch.save_file

    def counted_fsync(descriptor: int) -> None:
        count("fsync", (folder,))
        fsync(descriptor)

    def save_in_pieces(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        whole = path.stat().st_size
        for size in (0, 8, whole // 2, whole - 1):  # as if the system wrote in pieces
            save(tensors, path, metadata)
            os.truncate(path, size)
            count("write", (path,))
        save(tensors, path, metadata)

    os.fsync, safetensors.torch.save_file = counted_fsync, save_in_pieces
    sys.addaudithook(count)
    training(folder, steps, every, progress)


def forked(function: Callable[..., object], *args: Any) -> tuple[int, int]:
    """Forks a child that gets `args` and a pipe for its progress; returns its id and the pipe."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function(*args, there)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(there)
    return child, here


def check(child: int, progress: int, folder: Path, every: int) -> tuple[int, int]:
    """Waits for a child and checks what it left; returns how it ended and the step it reached."""
    _, status = os.waitpid(child, 0)
    reached = max(os.read(progress, 1 << 16), default=0)
    os.close(progress)
    steps = steps_in(folder)
    for step in steps:
        load_file(folder / f"step-{step:08}.safetensors", "checkpoint", finite=False)
    assert reached - max(steps, default=0) <= every, (reached, steps)
    return os.waitstatus_to_exitcode(status), reached


def killed_at_every_call(place: Path) -> int:
    """The second checkpoint of two is written, and the first one removed; returns the calls."""
    whole = training(place / "whole", 2, 1, keep=2)
    number, ended = -1, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        number += 1
        folder = only(place / "whole", 1, place / f"run-{number}")
        ended, _ = check(*forked(dying, number, folder, 2, 1), folder, 1)
        assert steps_in(folder)[-1] == 1 or steps_in(folder) == [2]
        assert training(folder, 2, 1) == whole
        assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    assert ended == 0
    return number


def killed_at_any_moment(place: Path) -> int:
    """The same training is started again and again, as a cluster does, until it is over."""
    steps, every = 40, 4
    whole = training(place / "whole", steps, every)
    draw, kills, run = random.Random(0), 0, 0
    while kills < KILLS:
        folder = place / f"run-{run}"
        child, progress = forked(training, folder, steps, every)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(child, draw.choice([signal.SIGKILL, signal.SIGTERM]))
        ended, reached = check(child, progress, folder, every)
        kills += ended < 0
        if reached == steps or kills == KILLS:
            assert training(folder, steps, every) == whole
            assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
            run += 1
    return kills


def _alone(function: Callable[[Path], int], place: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        answers.put(function(place))
    except BaseException:
        answers.put(traceback.format_exc())


def alone(function: Callable[[Path], int], place: Path, seconds: int = 60 + 2 * KILLS) -> int:
    """Calls a function in a process without other threads, which may fork; waits so long."""
    answers = CONTEXT.Queue()
    process = CONTEXT.Process(target=_alone, args=(function, place, answers))
    process.start()
    try:
        answer = answers.get(timeout=seconds)
    finally:
        process.kill()
        process.join()
    assert isinstance(answer, int), answer
    return answer


def test_killed_at_every_call_that_changes_the_folder(tmp_path: Path) -> None:
    assert alone(killed_at_every_call, tmp_path) > 15


def test_killed_at_any_moment(tmp_path: Path) -> None:
    assert alone(killed_at_any_moment, tmp_path) == KILLS
