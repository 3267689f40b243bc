"""Whether the device computes what the reference does: the tests, then whole steps."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from benches import measure
from benches.gpu.checks import CHECKS
from benches.gpu.context import DONE, Context, stage_main

CHECKS_NEED = 40.0
"""Seconds of the stage that the tests leave to what follows them."""
MOST_NAMES = 200
OUTCOME = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (.*?) *$", re.MULTILINE)
"""A line that pytest-xdist prints as soon as a test is done."""


def run(context: Context) -> None:
    run_tests(context, "tests", context.sizes.tests, context.left() - CHECKS_NEED)
    for name, check in CHECKS.items():
        for compact in (False, True):
            gradients = "compact gradients" if compact else "dense gradients"
            context.run(f"{name}, {gradients}", partial(check, context.device, compact=compact))


def run_tests(context: Context, key: str, arguments: Sequence[str], limit: float) -> None:
    """Run tests in many processes; those that failed make it an item that failed."""
    if not context.todo(key):
        return
    values = outcomes(arguments, context.sizes.processes, limit)
    if values["failed"] or not values["passed"] or not values["ended"]:
        cut = "" if values["ended"] else ", the rest was cut at its limit"
        found = f"{values['failed']} tests failed, {values['passed']} passed{cut}"
        context.failed(key, AssertionError(found), **values)
    else:
        context.record(key, DONE, **values)


def outcomes(arguments: Sequence[str], processes: int, limit: float) -> dict[str, Any]:
    """Return the results of the tests until their end or the limit, and whether they `ended`."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-n", str(processes), "--dist", "worksteal"]
    # a borrowed machine has its own versions, and their warnings
    command += ["-W", "default", "-o", "minversion=7", "-r", "fE", "--maxfail=100"]
    command += ["--continue-on-collection-errors", *arguments]  # a file's, or nothing would run
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command,
            cwd=measure.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(max(limit, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()  # its workers end with it
            process.wait()
            code = None
        file.seek(0)
        printed = file.read()
    print(printed, flush=True)
    results = {name: outcome for outcome, name in OUTCOME.findall(printed)}
    errors = re.findall(
        r"^ERROR (\S+\.py)(?: |$)", printed, re.MULTILINE
    )  # of files that were not imported
    results |= dict.fromkeys(errors, "ERROR")
    counts = Counter(results.values())
    failed = [name for name, outcome in results.items() if outcome in {"FAILED", "ERROR"}]
    return {
        "passed": counts["PASSED"],
        "failed": len(failed),
        "skipped": counts["SKIPPED"],
        "names": failed[:MOST_NAMES],
        "ended": code is not None,
    }


if __name__ == "__main__":
    stage_main(run)
