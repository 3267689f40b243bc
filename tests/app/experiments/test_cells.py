"""The kinds of cells: all methods and measures, shared vectors, disjoint masks, failing rates."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from talos.app.experiments.places import SPARSE
from talos.app.experiments.recipe import Row
from talos.app.experiments.settings import MEASURES
from talos.app.experiments.training import Trainer
from talos.app.models import load_encoder
from talos.app.models.heads import classifier_for, head_of, save_heads
from talos.app.report.figures import FIGURES
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods import METHODS
from talos.task_vectors import TaskVector
from tests.app.experiments.test_kills import numbers
from tests.app.experiments.tiny_experiment import (
    TASKS,
    run_tiny,
    tiny_encoder,
    tiny_recipe,
    tiny_tasks,
)

ONE_SEED: dict[str, Any] = {"seeds": [0], "evaluation": {"measures": ["addition"]}}
OTHERS = [name for name in METHODS if name != "talos"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of all methods with all measures: its folder and its results."""
    out = tmp_path_factory.mktemp("experiment") / "out"
    methods: list[dict[str, Any]] = [
        {"method": "talos"},
        {"method": "talos", "disjoint": True},
        {"method": "talos", "select": "highest"},
        {"method": "talos", "merge": {"method": "ties", "density": 0.2}},
        *({"method": name} for name in OTHERS),
        {"method": "random", "seed": 0},
    ]
    recipe = tiny_recipe(seeds=[0], methods=methods, evaluation={"measures": list(MEASURES)})
    return out, run_tiny(out, recipe)


@pytest.mark.slow
def test_every_measure_is_there_for_the_rows_that_it_suits(
    done: tuple[Path, dict[str, Any]],
) -> None:
    _, results = done
    rows = {row["row"]: row["method"] for row in results["rows"]}
    assert len(rows) == 5 + len(OTHERS)
    sparse = {row for row, method in rows.items() if method in SPARSE}
    expected = {
        "interference": set(rows),
        "disentanglement": set(rows),
        **dict.fromkeys(("masks", "mask_iou", "sensitivity"), sparse),
        "linearity": set(rows) - {"linearized"},
        "drift": set(rows) - {"linearized", "l_lora"},
    }
    for key, own in expected.items():
        assert set(results[key]["tiny"]) == own, key
    for key in ("mask_iou", "interference", "sensitivity"):
        for matrix in results[key]["tiny"].values():
            assert [len(line) for line in matrix] == [2, 2]
    for drawn in results["disentanglement"]["tiny"].values():
        assert drawn["tasks"] == list(TASKS)
        assert [len(line) for line in drawn["error"]] == [len(drawn["coefs"])] * 3
    for row, tasks in results["drift"]["tiny"].items():
        steps = 4 if row == "lota" else 2
        assert [point["step"] for point in tasks["pets"]] == list(range(1, steps + 1))
    for row, masks in results["masks"]["tiny"].items():
        calibrated = rows[row] == "talos" and "disjoint" not in row
        assert all((mask["stability"] is not None) == calibrated for mask in masks.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FIGURES if name != "density"])
