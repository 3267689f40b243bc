"""The demo on one's own tasks: small files, one step, several densities and seeds, images."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from talos.app.cli import main
from talos.app.demo import DemoSettings, run_sweep, sweep
from talos.app.demo.report import load_results
from talos.app.demo.report.results import FIGURES
from talos.app.tasks import load_file
from talos.errors import TalosValueError
from talos.masks import Mask
from tests.tiny import save_tiny_encoder
from tests.tiny_models import CLIP, save_images, save_tiny_clip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:a mask from 2 samples is mostly noise"),
]

TINY: dict[str, Any] = {
    "samples": 16,
    "rounds": 1,
    "steps": 2,
    "batch_size": 8,
    "max_length": 12,
    "grid": 3,
    "bootstrap": 20,
    "nonlinear_lr": 1e-3,
    "lr": 1e-2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two files of three texts a class: one for each split."""
    folder = tmp_path_factory.mktemp("study")
    save_tiny_encoder(folder / "model")
    for name, words in (("pets", ("cat", "dog")), ("signs", ("plus", "minus"))):
        rows = [f"{word} number {i},{word}" for word in words for i in range(3)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    return folder


@pytest.fixture(scope="module")
def swept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    tasks = [load_file(folder / f"{name}.csv") for name in ("pets", "signs")]
    settings = DemoSettings(model=str(folder / "model"), tasks=("pets", "signs"), **TINY)
    return out, run_sweep(settings, out, [0.3, 0.1], [4, 5], tasks=tasks)


def options(folder: Path, *words: object) -> list[str]:
    data = [word for name in ("pets", "signs") for word in ("--data", f"{folder / name}.csv")]
    return ["demo", *data, "--model", str(folder / "model"), *map(str, words)]


def test_own_tasks_may_be_small_and_have_one_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--quick", "--steps", 1, "--density", 0.05, "--methods", "talos", "--out", out]
    assert main(options(folder, *words)) == 0
    shown, err = capsys.readouterr()
    assert "TaLoS (sparse)" in shown
    assert "next" not in shown
    assert re.search(r"pets.csv: 6 rows.*2 train, 2 validation, 2 test", err)
    results = load_results(out / "results.json")
    edited = results["addition"]["talos"]["scaling_coef"] != 0
    own = f"talos eval --model {folder / 'model'} --data {folder / 'pets.csv'} --data {folder}"
    assert (own in err) == edited
    assert ("its merged model is the pretrained one" in " ".join(shown.split())) != edited
    assert [task["name"] for task in results["tasks"]] == ["pets", "signs"]
    assert results["tasks"][0]["examples"] == {"train": 2, "validation": 2, "test": 2}
    mask = Mask.load(out / "masks" / "pets.safetensors")
    assert mask.nnz == round(0.05 * mask.numel)
    assert mask.metadata["samples"] == 2  # each once
    assert results["training"]["talos"]["signs"]["steps"] == 1


def test_a_sweep_has_a_run_for_each_density_and_seed(
    swept: tuple[Path, dict[str, Any]],
) -> None:
    out, results = swept
    assert load_results(out / "results.json") == json.loads(json.dumps(results))
    cells = [(cell["density"], cell["seed"]) for cell in results["cells"]]
    assert cells == [(0.3, 4), (0.3, 5), (0.1, 4), (0.1, 5)]
    for cell in results["cells"]:
        one = load_results(out / cell["folder"] / "results.json")
        assert (one["settings"]["density"], one["settings"]["seed"]) == (
            cell["density"],
            cell["seed"],
        )
        methods = [method["name"] for method in one["methods"]]
        # A dense method is the same at every density.
        assert methods == (["talos", "nonlinear"] if cell["density"] == 0.3 else ["talos"])
        for method in methods:
            own = cell["figures"][method]
            assert own["added"] == one["addition"][method]["absolute"]["value"]
            alone = fmean(each["value"] for each in one["single"][method].values())
            assert own["alone"] == pytest.approx(alone)
            target = fmean(each["target"]["value"] for each in one["negation"][method].values())
            assert own["target"] == pytest.approx(target)
    assert not (out / "masks").exists()


def test_a_sweep_is_summed_up_over_the_seeds(swept: tuple[Path, dict[str, Any]]) -> None:
    _, results = swept
    rows = [(row["method"], row["density"], row["seeds"]) for row in results["summary"]]
    assert rows == [("talos", 0.3, 2), ("talos", 0.1, 2), ("nonlinear", None, 2)]
    for row in results["summary"]:
        own = [
            cell["figures"][row["method"]]
            for cell in results["cells"]
            if cell["density"] == (row["density"] or 0.3)
        ]
        for key in FIGURES:
            values = [figures[key] for figures in own]
            assert row[key]["mean"] == pytest.approx(fmean(values))
            assert (row[key]["low"], row[key]["high"]) == (min(values), max(values))


def test_the_page_of_a_sweep_is_made_again(
    swept: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = swept
    again = tmp_path / "again.html"
    assert main(["report", str(out / "results.json"), "--out", str(again)]) == 0
    page = again.read_text()
    assert page == (out / "report.html").read_text()
    assert "2 tasks, 2 densities, 2 seeds" in page
    assert page.count("<svg") == 1
    assert "<td>density</td><td>0.3, 0.1</td>" in page
    assert "<td>sizes</td>" not in page  # own tasks have others
    for cell in results["cells"]:
        assert f'href="{cell["folder"]}/report.html"' in page
    shown = capsys.readouterr().out
    for row in results["summary"]:
        density = "" if row["density"] is None else f"{row['density']:g}"
        assert re.search(rf"\) +{density} +{100 * row['alone']['mean']:.1f} ", shown) or not density


def test_a_sweep_counts_the_runs_without_an_edit(
    swept: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = swept
    for cell in results["cells"]:
        added = load_results(out / cell["folder"] / "results.json")["addition"]
        assert cell["unedited"] == [name for name in added if added[name]["scaling_coef"] == 0]
    cells = [
        cell | {"unedited": ["talos"] if cell["seed"] == 4 and cell["density"] == 0.1 else []}
        for cell in results["cells"]
    ]
    path, page = tmp_path / "results.json", tmp_path / "page.html"
    path.write_text(json.dumps(results | {"cells": cells}))
    assert main(["report", str(path), "--out", str(page)]) == 0
    line = (
        "TaLoS (sparse) at density 0.1: no sum of the vectors was better on validation data in 1 "
        "of 2 runs, whose merged model is the pretrained one."
    )
    shown = capsys.readouterr().out
    assert line in shown
    assert shown.count("no sum of the vectors") == 1
    assert f"<p>{line}</p>" in page.read_text()


def test_the_runs_of_a_sweep_are_compared(
    swept: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = swept
    assert main(["compare", str(out / "results.json"), "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    means = {row["run"]: row["accuracy"]["value"] for row in rows if row["task"] is None}
    assert means == {
        f"{Path(cell['folder']).name} {method}": figures["added"]
        for cell in results["cells"]
        for method, figures in cell["figures"].items()
    }


def test_a_changed_file_is_no_traceback(
    swept: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [{key: each[key] for key in each if key != "density"} for each in swept[1]["cells"]]
    changed = tmp_path / "results.json"
    changed.write_text(json.dumps({**swept[1], "cells": cells}))
    assert main(["report", str(changed), "--out", str(tmp_path / "page.html")]) == 2
    assert "error: RESULTS must be as `talos demo` wrote it, got " in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_densities_that_are_almost_equal_have_their_own_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    folders: list[Path] = []

    def run(settings: DemoSettings, out: Path, **options: object) -> dict[str, object]:
        folders.append(out)
        if len(folders) == 2:
            raise Enough
        return {"addition": {name: {"scaling_coef": 0.5} for name in settings.methods}}

    monkeypatch.setattr(sweep, "run_demo", run)
    monkeypatch.setattr(sweep, "_figures", lambda *_: {})
    with pytest.raises(Enough):
        sweep.run_sweep(DemoSettings(), tmp_path, [0.1, 0.1000001], [0])
    assert folders[0] != folders[1]


def test_an_earlier_sweep_is_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = out / "cells" / "density-0.5-seed-9"
    old.mkdir(parents=True)
    (old / "results.json").write_text("old")
    words = ["--quick", "--steps", 1, "--seeds", 2, "--methods", "talos", "--out", out]
    assert main(options(folder, *words)) == 2
    assert main(options(folder, *words, "--overwrite")) == 0
    assert not old.exists()
    assert [cell["seed"] for cell in load_results(out / "results.json")["cells"]] == [0, 1]


@pytest.mark.parametrize(
    ("densities", "seeds", "message"),
    [
        ([], [0], "densities must differ, at least one"),
        ([0.1, 0.1], [0], "densities must differ"),
        ([0.1], [1, 1], "seeds must differ"),
        ([2.0], [0], "density must lie in"),
        ([0.1], [-1], "seed must be an integer"),
    ],
)
def test_a_sweep_checks_its_cells(
    densities: list[float], seeds: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TalosValueError, match=message):
        run_sweep(DemoSettings(), tmp_path / "out", densities, seeds)
    assert not (tmp_path / "out").exists()


def test_images_with_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_tiny_clip(tmp_path / "clip")
    data = []
    for name, classes in (("bright", {"dark": 10, "light": 10}), ("other", {"a": 10, "b": 10})):
        data += ["--data", str(save_images(tmp_path / name, classes))]
    model = ["--model", f"openclip:{CLIP}:{weights}"]
    words = [*data, *model, "--quick", "--steps", "1", "--methods", "talos"]
    assert main(["demo", *words, "--out", str(tmp_path / "out")]) == 0
    results = load_results(tmp_path / "out" / "results.json")
    assert [task["name"] for task in results["tasks"]] == ["bright", "other"]
