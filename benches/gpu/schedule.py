"""The stages by value, and the parent that runs each as a process with a limit of its own.

A stage that reaches its limit is killed with all that it started; what it had recorded stays, for
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
from benches.gpu.context import DEVICE_LOST, read_stage

ROOT = Path(__file__).resolve().parent.parent.parent
MINUTES = 9.0
STARTUP = 4.0
"""Seconds of a stage's limit that pass before its own clock starts: torch is imported."""
GRACE = 3.0
"""Seconds between the request to end and the kill."""
SHORTEST = 5.0
"""A stage with fewer seconds left is not started: importing torch alone takes as long."""


@dataclass(frozen=True)
class Stage:
    """One process: `python -m <module>`, its results in <name>.json."""

    name: str
    module: str
    limit_s: float
    title: str
    rehearse_limit_s: float = 150

    def limit(self, rehearse: bool) -> float:
        return self.rehearse_limit_s if rehearse else self.limit_s


STAGES = (
    Stage(
        "ceilings",
        "benches.gpu.stages.ceilings",
        40,
        "device, versions, copy bandwidth, matrix rates, csrc built for this device",
    ),
    Stage(
        "agreement",
        "benches.gpu.stages.agreement",
        130,
        "every op against its reference; host syncs, captured steps, streams, launches",
    ),
    Stage(
        "step",
        "benches.gpu.stages.step",
        110,
        "one optimizer step, ours by both backends beside the strong baselines",
    ),
    Stage(
        "methods",
        "benches.gpu.stages.methods",
        150,
        "a whole iteration by method, bf16 autocast",
    ),
    Stage(
        "scoring",
        "benches.gpu.stages.scoring",
        90,
        "the scoring kernel, threshold, single ops, scored batches, a calibration",
    ),
    Stage(
        "rest",
        "benches.gpu.stages.rest",
        75,
        "hardware counters, a checker of memory, constants never measured, the other tests",
    ),
)


@dataclass(frozen=True)
class Run:
    """One call of the command: where results go and how each stage is run."""

    out: Path
    minutes: float = MINUTES
    resume: bool = False
    rehearse: bool = False

    def command(self, stage: Stage, seconds: float | None = None) -> list[str]:
        command = [sys.executable, "-m", stage.module, "--out", str(self.out)]
        command += ["--stage-json", str(self.out / f"{stage.name}.json")]
        command += ["--rehearse"] if self.rehearse else []
        command += ["--resume"] if self.resume else []
        return command + ([] if seconds is None else ["--seconds", f"{seconds:.0f}"])

    def again(self, stage: Stage) -> str:
        """The command that runs a stage alone, as a person would type it."""
        rehearse = " --rehearse" if self.rehearse else ""
        return f"python -m benches.gpu --out {self.out} --resume --only {stage.name}{rehearse}"

    def stages(self, stages: Sequence[Stage], chosen: Sequence[Stage]) -> bool:
        """Runs those chosen in their order; whether all ran to their end with nothing failed."""
        end = time.monotonic() + 60 * self.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        well = True
        for stage in chosen:
            if self.resume and read_stage(self.out / f"{stage.name}.json").complete:
                print(f"{stage.name}: nothing is missing", flush=True)
                continue
            seconds = min(stage.limit(self.rehearse), end - time.monotonic() - GRACE)
            outcome = "not run" if seconds < SHORTEST else self._one(stage, seconds)
            well &= outcome == "done"
            print(f"{stage.name}: {outcome}", flush=True)
            self.write_table(stages)
        print(table.summary(self.write_table(stages)), flush=True)
        return well

    def write_table(self, stages: Sequence[Stage]) -> str:
        for partial in self.out.glob("*.partial"):  # of a process that was killed while it wrote
            partial.unlink()
        told = [(stage.name, stage.title, self.again(stage)) for stage in stages]
        temporary = self.out / "table.partial"
        page = table.page(self.out, told)
        temporary.write_text(page)
        temporary.replace(self.out / "table.md")
        return page

    def _one(self, stage: Stage, seconds: float) -> str:
        start = time.monotonic()
        with (self.out / "log.txt").open("a") as log:
            log.write(f"== {stage.name}: {stage.title}\n")
            log.flush()
            again: list[str] = []
            code: int | None = DEVICE_LOST
            while code == DEVICE_LOST and (left := start + seconds - time.monotonic()) > SHORTEST:
                command = [*self.command(stage, left - STARTUP), "--end-with-parent", *again]
                code = run_limited(command, left, log, self._environment())
                again = ["--resume", "--keep-failed"]
        took = f"{time.monotonic() - start:.0f} s"
        if code is None:
            return f"killed at its limit of {seconds:.0f} s"
        result = read_stage(self.out / f"{stage.name}.json")
        if code or not result.ended:
            return f"FAILED with exit code {code} after {took}, see log.txt"
        if result.failed:
            return f"{len(result.failed)} of {len(result.records)} items FAILED, {took}"
        return "done" if result.complete else f"out of time after {took}"

    def _environment(self) -> dict[str, str]:
        """A rehearsal sees no device, even where there is one, and interprets Triton's kernels.

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
    """Runs a command in a process group of its own; its exit code, or None if it was killed.

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
    """Asks what is left of a process's group to end, then kills it; the group has its number."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
