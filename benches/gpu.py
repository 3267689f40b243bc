"""Everything that a GPU can say about the project, in one command: python -m benches.gpu --out DIR

Builds csrc in place, runs tests/ on the device, then whole iterations by method, then the benches
of single ops: what matters most comes first, so that a machine that is lent for half an hour and
taken away has said it. `--only methods` measures iterations alone. It needs torch, triton, pytest,
pytest-benchmark, transformers and open_clip on the path, no registry and no installed project.
What it leaves in DIR, each file complete as soon as it is there:

- build.log: what the compiler said
- tests.json: counts and the names of what failed; tests.log: the whole output
- one JSON an op: every form measured, each with its machine, versions and commit
- table.md: one page of it all
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from benches import measure
from benches.results_file import all_results, write_json
from benches.shapes import SHAPES
from benches.table import METHODS, Record, table_lines
from talos.costs.results import table_lines as costs_lines

STEPS = ("build", "tests", "methods", "benches", "table")
MODELS = ("vit-b-32", "t5-large", "vit-l-14", "minilm")  # in the order of what they tell


@dataclass(frozen=True)
class Run:
    """One call of this module: where results go, what is measured, which tests run."""

    out: Path
    shapes: Sequence[str]
    markers: str

    def command(self, step: str) -> list[str]:
        """The subprocess of a step; the table needs none."""
        if step == "build":
            return [sys.executable, "setup.py", "egg_info", "build_ext", "--inplace"]
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
        if step == "tests":
            # Warnings are errors with the pinned versions only; a borrowed machine has its own.
            report = f"--junitxml={self.out / 'tests.xml'}"
            marked = ["-m", self.markers] if self.markers else []
            return [*pytest, "tests", "-W", "default", report, *marked]
        common = ["-W", "default", f"--out={self.out}"]
        if step == "methods":
            shapes = [f"--shape={name}" for name in MODELS if name in self.shapes]
            return [*pytest, "benches/bench_methods.py", *common, *shapes]
        if step == "benches":
            shapes = [f"--shape={name}" for name in self.shapes]
            apart = "--ignore=benches/bench_methods.py"
            return [*pytest, "benches", apart, *common, *shapes]
        return []

    def build(self) -> bool:
        return self._logged("build") == 0

    def tests(self) -> bool:
        code = self._logged("tests")
        report = self.out / "tests.xml"
        if not report.exists():
            write_json(self.out / "tests.json", {**measure.machine(), "exit_code": code})
            return False
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        seconds = float(suite.get("time", 0))
        summary = {**measure.machine(), "exit_code": code, **counts, "seconds": seconds}
        write_json(self.out / "tests.json", {**summary, "failed": failed})
        report.unlink()
        return code == 0

    def methods(self) -> bool:
        return self._shown("methods") == 0

    def benches(self) -> bool:
        return self._shown("benches") == 0

    def table(self) -> bool:
        fields = Record.__dataclass_fields__
        records, costs = [], {}
        for result in all_results(self.out):
            if result["op"] == METHODS:
                label = (str(result["model"]), str(result["shape"]))
                costs.setdefault(label, []).append(result["cost"])
            else:
                known = {key: value for key, value in result.items() if key in fields}
                records.append(Record(**known))
        machine = " | ".join(f"{key} {value}" for key, value in measure.machine().items())
        page = [f"# {measure.device_name()}", "", machine, "", *table_lines(records)]
        for (model, label), forms in costs.items():
            page += ["", label, "", *costs_lines(forms, model)]
        (self.out / "table.md").write_text("\n".join(page))
        print("\n".join(page))
        return True

    def _shown(self, step: str) -> int:
        return subprocess.run(self.command(step), cwd=measure.ROOT, check=False).returncode

    def _logged(self, step: str) -> int:
        with (self.out / f"{step}.log").open("w") as log:
            done = subprocess.run(
                self.command(step),
                cwd=measure.ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        tail = (self.out / f"{step}.log").read_text().splitlines()[-15:]
        print("\n".join(tail), flush=True)
        return done.returncode


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", choices=STEPS, action="append", help="leave out the other steps")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument("--markers", default="", help="pytest's -m for the tests, as 'not slow'")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and do nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 if a step failed, 2 if there is no GPU."""
    options = arguments(argv)
    steps = [step for step in STEPS if not options.only or step in options.only]
    run = Run(options.out.resolve(), options.shape or list(SHAPES), options.markers)
    if options.dry_run:
        for step in steps:
            command = (
                ["python", *run.command(step)[1:]] if run.command(step) else ["write table.md"]
            )
            print(f"{step}: {' '.join(command).replace(str(run.out), str(options.out))}")
        return 0
    if not torch.cuda.is_available():
        print(
            "benches.gpu must run where torch finds a CUDA or HIP device, got none; "
            "`make bench` measures on the CPU",
            file=sys.stderr,
        )
        return 2
    run.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in steps:
        start = time.perf_counter()
        well = getattr(run, step)()
        print(
            f"{step}: {'done' if well else 'FAILED'}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        failed += [] if well else [step]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
