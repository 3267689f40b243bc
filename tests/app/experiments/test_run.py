"""A tiny experiment from end to end: its cells, its numbers, its folder."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from talos.app.experiments import results as sums
from talos.app.experiments.gathered import Gathered
from talos.app.experiments.run import Progress, load_tasks
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.app.experiments.tiny_experiment import TASKS, run_tiny, tiny_recipe

Done = tuple[Path, dict[str, Any], list[Progress]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A finished run: its folder, its results, its progress."""
    out = tmp_path_factory.mktemp("experiment") / "out"
    seen: list[Progress] = []
    return out, run_tiny(out, on_progress=seen.append), seen


def test_the_folder_holds_everything(done: Done) -> None:
    out, results, _ = done
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {file["path"] for file in results["files"]} == {
        path.relative_to(out).as_posix() for path in out.glob("*/*.safetensors")
    }
    for file in results["files"]:
        path = out / file["path"]
        assert path.stat().st_size == file["bytes"]
        loaded = Mask.load(path) if file["kind"] == "mask" else TaskVector.load(path)
        mask = loaded if isinstance(loaded, Mask) else loaded.mask
        assert mask.nnz == file["entries"]
        assert loaded.metadata.items() >= {"task": file["task"], "max_length": 12}.items()
        own = {"base"} if file["kind"] == "mask" else {"method", "steps", "lr", "seed"}
        assert loaded.metadata.keys() >= {"class_names", "class_texts", "data", "model", *own}


def test_the_numbers_hold_together(done: Done) -> None:
    _, results, _ = done
    assert [row["row"] for row in results["rows"]] == ["talos", "nonlinear"]
    assert [len(results["rates"]["tiny"][row]) for row in ("talos", "nonlinear")] == [2, 1]
    for row, rates in results["rates"]["tiny"].items():
        best = max(rate["added"] for rate in rates)
        chosen = [rate["lr"] for rate in rates if rate["chosen"]]
        assert chosen == [next(rate["lr"] for rate in rates if rate["added"] == best)]
        summary = next(each for each in results["summary"] if each["row"] == row)
        runs = [each for each in results["runs"] if each["row"] == row]
        assert [(run["seed"], run["lr"]) for run in runs] == [(0, chosen[0]), (1, chosen[0])]
        figures = summary["figures"]
        for key, of in (("added", "absolute"), ("normalised", "normalised")):
            values = [run["addition"][of]["value"] for run in runs]
            assert figures[key]["by_seed"] == pytest.approx(values)
            assert figures[key]["value"] == pytest.approx(fmean(values))
        alone = [fmean(each["value"] for each in run["single"].values()) for run in runs]
        assert figures["alone"]["by_seed"] == pytest.approx(alone)
        for key in ("target", "control"):
            value = fmean(runs[0]["negation"][task][key]["value"] for task in TASKS)
            assert figures[key]["by_seed"] == pytest.approx([value])
        assert set(runs[1]["negation"].values()) == {None}
        for each in figures.values():
            assert 0 <= each["low"] <= each["value"] <= each["high"]
    first, second = results["summary"]
    assert first["against_first"] is None
    for key in ("added", "normalised"):
        gap = second["figures"][key]["value"] - first["figures"][key]["value"]
        assert second["against_first"][key]["value"] == pytest.approx(gap)
    added = [each["figures"]["added"]["value"] for each in (first, second)]
    best, other = (second, first) if added[1] > added[0] else (first, second)
    assert best["against_best"] is None
    assert list(other["against_best"]) == ["added"]
    behind = other["against_best"]["added"]
    assert behind["value"] == pytest.approx(abs(added[1] - added[0]))
    assert behind["low"] <= behind["value"] <= behind["high"]
    assert list(results["masks"]["tiny"]) == ["talos"]
    for mask in results["masks"]["tiny"]["talos"].values():
        assert sum(each["nnz"] for each in mask["structure"]) == mask["nnz"]


def test_every_cell_reports_progress(done: Done) -> None:
    out, _, seen = done
    last = [each for each in seen if each.cells][-1]
    assert last.ended
    assert last.cells == last.all_cells == len(list(out.glob("cells/*/*.json")))
    assert last.left == 0
    trained = next(place for place, each in enumerate(seen) if each.label.startswith("vector"))
    assert {each.left for each in seen[:trained]} == {None}
    assert all(0 <= each.done <= each.total and each.cells <= each.all_cells for each in seen)
    trained = [each for each in seen if each.label.startswith("vector") and each.loss is not None]
    assert len(trained) == 2 * 2 * (3 + 2)  # steps, tasks, and vectors of a task


def test_what_is_wrong_with_a_task_names_it() -> None:
    tasks = ["character_kind", "digits"]
    recipe = tiny_recipe(tasks=tasks, training={"sizes": [200, 20, 8]})
    with pytest.raises(TalosValueError, match="one example per class of digits"):
        load_tasks(recipe)


def test_equally_good_rates_differ_by_their_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [{"lr": 1e-3, "added": 0.3}, {"lr": 1e-2, "added": 0.1 + 0.2}]
    assert rates[0]["added"] < rates[1]["added"]
    monkeypatch.setattr(sums, "_rates", lambda *_: rates)
    recipe = tiny_recipe()
    assert sums.chosen_rate(Gathered(recipe, []), "tiny", recipe.rows[0]) == 1e-3


def test_a_finished_run_makes_nothing_anew(done: Done) -> None:
    out, results, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.is_file()}
    again = run_tiny(out)
    for key in results.keys() - {"created"}:
        assert again[key] == results[key], key
    assert {path: path.stat().st_mtime_ns for path in before} == before
