"""Whether the device computes what the reference does: the tests, then whole steps."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benches import measure
from benches.gpu.checks import CHECKS
from benches.gpu.context import Context, stage_main
from benches.gpu.outcomes import VARIABLE, summary

CHECKS_NEED = 40.0
"""Seconds of the stage that the tests leave to what follows them."""


def run(context: Context) -> None:
    if context.todo("tests"):
        limit = context.left() - CHECKS_NEED
        record_tests(context, "tests", context.sizes.tests, limit)
    for name, check in CHECKS.items():
        for compact in (False, True):
            gradients = "compact gradients" if compact else "dense gradients"
            context.run(f"{name}, {gradients}", partial(check, context.device, compact=compact))


def record_tests(context: Context, key: str, arguments: Sequence[str], limit: float) -> None:
    """Runs tests in many processes; those that failed make it an item that failed."""
    values = outcomes(arguments, context.sizes.processes, limit)
    if values["failed"] or not values["passed"] or not values["ended"]:
        cut = "" if values["ended"] else ", the rest was cut at its limit"
        said = f"{values['failed']} tests failed, {values['passed']} passed{cut}"
        context.failed(key, AssertionError(said), **values)
    else:
        context.record(key, **values)


def outcomes(arguments: Sequence[str], processes: int, limit: float) -> dict[str, Any]:
    """What became of the tests until their end or the limit, which `ended` tells apart."""
    command = [sys.executable, "-m", "pytest", "-p", "benches.gpu.outcomes", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-n", str(processes), "--dist", "worksteal"]
    # a borrowed machine has its own versions, and their warnings
    command += ["-W", "default", "-o", "minversion=7", "-r", "fE", "--maxfail=100"]
    command += ["--continue-on-collection-errors", *arguments]  # a file's, or nothing would run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes")
        environment = os.environ | {VARIABLE: str(path), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=measure.ROOT, env=environment, stdin=subprocess.DEVNULL
        )
        try:
            process.wait(max(limit, 1.0))
            ended = True
        except subprocess.TimeoutExpired:
            process.kill()  # its workers end with it
            process.wait()
            ended = False
        return {**summary(path), "ended": ended}


if __name__ == "__main__":
    stage_main(run)
