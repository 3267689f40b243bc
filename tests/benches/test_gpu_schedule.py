"""`python -m benches.gpu`: limits, what a kill leaves, what a resumed run does, what a table says.

Stages here are small files that a test writes; the real ones are rehearsed once, all together.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benches.gpu.__main__ import main
from benches.gpu.context import Context, StageResult, read_stage
from benches.gpu.device import Cpu, Cuda
from benches.gpu.predictions import PREDICTIONS, Prediction
from benches.gpu.schedule import ROOT, STAGES, Stage
from benches.gpu.schema import SCHEMAS, problems
from benches.gpu.sizes import FULL, TINY
from benches.gpu.stages import ceilings, rest
from benches.gpu.stages.agreement import outcomes
from benches.gpu.stages.rest import read_counters
from tests import conftest

FAKE = """
import atexit
import os
import time
from pathlib import Path
from benches.gpu.context import Context, stage_main

def count(name):
    path = Path({counts!r}) / name
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    return {{"seconds": 1.0}}

def broken():
    count("broken")
    if not Path({counts!r}, "mended").exists():
        raise ValueError("the item says why")
    return {{}}

def slow():
    time.sleep(0 if Path({counts!r}, "mended").exists() else 60)
    return count("slow")

def lost():
    count("lost")
    atexit.register(os.abort)  # as a destructor that asks the device may end
    def free():
        raise RuntimeError("an illegal memory access")
    CONTEXTS[0].device.free = free
    return {{}}

CONTEXTS = []

def run(context):
    CONTEXTS.append(context)
    {work}

stage_main(run)
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """Makes a stage of items that count their calls."""
    (tmp_path / "fakes").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fakes'}{os.pathsep}{ROOT}")
    monkeypatch.setattr("benches.gpu.schedule.GRACE", 0.5)

    def make(name: str, *items: str, limit: float = 60) -> Stage:
        own = {"slow", "broken", "lost"}
        works = [(item, item if item in own else f"lambda: count({item!r})") for item in items]
        lines = [f"context.run({item!r}, {work})" for item, work in works]
        text = FAKE.format(counts=str(tmp_path), work="\n    ".join(lines))
        (tmp_path / "fakes" / f"fake_{name}.py").write_text(text)
        return Stage(name, f"fake_{name}", limit, f"title of {name}", limit)

    return make


def calls(folder: Path, name: str) -> int:
    path = folder / name
    return len(path.read_text()) if path.exists() else 0


def statuses(path: Path) -> dict[str, str]:
    return {key: record["status"] for key, record in read_stage(path).records.items()}


