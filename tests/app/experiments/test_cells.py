"""The kinds of cells: all methods and measures, shared vectors, disjoint masks, failing rates."""

from pathlib import Path
from typing import Any

import pytest

from talos.app.experiments.places import SPARSE
from talos.app.experiments.settings import MEASURES
from talos.app.report.figures import FIGURES
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods import METHODS
from talos.task_vectors import TaskVector
from tests.app.experiments.test_kills import numbers
from tests.app.experiments.tiny_experiment import TASKS, run_tiny, tiny_recipe

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
    ]
    recipe = tiny_recipe(seeds=[0], methods=methods, evaluation={"measures": list(MEASURES)})
    return out, run_tiny(out, recipe)


@pytest.mark.slow
def test_every_measure_is_there_for_the_rows_that_it_suits(
    done: tuple[Path, dict[str, Any]],
) -> None:
    _, results = done
    rows = {row["row"]: row["method"] for row in results["rows"]}
    assert len(rows) == 4 + len(OTHERS)
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
        calibrated = rows[row] == "talos"
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
def test_disjoint_masks_share_no_entry(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    assert results["mask_iou"]["tiny"]["talos-disjoint-true"] == [[1, 0], [0, 1]]
    masks: dict[str, dict[str, Mask]] = {}
    for file in results["files"]:
        if file["kind"] == "mask" and file["row"] in ("talos", "talos-disjoint-true"):
            masks.setdefault(file["row"], {})[file["task"]] = Mask.load(out / file["path"])
    assert masks["talos-disjoint-true"] == Mask.disjoint(masks["talos"])


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


def test_a_damaged_cell_or_a_missing_vector_is_made_anew(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    recipe = tiny_recipe(**ONE_SEED, methods=[{"method": "nonlinear", "lr": 1e-3}])
    results = run_tiny(out, recipe)
    vector = sorted(out.glob("vectors/*"))[0]
    bits = vector.read_bytes()
    vector.unlink()
    cell = next(out.glob("cells/addition/*.json"))
    text = cell.read_text()
    cell.write_text(text[:-20])
    again = run_tiny(out, recipe, on_note=notes.append)
    assert len(notes) == 2
    assert numbers(again) == numbers(results)
    assert vector.read_bytes() == bits
    assert cell.read_text().split('"seconds"')[0] == text.split('"seconds"')[0]
