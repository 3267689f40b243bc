"""The stages, the most telling first, and the parent that runs each as a process with a limit.

A stage that reaches its limit is killed with all that it started. What it had recorded stays, for
every record is written the moment it is known. The next stage then starts as if nothing had been.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benches.gpu import table
from benches.gpu.context import DEVICE_LOST, FAILED, read_stage
from benches.measure import ROOT

MINUTES = 9.0
STARTUP = 4.0
"""Seconds of a stage's limit that pass before its own clock starts: torch is imported."""
GRACE = 3.0
"""Seconds between the request to end and the kill."""
SHORTEST = 5.0
"""A stage with fewer seconds left is not started: importing torch alone takes as long."""


@dataclass(frozen=True)
class Stage:
    """One process, whose results are in <name>.json."""

    name: str
    limit_s: float
    title: str
    module: str = ""
    """By default the file of this name in `benches/gpu/stages`."""


REHEARSED_LIMIT_S = 300
"""A rehearsal takes two minutes on two idle cores, and more on busy ones."""
STAGES = (
    Stage("ceilings", 40, "versions, copy bandwidth, matrix rates, csrc built for this device"),
    Stage(
        "agreement", 130, "every op against its reference; host syncs, graphs, streams, launches"
    ),
    Stage("step", 110, "one optimizer step, ours by both backends beside the strong baselines"),
    Stage("methods", 150, "a whole iteration by method, bf16 autocast"),
    Stage(
        "scoring", 90, "the scoring kernel, threshold, single ops, scored batches, a calibration"
    ),
    Stage(
        "rest",
        75,
        "hardware counters, a checker of memory, constants, errors in ulp, the other tests",
    ),
)


@dataclass(frozen=True)
class Schedule:
    """One call of the command: where results go and how each stage is run."""

    out: Path
    minutes: float = MINUTES
    resume: bool = False
    rehearse: bool = False
    stages: Sequence[Stage] = STAGES

    def limit(self, stage: Stage) -> float:
        return max(stage.limit_s, REHEARSED_LIMIT_S) if self.rehearse else stage.limit_s

    def run(self, chosen: Sequence[Stage]) -> bool:
        """Run stages in their order; return whether all ended with nothing failed."""
        end = time.monotonic() + 60 * self.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        well = True
        for stage in chosen:
            if self.resume and read_stage(self.out / f"{stage.name}.json").complete:
                print(f"{stage.name}: nothing is missing", flush=True)
                continue
            seconds = min(self.limit(stage), end - time.monotonic() - GRACE)
            outcome = "not run" if seconds < SHORTEST else self._one(stage, seconds)
            well &= outcome == "done"
            print(f"{stage.name}: {outcome}", flush=True)
            self._write_table()
        print(table.summary(self._write_table()), flush=True)
        return well

    def _write_table(self) -> str:
        for partial in self.out.glob("*.partial"):  # of a process that was killed while it wrote
            partial.unlink()
        again = f"python -m benches.gpu --out {self.out} --resume"
        rehearse = " --rehearse" if self.rehearse else ""
        rows = [
            (each.name, each.title, f"{again} --only {each.name}{rehearse}") for each in self.stages
        ]
        page = table.page(self.out, rows)
        temporary = self.out / "table.partial"
        temporary.write_text(page)
        temporary.replace(self.out / "table.md")
        return page

    def _one(self, stage: Stage, seconds: float) -> str:
        start = time.monotonic()
        command = [sys.executable, "-m", stage.module or f"benches.gpu.stages.{stage.name}"]
        command += ["--out", str(self.out), "--stage-json", str(self.out / f"{stage.name}.json")]
        command += ["--rehearse"] if self.rehearse else []
        resume = ["--resume"] if self.resume else []
        with (self.out / "log.txt").open("a") as log:
            log.write(f"== {stage.name}: {stage.title}\n")
            log.flush()
            code: int | None = DEVICE_LOST
            while code == DEVICE_LOST and (left := start + seconds - time.monotonic()) > SHORTEST:
                limit = ["--seconds", f"{left - STARTUP:.0f}"]
                code = run_limited([*command, *limit, *resume], left, log, self._environment())
                resume = ["--resume", "--keep-failed"]
        took = f"{time.monotonic() - start:.0f} s"
        if code is None:
            return f"killed at its limit of {seconds:.0f} s"
        result = read_stage(self.out / f"{stage.name}.json")
        if code or not result.ended:
            return f"FAILED with exit code {code} after {took}, see log.txt"
        if failed := result.with_status(FAILED):
            return f"{len(failed)} of {len(result.records)} items FAILED, {took}"
        return "done" if result.complete else f"out of time after {took}"

    def _environment(self) -> dict[str, str]:
        """Return a stage's variables: a rehearsal uses no device, and interprets Triton's kernels.

        It has one thread: at tiny sizes threads wait for each other more than they compute.
        """
        hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | (hidden if self.rehearse else {})


def run_limited(
    command: Sequence[str],
    seconds: float,
    log: IO[str] | None = None,
    environment: dict[str, str] | None = None,
) -> int | None:
    """Run a command in a process group of its own; return its exit code, or None if it was killed.

    Its standard input ends when this process does, however that ends: see `end_with_parent`.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask what is left of a process's group to end, then kill it; the group has its number."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
