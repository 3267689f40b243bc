"""The stages that measure, in this process at tiny sizes: their records, and what they refuse."""

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benches import bench_sparse_adam
from benches.gpu import table
from benches.gpu.context import DONE, FAILED, Context, StageResult, read_stage
from benches.gpu.device import Device
from benches.gpu.questions import FIGURES
from benches.gpu.sizes import FULL, TINY, Sizes
from benches.gpu.stages import methods, rest, scoring, step
from benches.work import Work

pytestmark = pytest.mark.slow

STAGES = {"step": step, "methods": methods, "scoring": scoring}

Run = Callable[..., StageResult]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a stage and reads its file."""

    def run_stage(stage: ModuleType, sizes: Sizes = TINY, seconds: float = 600.0) -> StageResult:
        path = tmp_path / f"{stage.__name__.rpartition('.')[2]}.json"
        deadline = time.monotonic() + seconds
        context = Context(Device(), sizes, tmp_path, deadline, path, machine={})
        stage.run(context)
        context.end()
        return read_stage(path)

    return run_stage


class Planned:
    """Stands for a context; notes the keys of a stage's items at full size, and does none."""

    def __init__(self) -> None:
        self.sizes, self.device, self.keys = FULL, Device(), []

    def run(self, key: str, work: Callable[[], Any], needs: float = 0.0) -> None:
        self.keys.append(key)


@pytest.mark.parametrize("name", STAGES)
def test_every_prediction_has_its_record(name: str) -> None:
    planned: Any = Planned()
    STAGES[name].run(planned)
    assert len(set(planned.keys)) == len(planned.keys)
    wanted = {each.key for each in FIGURES if each.stage == name}
    wanted |= {each.over for each in FIGURES if each.stage == name and each.over}
    assert wanted
    assert wanted <= set(planned.keys)


def test_step(run: Run) -> None:
    result = run(step, replace(TINY, densities=(0.6, 0.1)))
    assert set(result.with_status(DONE)) == set(result.records)
    assert len(result.records) == 2 * (len(step.KINDS) + 2)
    dense = result.records["tiny, d 0.6, whole model, fused AdamW, replayed"]
    assert dense["bytes_moved"] == 28 * TINY.shapes[0].numel
    assert dense["bytes_per_second"] == dense["bytes_moved"] / dense["seconds"]


def test_a_wrong_step_is_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(shape: object, device: object) -> Work:
        def check() -> None:
            raise AssertionError("the weights differ")

        return replace(bench_sparse_adam.elementwise(shape, device), check=check)

    monkeypatch.setitem(bench_sparse_adam.FORMS, "(c) elementwise", wrong)
    result = run(step, replace(TINY, densities=(0.6,)))
    failed = result.with_status(FAILED)
    assert failed == [key for key in result.records if "elementwise" in key]
    assert "seconds" not in result.records[failed[0]]


# A product of SHiRA's sparse weights in peft warns of torch's default.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_methods(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benches.measure.copy_bandwidth", lambda device: 1e10)
    minilm = replace(TINY, iterations=(TINY.iterations[1],))
    result = run(methods, minilm)
    assert set(result.with_status(DONE)) == set(result.records)
    keys = [f"minilm, {name}" for name in methods.PAPER]
    assert list(result.records)[: len(keys)] == keys
    assert not any("left_out" in result.records[key] for key in keys)
    left_out = {key for key, record in result.records.items() if "left_out" in record}
    assert {f"minilm, {form.name}" for form in methods.COMPILED} <= left_out
    losses = [result.records[key]["loss"] for key in keys]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)
    lines = table.stage_lines(result)
    assert "minilm, batch 2" in lines
    (row,) = [line for line in lines if line.startswith("| TaLoS |")]
    ours, dense = (result.records[f"minilm, {name}"] for name in ("talos", "nonlinear"))
    assert f"{ours['total'] / dense['total']:.2f}" in row


def test_scoring(run: Run) -> None:
    minilm = replace(TINY, iterations=(TINY.iterations[1],))
    result = run(scoring, minilm)
    assert set(result.with_status(DONE)) == set(result.records)
    found = result.records
    assert found["minilm, scored batch"]["error"] < 1e-4
    assert found["calibration"]["samples"] == 8
    assert not found["calibration"]["extrapolated"]
    assert found["calibration"]["batches_run"] == 2 * scoring.ROUNDS
    assert found["fisher_diag_, 5, Triton"]["flops"] == 2 * 2 * 5 * 24 * 16
    assert found["threshold"]["bytes_moved"] == 3 * 4 * TINY.threshold
    assert found["swap, tiny, Triton"]["how"] == "eager"


def test_a_calibration_that_does_not_fit_is_extrapolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scoring.json"
    context = Context(Device(), TINY, tmp_path, time.monotonic() + 600, path, machine={})
    lefts = iter([60.0, 60.0, 5.0])
    monkeypatch.setattr(context, "left", lambda: next(lefts))
    found = scoring.calibration(context)
    assert found["extrapolated"]
    assert found["batches_run"] == 3
    assert found["seconds"] > 0


def test_the_constants_that_are_swept_exist() -> None:
    for sweep in rest.SWEEPS:
        assert hasattr(import_module(sweep.module), sweep.constant), sweep
