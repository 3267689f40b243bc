"""`python -m benches.gpu`: limits, what a kill leaves, what a resumed run does, what a table holds.

Stages here are small files that a test writes; the real ones are rehearsed once, all together.
"""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from benches.gpu.__main__ import main
from benches.gpu.context import Context, read_stage
from benches.gpu.device import Cuda, Device, uploaded_tables
from benches.gpu.questions import FIGURES, Figure
from benches.gpu.schedule import STAGES, Stage
from benches.gpu.sizes import FULL, TINY
from benches.gpu.stages import rest
from benches.gpu.stages.agreement import outcomes
from benches.gpu.stages.rest import read_counters
from benches.measure import ROOT
from tests import conftest

pytestmark = pytest.mark.slow

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
    monkeypatch.setattr("benches.gpu.schedule.REHEARSED_LIMIT_S", 0)

    def make(name: str, *items: str, limit: float = 60) -> Stage:
        own = {"slow", "broken", "lost"}
        works = [(item, item if item in own else f"lambda: count({item!r})") for item in items]
        lines = [f"context.run({item!r}, {work})" for item, work in works]
        text = FAKE.format(counts=str(tmp_path), work="\n    ".join(lines))
        (tmp_path / "fakes" / f"fake_{name}.py").write_text(text)
        return Stage(name, limit, f"title of {name}", f"fake_{name}")

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
        f"Stage({each.name!r}, 60, {each.title!r}, {each.module!r})" for each in stages
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
    context = Context(Device(), TINY, tmp_path, deadline, path, machine={})
    context.run("long", lambda: {"seconds": 1.0}, needs=60)
    context.run("short", lambda: {"seconds": 1.0})
    context.end()
    assert statuses(path) == {"long": "out of time", "short": "done"}
    assert not read_stage(path).complete


def test_bars_and_predictions_find_their_measurements() -> None:
    bar = Figure("a", "x", "step", "dense", over="ours", least=7.5)
    records = {"step": {"dense": {"seconds": 8.0}, "ours": {"seconds": 1.0}}}
    assert bar.measured(records) == 8.0
    assert bar.verdict(8.0) == "at least 7.5 x: met"
    assert bar.verdict(7.0) == "at least 7.5 x: MISSED"
    assert bar.verdict(bar.measured({})) == "at least 7.5 x: not measured"
    most = Figure("b", "ms", "step", "ours", most=1.0, scale=1e3)
    assert most.measured(records) == 1000.0
    assert most.verdict(1000.0) == "at most 1 ms: MISSED"
    assert Figure("c", "us", "step", "ours", predicted=5.0).verdict(4.0) == ""


def rows(title: str) -> list[list[str]]:
    """The cells of a table of docs/gpu.md, by the title of its first column."""
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |")) + 2
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_document_has_the_stages_and_the_figures() -> None:
    listed = [[stage.name, f"{stage.limit_s:.0f}", stage.title] for stage in STAGES]
    assert rows("stage") == listed
    questions = {figure: (expected, stage) for *_, figure, expected, stage in rows("feature")}
    assert len(questions) == len(rows("feature"))
    for each in FIGURES:
        assert questions.pop(each.name) == (each.expected, each.stage)
    for figure, (expected, stage) in questions.items():
        assert figure.startswith("*"), f"{figure} is no prediction's"
        assert expected
        assert stage in {each.name for each in STAGES}


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
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_outcomes_of_tests_are_known_before_the_end(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import time\n"
        "def test_well(): pass\n"
        "def test_badly(): assert False\n"
        "def test_long(): time.sleep(600)\n"
    )
    found = outcomes([str(tests)], 1, 30)
    assert not found["ended"]
    assert (found["passed"], found["failed"]) == (1, 1)
    assert [name.split("::")[1] for name in found["names"]] == ["test_badly"]


def test_a_file_that_cannot_be_imported_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "test_whole.py").write_text("def test_well(): pass\n")
    found = outcomes([str(tmp_path)], 1, 60)
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
    files = (
        "tiny_models",
        "architecture/test_families",
        "methods/test_methods",
        "optim/test_optim",
        "kernels/test_triton",
    )
    left_out = [bool(conftest._absent_packages(ROOT / "tests" / f"{name}.py")) for name in files]
    conftest._absent_packages.cache_clear()
    assert left_out == [True, True, True, False, False]


def test_a_program_under_a_tool_ends_with_its_stage() -> None:
    with subprocess.Popen(
        rest.PROGRAM, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
    ) as program:
        program.communicate()  # as if who started it were gone
    assert program.returncode == -signal.SIGKILL


def test_the_cuda_side(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = MagicMock()
    cuda.current_device.return_value = 0
    cuda.Event.return_value.elapsed_time.return_value = 1.0
    monkeypatch.setattr(torch, "cuda", cuda)
    device, calls = Cuda(), []
    replay = device.capture(lambda: calls.append("work"), warmup=2)
    assert len(calls) == 3  # two to warm up on a stream, one that is captured
    replay()
    assert len(calls) == 3
    cuda.CUDAGraph.return_value.replay.reset_mock()
    times = device.time_replayed(lambda: None, rounds=4)
    assert times == [0.5e-3] * 4  # a first of a millisecond: two replays a round
    assert cuda.CUDAGraph.return_value.replay.call_count == 1 + 1 + 4 * 2
    with device.no_host_sync():
        cuda.set_sync_debug_mode.assert_called_with("error")
    cuda.set_sync_debug_mode.assert_called_with(cuda.get_sync_debug_mode.return_value)
    device.free()
    cuda.empty_cache.assert_called_once()
    assert len(device.time_eager(lambda: None, rounds=3)) == 3


def test_a_capture_finds_the_tables_that_its_warm_up_has_uploaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from talos_kernels.triton import launch

    table, own, device = torch.tensor([3, 4]), torch.tensor([5]), torch.device("cuda", 0)
    monkeypatch.setattr(launch, "_tables", {(0, 7, 3, 4): table})  # by another stream
    monkeypatch.setattr(launch, "captured_table", lambda values, device: own)
    with uploaded_tables():
        assert launch.captured_table((3, 4), device) is table
        assert launch.captured_table((5,), device) is own
    assert launch.captured_table((3, 4), device) is own


@pytest.mark.slow
def test_the_rehearsal_passes_through_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, for two might run on two workers, each with a rehearsal of its own."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benches.gpu", "--out", str(out), "--rehearse"]
    command += ["--minutes", "30"]  # cores may be busy
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    page = (out / "table.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    for stage in STAGES:
        assert read_stage(out / f"{stage.name}.json").complete
        assert f"## {stage.name}: {stage.title}" in page
    assert len(list(out.iterdir())) == len(STAGES) + 3  # with table.md, log.txt, numerics.json
    assert main(["--out", str(out), "--rehearse", "--resume"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(STAGES)] == [f"{stage.name}: nothing is missing" for stage in STAGES]
