"""`talos experiment`: a run, a run that goes on, a part, and the dry run that writes nothing."""

import json
import re
from pathlib import Path

import pytest

from talos.app.cli import main
from talos.app.cli.experiments import after_run, duration
from talos.app.experiments import judging
from tests.tiny import save_pets, save_tiny_encoder

STUDY = """
title = "Pets and signs"
models = ["base"]
tasks = ["pets.csv", "signs.csv"]
[calibration]
samples = 8
rounds = 1
[training]
steps = 1
batch_size = 8
max_length = 8
[evaluation]
coefficients = 2
resamples = 20
measures = ["addition"]
[[methods]]
method = "talos"
lr = [1e-3, 1e-2]
[[methods]]
method = "nonlinear"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two tasks and a recipe."""
    made = tmp_path_factory.mktemp("study")
    save_tiny_encoder(made / "base")
    save_pets(made, 8)
    rows = [f"{word} {i},{word}" for i in range(8) for word in ("plus", "minus")]
    (made / "signs.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (made / "study.toml").write_text(STUDY, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    made = tmp_path_factory.mktemp("runs") / "out"
    assert main(["experiment", str(folder / "study.toml"), "--out", str(made)]) == 0
    return made


def test_a_run_writes_tables_a_page_and_goes_on(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (out / "report.html").is_file()
    assert [row["row"] for row in results["rows"]] == ["talos", "nonlinear"]
    cells = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*.json")}
    capsys.readouterr()
    assert main(["experiment", str(folder / "study.toml"), "--out", str(out)]) == 0
    shown, notes = capsys.readouterr()
    assert "TaLoS" in shown
    assert "non-linear fine-tuning" in shown
    assert re.search(r"TaLoS.* 0.01? largest tried|TaLoS.* 0.001 smallest tried", shown)
    assert "only one" in shown
    assert f"talos report {out}" in notes
    assert "vector" not in notes.split("figures:")[0], "a cell that is done has no line"
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*.json")} == cells


def test_a_part_of_a_recipe_is_run(folder: Path, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "part"), "--only", "nonl*"]
    assert main(["experiment", str(folder / "study.toml"), *words]) == 0
    results = json.loads((tmp_path / "part" / "results.json").read_text(encoding="utf-8"))
    assert [row["row"] for row in results["rows"]] == ["nonlinear"]
    assert not list((tmp_path / "part").glob("cells/mask"))


def test_a_part_never_replaces_the_tables_of_the_whole(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "results.json").read_bytes()
    words = ["experiment", str(folder / "study.toml"), "--out", str(out), "--only", "nonl*"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "TaLoS is left out: rows are compared with non-linear fine-tuning" in err
    assert "error: --only must be left out where the whole recipe is done" in err
    assert (out / "results.json").read_bytes() == before


def test_a_dry_run_counts_cells_and_writes_nothing(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    recipe = str(folder / "study.toml")
    assert main(["experiment", recipe, "--dry-run", "--out", str(tmp_path / "new")]) == 0
    shown, notes = capsys.readouterr()
    counts = {line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line.split()}
    assert counts["mask"] == ["2", "2"]
    assert counts["vector"] == ["6", "6"]
    assert counts["addition"] == ["3", "3"]
    assert "in all about " in shown
    assert "of vectors and masks" in shown
    assert f"talos experiment {recipe} --out" in notes
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "new").exists()
    assert main(["experiment", recipe, "--dry-run", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    counts = {line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line.split()}
    assert counts["vector"] == ["6", "0"]
    assert f"14 of 14 cells are done in {out}" in shown
    edited = tmp_path / "edited.toml"
    text = STUDY.replace("steps = 1", "steps = 2")
    for name in ("base", "pets.csv", "signs.csv"):
        text = text.replace(f'"{name}"', f'"{folder / name}"')
    edited.write_text(
        text.replace(f'"{folder}/base"', f'{{source = "{folder}/base", name = "base"}}')
    )
    capsys.readouterr()
    assert main(["experiment", str(edited), "--dry-run", "--out", str(out)]) == 0
    shown, notes = capsys.readouterr()
    counts = {line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line.split()}
    assert counts["vector"] == ["6", "6"]
    assert counts["mask"] == ["2", "0"]
    assert notes.split()[-2:] == ["--out", str(out)]
    assert f"4 of 14 cells are done in {out}" in shown
    words = ["experiment", str(edited), "--dry-run", "--overwrite", "--out", str(out)]
    assert main(words) == 0
    shown, notes = capsys.readouterr()
    assert "cells are done" not in shown
    assert notes.split()[-3:] == ["--overwrite", "--out", str(out)]


def test_the_demo_is_its_recipe_with_some_keys_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    data = ["--data", "pets.csv", "--data", "signs.csv", "--model", "base", "--quick"]
    small = ["--steps", "1", "--max-length", "8", "--methods", "random,nonlinear"]
    more = ["--density", "0.05", "--density", "0.2", "--seeds", "2", "--seed", "5"]
    assert main(["demo", *data, *small, *more, "--out", str(tmp_path / "demo")]) == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    rows = ["random-density-0.05", "random-density-0.2", "nonlinear"]
    assert [row["row"] for row in results["rows"]] == rows
    assert {run["seed"] for run in results["runs"]} == {5, 6}
    assert results["recipe"]["training"]["steps"] == 1
    assert results["recipe"]["evaluation"]["coefficients"] == 6


def test_ctrl_c_says_that_the_same_command_goes_on(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("talos.app.experiments.training.training_batches", interrupt)
    assert judging.training_batches is not interrupt
    words = ["experiment", str(folder / "study.toml"), "--out", str(tmp_path / "out")]
    assert main(words) == 130
    err = capsys.readouterr().err
    assert "finished cells are kept in" in err
    assert "the same command goes on" in err


def test_progress_numbers_each_cell_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", str(folder / "study.toml"), "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    lines = re.findall(r"(?m)^ *[\d.]+ s  (.*?) · (.*?) · ", err)
    numbers = [re.match("cell ([0-9]+) of 14", head) for head, _ in lines]
    assert [found and int(found[1]) for found in numbers] == list(range(1, 15))
    heads = {kind: head for head, kind in reversed(lines)}  # the first cell of each kind
    assert "left" not in heads["mask"]
    assert "about" in lines[12][0]
    assert "left" not in lines[13][0]
    assert re.search(r"(?m)^ *[\d.]+ s  load base$", err)
    vectors = [line for line in err.splitlines() if "· vector ·" in line]
    assert len(vectors) == 6
    assert "lr 0.001 · seed 0 · pets" in vectors[0]


def test_next_steps_hold_only_what_eval_can_read(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results["runs"][0]["addition"]["scaling_coef"] = 0.5
    after_run(results, out)
    notes = capsys.readouterr().err
    data = f"--data {folder / 'pets.csv'} --data {folder / 'signs.csv'}"
    assert f"talos eval --model {folder / 'base'} {data} --vector edit.safetensors" in notes
    lr = results["runs"][0]["lr"]
    assert notes.count(f"-lr-{lr:g}-") == 3, "vectors of the chosen rate"
    task = {"data": "pets.csv", "name": "signs", "settings": {"text": "text"}}
    results["recipe"]["tasks"][1] = task
    after_run(results, out)
    notes = capsys.readouterr().err
    assert "talos eval" not in notes


def test_a_column_that_a_recipe_must_name_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mail.csv").write_text("body,kind\na,b\n", encoding="utf-8")
    text = STUDY.replace('"signs.csv"', '{data = "mail.csv", text = "body"}')
    (folder / "mail.toml").write_text(text, encoding="utf-8")
    assert main(["experiment", str(folder / "mail.toml"), "--dry-run"]) == 2
    assert 'say which one it is, such as label = "kind"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.44, "0.4 s"), (45, "45 s"), (119, "119 s"), (121, "2 min"), (7500, "2 h 5 min")],
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
