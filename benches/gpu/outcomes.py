"""A pytest plugin: writes the outcome of each test as it is known, so that a killed run keeps them.

TALOS_OUTCOMES=PATH python -m pytest -p benches.gpu.outcomes ...
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "TALOS_OUTCOMES"
MOST_NAMES = 200


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that has no such
        config.pluginmanager.register(Outcomes(Path(os.environ[VARIABLE])))


class Outcomes:
    """One line a test: what it is called and what became of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report.nodeid, "failed")

    def _add(self, name: str, outcome: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([name, outcome]) + "\n")


def summary(path: Path) -> dict[str, Any]:
    """Counts in all and by file, and the names of what failed."""
    outcomes: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, outcome = json.loads(line)
        if outcomes.get(name) != "failed":  # a test may pass and its teardown fail
            outcomes[name] = outcome
    counts = Counter(outcomes.values())
    files: dict[str, Counter[str]] = {}
    for name, outcome in outcomes.items():
        files.setdefault(name.split("::")[0], Counter())[outcome] += 1
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "by_file": {name: dict(each) for name, each in files.items()},
        "names": failed[:MOST_NAMES],
    }
