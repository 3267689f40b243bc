"""What a stage is given: the device, the sizes, its time, and the file that its records go to.

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
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches.results_file import write_json

DEVICE_LOST = 75
"""Exit code of a stage whose device answers no longer: a new process takes up what is left."""
DONE, FAILED, RUNNING, LATE = "done", "failed", "running", "out of time"


@dataclass(frozen=True)
class StageResult:
    """What a stage's JSON says; of no file, nothing."""

    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    seconds: float = 0.0

    def with_status(self, status: str) -> list[str]:
        return [key for key, record in self.records.items() if record["status"] == status]

    @property
    def failed(self) -> list[str]:
        return self.with_status(FAILED)

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

    `device` is what `benches.gpu.device` makes of the machine, `sizes` how large everything is,
    `out` the folder of all results, `deadline` a moment of time.monotonic().
    """

    def __init__(
        self,
        device: Any,
        sizes: Any,
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
        """Seconds until the stage is killed."""
        return self.deadline - time.monotonic()

    def todo(self, key: str) -> bool:
        """Whether an item is to be done: not done before, in a run that is resumed."""
        return self._records.get(key, {}).get("status") not in self._kept

    def record(self, key: str, **values: object) -> None:
        self._records[key] = {**values, "status": DONE}
        self._write(ended=False)

    def failed(self, key: str, error: BaseException, **values: object) -> None:
        traceback.print_exception(error)  # whole, in the log
        last = traceback.format_exception_only(error)[-1].strip()
        self._records[key] = {**values, "status": FAILED, "error": last}
        self._write(ended=False)

    def run(self, key: str, work: Callable[[], Mapping[str, object]], needs: float = 0.0) -> None:
        """Does one item and records what it returns.

        With fewer than `needs` seconds left it is recorded as out of time, to be done by a run that
        is resumed. Memory is given back after it, whatever became of it. Where the device then says
        that it is lost, as after an access out of bounds, the item has failed and the stage ends.
        """
        if not self.todo(key):
            return
        self._records.pop(key, None)  # the order of a file is that of the work
        self._records[key] = {"status": RUNNING}
        if self.left() <= needs:
            self._records[key] = {"status": LATE}
            self._write(ended=False)
            return
        self._write(ended=False)
        start = time.monotonic()
        try:
            values = dict(work())
            self.record(key, **values | {"item_seconds": round(time.monotonic() - start, 3)})
        except Exception as error:
            self.failed(key, error)
        try:
            self.device.free()
        except RuntimeError as error:
            self.failed(key, error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(DEVICE_LOST)  # an end by way of destructors, which ask the device, may abort

    def found(self, key: str) -> dict[str, Any]:
        """The values recorded for a key; none if it failed or was not done."""
        record = self._records.get(key, {})
        return record if record.get("status") == DONE else {}

    def ceiling(self, name: str) -> float | None:
        """A roofline of the first stage, `copy`, `bf16`, `tf32` or `fp32`; None if not measured."""
        record = read_stage(self.out / "ceilings.json").records.get(name, {})
        rate = record.get("bytes_per_second" if name == "copy" else "flops_per_second")
        return None if rate is None else float(rate)

    def share(self, name: str, rate: float) -> float | None:
        """A rate over the roofline of that name."""
        ceiling = self.ceiling(name)
        return None if not ceiling else rate / ceiling

    def end(self) -> None:
        """The stage came to its end, whatever failed on the way."""
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
    """Kills this process's group, once standard input has ended because the parent is gone."""
    os.read(0, 1)  # not by sys.stdin, whose lock an exit would wait for
    os.killpg(0, signal.SIGKILL)


def stage_main(run: Callable[[Context], None], argv: Sequence[str] | None = None) -> None:
    """The command line of a stage: makes its context and runs it."""
    start = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage-json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--keep-failed", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--end-with-parent", action="store_true")
    options = parser.parse_args(argv)
    if options.end_with_parent:
        threading.Thread(target=end_with_parent, daemon=True).start()

    import torch

    from benches import measure
    from benches.gpu.device import find_device
    from benches.gpu.sizes import FULL, TINY

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