def test_every_figure_finds_its_numbers(name: str, done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    head, lines = FIGURES[name].table(results, "tiny")
    assert {len(line) for line in lines} == {len(head)}
    assert (name == "rates") != FIGURES[name].available(results)  # one rate is no sweep


@pytest.mark.slow
def test_the_interference_of_an_own_task_is_its_single_model(
    done: tuple[Path, dict[str, Any]],
) -> None:
    _, results = done
    for run in results["runs"]:
        matrix = results["interference"]["tiny"][run["row"]]
        for place, task in enumerate(TASKS):
            before = results["zero_shot"]["tiny"][task]["value"]
            ratio = run["single"][task]["value"] / before
            assert matrix[place][place] == pytest.approx(ratio)


@pytest.mark.slow
def test_rows_that_train_alike_share_vectors(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    by_row = {run["row"]: run for run in results["runs"]}
    plain, ties = by_row["talos"], by_row["talos-merge-ties-density-0.2"]
    assert plain["single"] == ties["single"]
    assert not [file for file in results["files"] if file["row"] == ties["row"]]
    assert len([file for file in results["files"] if file["row"] == "talos"]) == 4


@pytest.mark.slow
def test_a_mean_is_tried_up_to_the_number_of_tasks(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    largest = {run["row"]: run["addition"]["grid"][-1]["scaling_coef"] for run in results["runs"]}
    assert largest.pop("talos-merge-ties-density-0.2") == len(TASKS)
    assert set(largest.values()) == {1}


@pytest.mark.slow
def test_a_random_mask_with_a_seed_is_that_of_all_tasks(
    done: tuple[Path, dict[str, Any]],
) -> None:
    _, results = done
    overlap = results["mask_iou"]["tiny"]
    assert overlap["random-seed-0"] == [[1, 1], [1, 1]]
    assert overlap["random"][0][1] < 0.5


@pytest.mark.slow
def test_drift_is_measured_at_the_same_weights_in_all_rows(
    done: tuple[Path, dict[str, Any]],
) -> None:
    _, results = done
    initial = {
        row: tasks["pets"][-1]["squared"] / tasks["pets"][-1]["ratio"]
        for row, tasks in results["drift"]["tiny"].items()
    }
    assert len(initial) > 5
    assert all(each == pytest.approx(initial["nonlinear"]) for each in initial.values())


@pytest.mark.slow
def test_disjoint_masks_share_no_entry(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    assert results["mask_iou"]["tiny"]["talos-disjoint-true"] == [[1, 0], [0, 1]]
    masks: dict[str, dict[str, Mask]] = {}
    for file in results["files"]:
        if file["kind"] == "mask" and file["row"] in ("talos", "talos-disjoint-true"):
            masks.setdefault(file["row"], {})[file["task"]] = Mask.load(out / file["path"])
    for task, mask in masks["talos-disjoint-true"].items():
        assert mask.nnz == masks["talos"][task].nnz
        assert mask.metadata["rounds"] == 1


@pytest.mark.slow
def test_each_task_draws_its_own_random_mask(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    iou = results["mask_iou"]["tiny"]["random"]
    assert iou[0][0] == 1
    assert iou[0][1] < 0.5
    assert results["mask_iou"]["tiny"]["magnitude"][0][1] == 1


@pytest.mark.slow
def test_the_most_sensitive_entries_are_others(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    vectors = {
        file["row"]: TaskVector.load(out / file["path"])
        for file in results["files"]
        if file["kind"] == "vector" and file["task"] == "pets"
    }
    lowest, highest = vectors["talos"].mask, vectors["talos-select-highest"].mask
    assert lowest.nnz == highest.nnz
    assert lowest.iou(highest) == 0


def test_an_edited_recipe_makes_only_what_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = [{"method": "nonlinear", "lr": 1e-3}]
    run_tiny(out, tiny_recipe(**ONE_SEED, methods=methods))
    before = set(out.rglob("*.json")) - {out / "results.json"}
    methods.append({"method": "nonlinear", "lr": 1e-3, "merge": "mean"})
    evaluation = ONE_SEED["evaluation"] | {"resamples": 30}
    results = run_tiny(out, tiny_recipe(seeds=[0], evaluation=evaluation, methods=methods))
    assert len(results["runs"]) == 2
    made = set(out.rglob("*.json")) - {out / "results.json"} - before
    assert {path.parent.name for path in made} == {"addition"}
    assert len(made) == 2


def test_a_rate_at_which_training_fails_is_left_out(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    methods = [{"method": "nonlinear", "lr": [1e-3, 1e30]}]
    recipe = tiny_recipe(**ONE_SEED, methods=methods, training={"steps": 4})
    results = run_tiny(out, recipe, on_note=notes.append)
    assert [rate["lr"] for rate in results["rates"]["tiny"]["nonlinear"]] == [1e-3]
    assert len(notes) == 2  # one a task
    assert all("lr-1e+30" in note for note in notes)
    assert numbers(run_tiny(out, recipe)) == numbers(results)
    bad = tiny_recipe(**ONE_SEED, methods=[methods[0] | {"lr": 1e30}], training={"steps": 4})
    with pytest.raises(TalosValueError, match=r"lr must be one that nonlinear trains with on tiny"):
        run_tiny(out, bad)


def test_a_damaged_cell_and_a_missing_or_damaged_vector_are_made_anew(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    recipe = tiny_recipe(**ONE_SEED, methods=[{"method": "nonlinear", "lr": 1e-3}])
    results = run_tiny(out, recipe)
    vector = sorted(out.glob("vectors/*"))[0]
    bits = vector.read_bytes()
    vector.unlink()
    broken = sorted(out.glob("vectors/*"))[0]
    kept = broken.read_bytes()
    broken.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    cell = next(out.glob("cells/addition/*.json"))
    text = cell.read_text()
    cell.write_text(text[:-20])
    again = run_tiny(out, recipe, on_note=notes.append)
    assert len(notes) == 3
    assert numbers(again) == numbers(results)
    assert broken.read_bytes() == kept
    assert vector.read_bytes() == bits
    assert cell.read_text().split('"seconds"')[0] == text.split('"seconds"')[0]


def test_the_order_of_tasks_decides_matrices_and_disjoint_masks(tmp_path: Path) -> None:
    methods = [{"method": "talos", "lr": 1e-1, "density": 0.5, "disjoint": True}]
    measures = ["addition", "negation", "interference", "sensitivity", "disentanglement"]
    recipe = tiny_recipe(seeds=[0], methods=methods, evaluation={"measures": measures})
    run_tiny(tmp_path / "resumed", recipe)
    shutil.rmtree(tmp_path / "resumed" / "cells" / "overlap")
    turned = {"tasks": tiny_tasks()[::-1]}
    resumed = run_tiny(tmp_path / "resumed", recipe, **turned)
    assert numbers(resumed) == numbers(run_tiny(tmp_path / "fresh", recipe, **turned))


def test_another_tokenizer_configuration_or_head_makes_all_anew(tmp_path: Path) -> None:
    recipe = tiny_recipe(**ONE_SEED, methods=[{"method": "nonlinear", "lr": 1e-3}])
    encoder = tiny_encoder(tmp_path / "model")
    out = tmp_path / "out"
    run_tiny(out, recipe, encoders={"tiny": encoder})
    count = len(list(out.glob("cells/*/*")))
    assert count == 5

    def config(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))

    def tokenizer(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        vocab = content["model"]["vocab"]
        vocab["##u"], vocab["##m"] = vocab["##m"], vocab["##u"]
        path.write_text(json.dumps(content))

    def head(folder: Path) -> None:
        task = tiny_tasks()[0]
        classifier = classifier_for(encoder, task)
        classifier.head.neg_()
        (folder / "talos").mkdir()
        made = head_of(classifier, task.name, task.class_names, 12, task.fingerprint())
        save_heads(folder / "talos" / "head.safetensors", {task.name: made})

    for change in (config, tokenizer, head):
        folder = tmp_path / change.__name__
        shutil.copytree(tmp_path / "model", folder)
        change(folder)
        run_tiny(out, recipe, encoders={"tiny": load_encoder(str(folder))})
        added = len(list(out.glob("cells/*/*"))) - count
        assert added == (3 if change is head else 5), change.__name__
        count += added
    run_tiny(out, recipe, encoders={"tiny": encoder})
    assert len(list(out.glob("cells/*/*"))) == count


def test_a_seed_whose_training_fails_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, notes = Trainer.fine_tune, []

    def fine_tune(self: Trainer, row: Row, lr: float, seed: int, *given: Any) -> TaskVector:
        vector = plain(self, row, lr, seed, *given)
        if (row.method, seed) == ("nonlinear", 1):
            raise TalosValueError("the loss must be finite")
        return vector

    monkeypatch.setattr(Trainer, "fine_tune", fine_tune)
    recipe = tiny_recipe(seeds=[0, 1, 2], evaluation={"measures": ["addition"]})
    results = run_tiny(tmp_path / "out", recipe, on_note=notes.append)
    assert [each["seeds"] for each in results["summary"]] == [3, 2]
    assert [run["seed"] for run in results["runs"] if run["row"] == "nonlinear"] == [0, 2]
    first, second = (
        [run["addition"]["absolute"]["value"] for run in results["runs"] if run["row"] == row]
        for row in ("talos", "nonlinear")
    )
    gap = results["summary"][1]["against_first"]["added"]["value"]
    assert gap == pytest.approx(fmean(second) - fmean([first[0], first[2]]))
    assert "nonlinear on tiny is summed up without the seeds 1, " in notes[-1]
    assert numbers(run_tiny(tmp_path / "out", recipe)) == numbers(results)


def test_cells_of_other_versions_are_kept_and_said(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    recipe = tiny_recipe(**ONE_SEED, methods=[{"method": "nonlinear", "lr": 1e-3}])
    run_tiny(out, recipe)
    now = f'"torch": "{torch.__version__}"'
    for path in out.glob("cells/*/*.json"):
        path.write_text(path.read_text().replace(now, '"torch": "1.0"'))
    results = run_tiny(out, recipe, on_note=notes.append)
    assert results["versions"]["torch"] == f"{torch.__version__}, 1.0"
    assert results["machine"]["device"]
    assert len(notes) == 1
    assert f"torch 1.0 (now {torch.__version__})" in notes[0]


def test_disjoint_masks_keep_the_density_and_their_time(tmp_path: Path) -> None:
    methods = [{"method": "talos", "lr": 1e-1, "density": 0.5, "disjoint": True}]
    results = run_tiny(tmp_path / "out", tiny_recipe(**ONE_SEED, methods=methods))
    masks = results["masks"]["tiny"]["talos-density-0.5-disjoint-true"]
    maskable = results["models"][0]["maskable"]
    assert {mask["nnz"] for mask in masks.values()} == {maskable // 2}
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("out/cells/mask/*")]
    calibrate = results["timings"]["by_row"]["tiny"]["talos-density-0.5-disjoint-true"]["calibrate"]
    assert calibrate == pytest.approx(sum(cell["seconds"] for cell in cells))
    assert len(cells) == len(masks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random", "params": "no_such"}, "of the row random-params-no_such"),
        ({"method": "talos", "density": 1e-9}, "density must select 1 to "),
        ({"method": "talos", "disjoint": True, "density": 0.6}, "for each of 2 tasks, got 0.6"),
    ],
)
def test_a_row_that_cannot_select_is_refused_before_any_cell(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    recipe = tiny_recipe(**ONE_SEED, methods=[{"method": "nonlinear"}, settings])
    with pytest.raises(TalosValueError, match=message):
        run_tiny(tmp_path / "out", recipe)
    assert not list(tmp_path.glob("out/cells/*/*"))
