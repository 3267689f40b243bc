"""What a stage is given: the device, the sizes, its time, and the file of its records.

    def run(context: Context) -> None:
        context.run("a key", lambda: {"seconds": ...})

    if __name__ == "__main__":
        stage_main(run)

A stage's JSON is rewritten whole as each record is known, so a stage that is killed keeps what it
found. Each item of work has a key; one that raises is recorded as failed and the stage goes on.
"""

import argparse
import json
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benches import measure
from benches.gpu.device import Device, find_device
from benches.gpu.sizes import FULL, TINY, Sizes
from benches.results import write_json
from benches.work import Work

REPLAYED, EAGER = "replayed", "eager"
SLOW_SECONDS = 0.5
DEVICE_LOST = 75
"""Exit code of a stage whose device no longer answers: a new process continues the stage."""
DONE, FAILED, RUNNING, LATE = "done", "failed", "running", "out of time"


@dataclass(frozen=True)
class StageResult:
    """The content of a stage's JSON; empty where there is no file."""

    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    seconds: float = 0.0

    def with_status(self, status: str) -> list[str]:
        return [key for key, record in self.records.items() if record["status"] == status]

    @property
    def complete(self) -> bool:
        return self.ended and len(self.with_status(DONE)) == len(self.records)


def read_stage(path: Path) -> StageResult:
    if not path.exists():
        return StageResult()
    content = json.loads(path.read_text())
    return StageResult(**{name: content[name] for name in StageResult.__dataclass_fields__})


class Context:
    """One run of one stage.

    `device` and `sizes` are those of `benches.gpu.device` and `benches.gpu.sizes`, `out` is the
    folder of all results, `deadline` a moment of time.monotonic().
    """

    def __init__(
        self,
        device: Device,
        sizes: Sizes,
        out: Path,
        deadline: float,
        path: Path,
        *,
        machine: Mapping[str, object],
        resume: bool = False,
        keep_failed: bool = False,
    ) -> None:
        self._kept = {DONE, FAILED} if keep_failed else {DONE}
        self.device, self.sizes, self.out, self.deadline = device, sizes, out, deadline
        self._path, self._machine = path, machine
        self._start = time.monotonic()
        before = read_stage(path) if resume else StageResult()
        self._seconds_before = before.seconds
        self._records = {key: dict(record) for key, record in before.records.items()}
        self._write(ended=False)

    def left(self) -> float:
        """Return the seconds until the stage is killed."""
        return self.deadline - time.monotonic()

    def todo(self, key: str) -> bool:
        """Return whether an item was not done by a run that this one resumes."""
        return self._records.get(key, {}).get("status") not in self._kept

    def record(self, key: str, status: str, **values: object) -> None:
        self._records[key] = {**values, "status": status}
        self._write(ended=False)

    def failed(self, key: str, error: BaseException, **values: object) -> None:
        traceback.print_exception(error)  # whole, in the log
        last = traceback.format_exception_only(error)[-1].strip()
        self.record(key, FAILED, **values, error=last)

    def run(self, key: str, work: Callable[[], Mapping[str, object]], needs: float = 0.0) -> None:
        """Do one item and record what it returns.

        With fewer than `needs` seconds left it is recorded as out of time; a resumed run does it.
        Memory is freed after it in any case. Where the device is lost then, as after an access out
        of bounds, the item has failed and the stage ends.
        """
        if not self.todo(key):
            return
        self._records.pop(key, None)  # the order of a file is that of the work
        if self.left() <= needs:
            self.record(key, LATE)
            return
        self.record(key, RUNNING)
        start = time.monotonic()
        try:
            values = dict(work())
            self.record(key, DONE, **values, item_seconds=round(time.monotonic() - start, 3))
        except Exception as error:
            self.failed(key, error)
        try:
            self.device.free()
        except RuntimeError as error:
            self.failed(key, error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(DEVICE_LOST)  # an end by way of destructors, which use the device, may abort

    def share(self, name: str, rate: float) -> float | None:
        """Return a rate over a roofline of the first stage: `copy`, `bf16`, `tf32` or `fp32`."""
        record = read_stage(self.out / "ceilings.json").records.get(name, {})
        ceiling = record.get("bytes_per_second" if name == "copy" else "flops_per_second")
        return rate / float(ceiling) if ceiling else None

    def timed(self, work: Work, how: str = REPLAYED, matrix: str | None = None) -> dict[str, Any]:
        """Check and time a form; `matrix` is the roofline of its operations.

        Replayed by a graph, times are the device's alone; eager, they are what a loop in Python
        waits for. What takes more than SLOW_SECONDS is timed once.
        """
        work.check()
        (first,) = measure.seconds(work.step, 1)
        times = [first]
        if first <= SLOW_SECONDS:
            timer = self.device.time_replayed if how == REPLAYED else self.device.time_eager
            times = timer(work.step, self.sizes.rounds)
        seconds, spread = measure.median_and_spread(times)
        found: dict[str, Any] = {"how": how, "seconds": seconds, "spread": spread}
        if work.bytes_moved is not None:
            rate = work.bytes_moved / seconds
            found |= {"bytes_moved": work.bytes_moved, "bytes_per_second": rate}
            found["share"] = self.share("copy", rate)
        if work.flops is not None:
            rate = work.flops / seconds
            found |= {"flops": work.flops, "flops_per_second": rate}
            found["matrix_share"] = None if matrix is None else self.share(matrix, rate)
        return found

    def end(self) -> None:
        """Record that the stage came to its end, whatever failed on the way."""
        self._write(ended=True)

    def _write(self, *, ended: bool) -> None:
        content = {
            "machine": self._machine,
            "ended": ended,
            "seconds": round(self._seconds_before + time.monotonic() - self._start, 1),
            "records": self._records,
        }
        write_json(self._path, content)


def end_with_parent() -> None:
    """Kill this process's group once its parent is gone, which ends the pipe of its input."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def wait() -> None:
        os.read(0, 1)  # not by sys.stdin, whose lock an exit would wait for
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def stage_main(run: Callable[[Context], None], argv: Sequence[str] | None = None) -> None:
    """Make a stage's context from the command line and run it."""
    start = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage-json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--keep-failed", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args(argv)
    end_with_parent()

    torch.backends.cudnn.allow_tf32 = False  # the rooflines and the checks say what they use
    device = find_device()
    if device.kind == "cpu" and not options.rehearse:
        sys.exit("a stage must run where torch finds a device, got none; add --rehearse")
    context = Context(
        device,
        TINY if options.rehearse else FULL,
        options.out,
        start + options.seconds,
        options.stage_json,
        machine=measure.machine() | {"rehearsed": options.rehearse},
        resume=options.resume,
        keep_failed=options.keep_failed,
    )
    run(context)
    context.end()