def test_dry_run_lists_every_stage_and_ten_minutes_at_most(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--out", str(tmp_path / "out"), "--dry-run"]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [stage.name for stage in STAGES]
    assert sum(stage.limit_s for stage in STAGES) <= 600
    assert not (tmp_path / "out").exists()


def test_command_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_command_keeps_what_a_folder_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ceilings.json").write_text("{}")
    assert main(["--out", str(tmp_path), "--rehearse"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "ceilings.json").read_text() == "{}"


def test_a_folder_may_hold_what_others_wrote(tmp_path: Path, stage: Callable[..., Stage]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "console").touch()
    assert main(["--out", str(out), "--rehearse"], (stage("one", "first"),)) == 0


def test_a_failed_item_stops_nothing_and_is_done_again(
    tmp_path: Path, stage: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    out, stages = tmp_path / "out", (stage("one", "first", "broken", "last"), stage("two", "more"))
    command = ["--out", str(out), "--rehearse"]
    assert main(command, stages) == 1
    assert statuses(out / "one.json") == {"first": "done", "broken": "failed", "last": "done"}
    assert statuses(out / "two.json") == {"more": "done"}
    table = (out / "table.md").read_text()
    assert "- broken: failed, ValueError: the item says why" in table
    assert "- one: 1 failed; `python -m benches.gpu" in table
    assert "the item says why" in (out / "log.txt").read_text()

    (tmp_path / "mended").touch()
    assert main([*command, "--resume"], stages) == 0
    assert set(statuses(out / "one.json").values()) == {"done"}
    counted = {name: calls(tmp_path, name) for name in ("first", "broken", "last", "more")}
    assert counted == {"first": 1, "broken": 2, "last": 1, "more": 1}
    assert "What is missing" not in (out / "table.md").read_text()
    assert len(list(out.iterdir())) == 4


def test_a_stage_past_its_limit_is_killed_and_what_is_left_goes_on(
    tmp_path: Path, stage: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stages = (stage("one", "first", "slow", limit=15), stage("two", "more"))
    start = time.monotonic()
    assert main(["--out", str(out), "--rehearse"], stages) == 1
    assert time.monotonic() - start < 45
    assert statuses(out / "one.json") == {"first": "done", "slow": "running"}
    assert statuses(out / "two.json") == {"more": "done"}
    assert "one: killed at its limit of 15 s" in capfd.readouterr().out
    assert "- one: 1 running, it was cut short" in (out / "table.md").read_text()


def test_a_stage_whose_device_is_lost_goes_on_in_a_new_process(
    tmp_path: Path, stage: Callable[..., Stage]
) -> None:
    out, stages = tmp_path / "out", (stage("one", "first", "lost", "last"),)
    assert main(["--out", str(out), "--rehearse"], stages) == 1
    assert statuses(out / "one.json") == {"first": "done", "lost": "failed", "last": "done"}
    counted = {name: calls(tmp_path, name) for name in ("first", "lost", "last")}
    assert counted == {"first": 1, "lost": 1, "last": 1}
    assert (
        "- lost: failed, RuntimeError: an illegal memory access" in (out / "table.md").read_text()
    )


def test_stages_that_do_not_fit_are_named_with_their_command(
    tmp_path: Path, stage: Callable[..., Stage]
) -> None:
    out = tmp_path / "out"
    assert main(["--out", str(out), "--rehearse", "--minutes", "0.05"], (stage("one", "x"),)) == 1
    assert (
        f"- one: not run; `python -m benches.gpu --out {out} --resume --only one"
        in (out / "table.md").read_text()
    )


def test_a_killed_run_leaves_whole_files_and_is_taken_up(
    tmp_path: Path, stage: Callable[..., Stage]
) -> None:
    out, stages = tmp_path / "out", (stage("one", "first", "slow", "last"), stage("two", "more"))
    listed = ", ".join(
        f"Stage({each.name!r}, {each.module!r}, 60, {each.title!r})" for each in stages
    )
    code = (
        "from benches.gpu.__main__ import main; from benches.gpu.schedule import Stage; "
        f"main(['--out', {str(out)!r}, '--rehearse'], ({listed}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    give_up = time.monotonic() + 60
    while statuses(out / "one.json").get("slow") != "running" and time.monotonic() < give_up:
        time.sleep(0.1)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(2)
    assert not subprocess.run(["pgrep", "-f", str(out)], capture_output=True, check=False).stdout
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    assert statuses(out / "one.json") == {"first": "done", "slow": "running"}

    (tmp_path / "mended").touch()
    (out / "one.partial").write_text("what a process killed while it wrote leaves")
    assert main(["--out", str(out), "--rehearse", "--resume"], stages) == 0
    assert set(statuses(out / "one.json").values()) == {"done"}
    # the stage ended with its parent, or it would have gone on and called `last` too
    assert {name: calls(tmp_path, name) for name in ("first", "slow", "last")} == {
        "first": 1,
        "slow": 1,
        "last": 1,
    }
    assert sorted(path.name for path in out.iterdir()) == [
        *("log.txt", "one.json", "table.md", "two.json")
    ]


def test_an_item_that_needs_more_than_is_left_waits(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    deadline = time.monotonic() + 5
    context = Context(Cpu(), TINY, tmp_path, deadline, path, machine={})
    context.run("long", lambda: {"seconds": 1.0}, needs=60)
    context.run("short", lambda: {"seconds": 1.0})
    context.end()
    assert statuses(path) == {"long": "out of time", "short": "done"}
    assert not read_stage(path).complete


def test_bars_and_predictions_find_their_measurements() -> None:
    bar = Prediction("a", "x", "step", "dense", over="ours", least=7.5)
    records = {"step": {"dense": {"seconds": 8.0}, "ours": {"seconds": 1.0}}}
    assert bar.measured(records) == 8.0
    assert bar.verdict(8.0) == "at least 7.5 x: met"
    assert bar.verdict(7.0) == "at least 7.5 x: MISSED"
    assert bar.verdict(bar.measured({})) == "at least 7.5 x: not measured"
    most = Prediction("b", "ms", "step", "ours", most=1.0, scale=1e3)
    assert most.measured(records) == 1000.0
    assert most.verdict(1000.0) == "at most 1 ms: MISSED"
    assert Prediction("c", "us", "step", "ours", predicted=5.0).verdict(4.0) == ""


def rows(title: str) -> list[list[str]]:
    """The cells of a table of docs/gpu.md, by the title of its first column."""
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |")) + 2
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_document_says_what_the_schedule_and_the_predictions_do() -> None:
    told = [[stage.name, f"{stage.limit_s:.0f}", stage.title] for stage in STAGES]
    assert rows("stage") == told
    questions = {figure: (expected, stage) for *_, figure, expected, stage in rows("feature")}
    assert len(questions) == len(rows("feature"))
    for each in PREDICTIONS:
        assert questions.pop(each.name) == (each.expected, each.stage)
    for figure, (expected, stage) in questions.items():
        assert figure.startswith("*"), f"{figure} is no prediction's"
        assert expected
        assert stage in SCHEMAS


def test_a_schema_finds_what_a_record_lacks() -> None:
    whole = {"seconds": 1.0, "spread": 0.0, "bytes_moved": 1, "bytes_per_second": 1.0}
    records = {
        "copy": {**whole, "status": "done"},
        "bf16": {"status": "failed", "error": "why"},
        "unknown": {"status": "done"},
    }
    found = problems("ceilings", StageResult(records))
    assert found == ["ceilings, unknown: no pattern of the schema"]
    records["copy"]["seconds"] = "1"
    assert "ceilings, copy: seconds is '1'" in problems("ceilings", StageResult(records))


def test_counters_are_those_of_the_last_launch() -> None:
    printed = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","sparse_adam_kernel","dram__bytes.sum","byte","1"
"1","sparse_adam_kernel","dram__bytes.sum","byte","2"
"2","fisher_diag_kernel","dram__bytes.sum","byte","3"
"""
    assert read_counters(printed) == {
        "sparse_adam_kernel": {"dram__bytes.sum": "2"},
        "fisher_diag_kernel": {"dram__bytes.sum": "3"},
    }
    assert read_counters("==ERROR== no permission") == {}


def test_the_tests_that_a_device_is_given_are_there() -> None:
    paths = [each.removeprefix("--ignore=") for each in (*FULL.tests, *FULL.other_tests)]
    paths = [path for path in paths if path.startswith("tests")]
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_outcomes_of_tests_are_known_before_the_end(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import time\n"
        "def test_well(): pass\n"
        "def test_badly(): assert False\n"
        "def test_long(): time.sleep(600)\n"
    )
    found = outcomes([str(tests)], 0, 20)
    assert not found["ended"]
    assert (found["passed"], found["failed"]) == (1, 1)
    assert [name.split("::")[1] for name in found["names"]] == ["test_badly"]


def test_a_file_that_cannot_be_imported_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "test_whole.py").write_text("def test_well(): pass\n")
    found = outcomes([str(tmp_path)], 0, 60)
    assert found["ended"]
    assert (found["passed"], found["failed"]) == (1, 1)


def test_files_of_tests_are_left_out_by_what_they_import_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name)
    )
    conftest._absent_packages.cache_clear()
    files = ("tiny_models", "test_families", "test_methods", "test_optim", "test_triton")
    left_out = [bool(conftest._absent_packages(ROOT / "tests" / f"{name}.py")) for name in files]
    conftest._absent_packages.cache_clear()
    assert left_out == [True, True, True, False, False]


def test_a_library_that_was_brought_along_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command[1:])
        return SimpleNamespace(wait=lambda limit: 0)

    (tmp_path / "talos_kernels").mkdir()
    (tmp_path / "talos_kernels" / "_C.so").write_text("of other sources")
    monkeypatch.setattr(ceilings.subprocess, "Popen", start)
    monkeypatch.setattr(ceilings.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(ceilings.measure, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    context = SimpleNamespace(device=SimpleNamespace(kind="cuda"), todo=lambda key: True)
    found = ceilings.Build(context).wait()
    assert started == [["setup.py", "egg_info", "build_ext", "--force", "--inplace"]]
    assert found["built"]
    assert found["serves"]


def test_a_program_under_a_tool_ends_with_its_stage() -> None:
    with subprocess.Popen(
        rest.PROGRAM, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
    ) as program:
        program.communicate()  # as if who started it were gone
    assert program.returncode == -signal.SIGKILL


def test_only_a_tool_runs_without_torchs_cache_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []

    def run(command: object, limit: float, file: object, environment: dict[str, str]) -> int:
        given.append("PYTORCH_NO_CUDA_MEMORY_CACHING" in environment)
        return 0

    monkeypatch.setattr(rest, "run_limited", run)
    context = SimpleNamespace(device=SimpleNamespace(kind="cuda"), left=lambda: 60.0)
    rest.ask(context, ["env"], [])
    rest.ask(context, [], ["--chunk", "256"])  # which captures a graph
    assert given == [True, False]


class Recorded:
    """Stands for torch.cuda: streams and graphs that do nothing, events a millisecond apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.mode: object = 0
        self.events = 0

        def say(name: str, result: object = None) -> Callable[..., object]:
            return lambda *args, **kwargs: (self.said.append(name), result)[1]

        class Event:
            def __init__(event, enable_timing: bool) -> None:
                assert enable_timing

            def record(event) -> None:
                self.events += 1
                event.at = self.events

            def elapsed_time(event, other: "Event") -> float:
                return float(other.at - event.at)

        @contextlib.contextmanager
        def within(*_: object) -> Iterator[None]:
            self.said.append("in")
            yield
            self.said.append("out")

        graph = SimpleNamespace(replay=say("replay"))
        stream = SimpleNamespace(wait_stream=say("wait"))
        fakes = {
            "current_device": lambda: 0,
            "synchronize": say("synchronize"),
            "empty_cache": say("empty_cache"),
            "CUDAGraph": lambda: graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "graph": within,
            "stream": within,
            "Event": Event,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, fake)


def test_what_the_cuda_side_asks_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    device, calls = Cuda(), []
    replay = device.capture(lambda: calls.append("work"), warmup=2)
    assert recorded.said == ["wait", "in", "out", "wait", "synchronize", "in", "out"]
    assert len(calls) == 3  # two to warm up on a stream, one that is captured
    replay()
    assert len(calls) == 3
    recorded.said.clear()
    times = device.time_replayed(lambda: None, rounds=4)
    assert times == [0.5e-3] * 4  # a first of a millisecond: two replays a round
    assert recorded.said.count("replay") == 1 + 1 + 4 * 2
    with device.no_host_sync():
        assert recorded.mode == "error"
    assert recorded.mode == 0
    recorded.said.clear()
    device.free()
    assert recorded.said == ["synchronize", "empty_cache"]
    assert len(device.time_eager(lambda: None, rounds=3)) == 3


def test_a_timed_replay_finds_what_its_warm_up_has_uploaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from talos_kernels.triton import launch

    Recorded(monkeypatch)
    table, own, found = torch.tensor([3, 4]), torch.tensor([5]), []
    monkeypatch.setattr(launch, "_tables", {})
    monkeypatch.setattr(launch, "captured_table", lambda values, device: own)
    device = torch.device("cuda", 0)

    def work() -> None:
        launch._tables[0, 7, 3, 4] = table  # by another stream than the one that captures
        found.append([launch.captured_table(values, device) for values in ((3, 4), (5,))])

    Cuda().time_replayed(work, rounds=2)
    assert all(first is table and second is own for first, second in found)
    assert launch.captured_table((3, 4), device) is own


@pytest.mark.slow
def test_the_rehearsal_passes_through_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, for two might run on two workers, each with a rehearsal of its own."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benches.gpu", "--out", str(out), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    page = (out / "table.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    lacks = []
    for stage in STAGES:
        result = read_stage(out / f"{stage.name}.json")
        assert result.complete
        lacks += problems(stage.name, result)
        patterns = SCHEMAS[stage.name]
        lacks += [p for p in patterns if not any(fnmatchcase(key, p) for key in result.records)]
        assert f"## {stage.name}: {stage.title}" in page
    assert not lacks

    names = [path.name for path in out.iterdir()]
    assert len(names) <= 8
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert main(["--out", str(out), "--rehearse", "--resume"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[: len(STAGES)] == [f"{stage.name}: nothing is missing" for stage in STAGES]
