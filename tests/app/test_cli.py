"""The command line: help, errors in one line with nothing written, files that go round."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import talos
from talos.app.cli import main
from talos.app.cli.commands import (
    calibrate,
    compare,
    demo,
    evaluate,
    experiment,
    export,
    extract,
    inspect,
    merge,
    predict,
    report,
    train,
)
from talos.app.cli.commands.merge import parse_term
from talos.app.cli.console import command
from talos.app.cli.suggestions import merge_command
from talos.app.models import load_encoder
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods import METHODS
from talos.params import select_parameters
from talos.task_vectors import Patch, TaskVector
from tests.task_vectors.test_resident_vectors import Watch
from tests.tiny import save_pets, save_tiny_encoder
from tests.tiny_models import CLIP, save_images, save_tiny_clip, save_tiny_gpt2, save_tiny_t5

COMMANDS = {
    "demo": demo,
    "experiment": experiment,
    "calibrate": calibrate,
    "train": train,
    "extract": extract,
    "merge": merge,
    "export": export,
    "predict": predict,
    "eval": evaluate,
    "compare": compare,
    "inspect": inspect,
    "report": report,
}
START = "import sys; from talos.app.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pets(tmp_path_factory.mktemp("data"), 60))


@pytest.fixture
def vectors(tmp_path: Path) -> tuple[Path, Path]:
    """Two task vectors of a small model with masks that overlap."""
    paths = []
    for place, picked in enumerate(([True, True, False, False], [False, True, True, False])):
        mask = Mask.from_dense({"layer.0.query.weight": torch.tensor(picked).reshape(2, 2)})
        path = tmp_path / f"v{place}.safetensors"
        TaskVector(mask, torch.tensor([1.0, 2.0]), metadata={"task": f"t{place}"}).save(path)
        paths.append(path)
    return paths[0], paths[1]


def refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], message: str, folder: Path
) -> None:
    """Exit code 2, one line that matches, nothing on stdout, nothing written."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option_and_ends_with_examples(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f"talos {command} " in text.rsplit("Examples", 1)[1]
    assert "[bold]" not in text
    assert command != "train" or all(method in text for method in METHODS)


@pytest.mark.parametrize(
    "example", [example for module in COMMANDS.values() for example in module.EXAMPLES]
)
def test_examples_parse(
    example: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each gets past the parser: what stops it is a missing file, here a folder that is one."""
    monkeypatch.chdir(tmp_path)
    for name in ("mask", "vector", "dense", "edit", "both"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "again.html").write_bytes(b"")
    for folder in ("demo",):
        (tmp_path / folder).write_bytes(b"")
    words = shlex.split(example)
    assert words[0] == "talos"
    if words[1] == "eval" and "--vector" not in words:
        words += ["--vector", "none.safetensors"]
    assert main(words[1:]) == 2
    err = capsys.readouterr().err
    assert re.search("must|safetensors", err), err
    assert "No such option" not in err


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"talos {talos.__version__}\n"
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bogus", "bogus.*; see `talos --help`"),
        ("merge", "FILE:COEFFICIENT must be given, got none; see `talos merge --help`"),
        ("calibrate --nonsense", "nonsense"),
        ("calibrate --data a --out m.safetensors --density 0", r"--density must lie in \(0, 1\]"),
        ("calibrate --data a --out m.safetensors --density nan", "--density must lie"),
        ("calibrate --data a --out m.safetensors --density x", "--density"),
        (
            "calibrate --data a --out m.safetensors --rounds 0",
            "--rounds must be an integer of",
        ),
        (
            "calibrate --data a --out m.safetensors --samples -1",
            "--samples must be an integer",
        ),
        ("calibrate --data a --out m.safetensors --target prob", "--target must be log_prob or"),
        ("calibrate --data a --out m.safetensors --draws 0", "--draws must be exact or at least 1"),
        ("calibrate --data a", "--out must be a file to write, got none; or pass --dry-run"),
        ("calibrate --data a --dry-run --out m.pt", "--out must end in .safetensors"),
        ("calibrate --data a --out m.safetensors --labels true", "--labels must be sampled or imp"),
        ("calibrate --data a --out m.safetensors --parity code", "--parity must be paper or rele"),
        (
            "calibrate --data a --out m.safetensors --parity released --target log_prob",
            "--target must be logit with --parity released, got log_prob",
        ),
        ("calibrate --data a --out m.pt", "--out must end in .safetensors"),
        ("calibrate --data a --out none/m.safetensors", "existing folder"),
        (
            "calibrate --data code_packages --out m.safetensors",
            "--data must be .* got code_packages; did you mean code_package?",
        ),
        (
            "calibrate --data none.csv --out m.safetensors",
            "--data must be a built-in task, .* got none.csv; built in are .* more",
        ),
        (
            "calibrate --data a --out m.safetensors --labels importance --draws exact",
            "--labels must be sampled with --draws exact",
        ),
        ("calibrate --data . --dry-run", "one folder of images per class, at least two"),
        ("calibrate --data digits --dry-run", "--model must read the images of digits, got minilm"),
        (
            "calibrate --data character_kind --model openclip:ViT-B-32:openai --dry-run",
            "--model must read the texts of character_kind, got openclip:.*which reads images",
        ),
        (
            "calibrate --data digits --model openclip:ViT-B-32:w.pt --dry-run",
            "pickled weights are never loaded",
        ),
        (
            "calibrate --data character_kind --model none/such/folder --dry-run",
            "--model must be .*no folder",
        ),
        (
            "train --data a --out v.safetensors --steps 0",
            "--steps must be an integer of",
        ),
        ("train --data a --out v.safetensors --lr -1", "--lr must be positive and finite, got -1"),
        (
            "train --data a --out v.safetensors --mask none.safetensors",
            "--mask must be an existing",
        ),
        ("train --data a --out v.safetensors --method sparse", "--method must be talos, nonlin"),
        (
            "train --data a --out v.safetensors --method talos",
            "--mask must be given with --method talos, got none; make one with talos calibrate",
        ),
        (
            "train --data a --out v.safetensors --method nonlinear --mask file",
            "--mask must be left out with --method nonlinear, got file",
        ),
        (
            "train --data a --out v.safetensors --method lota --rank 4",
            "--rank must be left out with --method lota, got 4; it is for l_lora",
        ),
        (
            "train --data a --out v.safetensors --density 0.1",
            "--density must be left out with --method nonlinear, got 0.1; it is for lota, random",
        ),
        (
            "train --data a --out v.safetensors --method l_lora --rank 0",
            "--rank must be an int",
        ),
        ("train --data a --out v.safetensors --method lota --density 2", "--density must lie in"),
        (
            "train --data a --out v.safetensors --sparse-lr 0.1",
            "--sparse-lr must be left out with --method nonlinear, got 0.1; it is for lota",
        ),
        (
            "train --data a --out v.safetensors --method lota --sparse-lr 0",
            "--sparse-lr must be positive",
        ),
        ("demo --out new --methods talos,none", "methods must be among talos, .*, got 'none'"),
        ("demo --out new --methods talos,talos", "must differ"),
        ("merge none.safetensors:0.5 --out e.safetensors", "existing file, got none.safetensors"),
        ("merge a.safetensors:x --out e.safetensors", "FILE.safetensors:NUMBER, got a.safetensors"),
        ("eval --data digits", "--model must read the images of digits, got minilm"),
        ("eval --data a --scale big", "--scale must be a finite number or grid, got big"),
        ("eval --data a --scale 0.5", "--vector must be given with --scale 0.5, got none"),
        ("eval --data a --data a", "--data must differ"),
        ("eval --data a --vector none.safetensors", "--vector must be an existing file"),
        ("compare none.json", "RUN must be an existing file, got none.json"),
        ("inspect none.safetensors", "FILE must be an existing file"),
        ("report none.json --out r.html", "DIR must be the folder of an experiment, got none.json"),
        ("demo --out file", "must be a folder, got the file"),
        ("demo --out .", "--overwrite"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    refused(arguments.split(), capsys, message, tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"not safetensors at all", None])
def test_broken_files_are_refused(
    damaged: bytes | None,
    vectors: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "broken.safetensors"
    content = vectors[0].read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damaged is None else damaged)
    out = str(tmp_path / "out.safetensors")
    refused(["inspect", str(path)], capsys, "broken.safetensors", tmp_path)
    refused(["merge", f"{path}:1", "--out", out], capsys, "broken.safetensors", tmp_path)


def test_merge_sums_over_the_union(
    vectors: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "edit.safetensors"
    assert main(["merge", f"{vectors[0]}:0.5", f"{vectors[1]}:-2", "--out", str(out)]) == 0
    assert TaskVector.load(out).values.tolist() == [0.5, -1.0, -4.0]
    text, err = capsys.readouterr()
    assert "3 entries" in text
    assert "in common" not in err
    assert f"talos inspect {out}" in err
    assert text.count("\n") == 1  # what is no result is not on stdout
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"0\.5 +t0 ", text)
    assert re.search(r"-2 +t1 ", text)
    before = out.read_bytes()
    refused(["merge", str(vectors[0]), "--out", str(out)], capsys, "--overwrite", tmp_path)
    assert main(["merge", str(vectors[0]), "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes() != before
    assert TaskVector.load(out).values.tolist() == [1.0, 2.0]


def test_the_next_commands_can_be_run_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", "--data", "my pets.csv") == "talos train --data 'my pets.csv'"
    edit = Path("edit.safetensors")
    assert "--out edit.safetensors" in merge_command(Path("a.safetensors"), 0.5)
    edit.touch()
    assert "--out edit-2.safetensors" in merge_command(edit, 0.5)


def test_merge_warns_of_vectors_that_share_no_tensor(
    vectors: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    mask = Mask.from_dense({"somewhere.else": torch.eye(2) > 0})
    TaskVector(mask, torch.ones(2)).save(other)
    out = tmp_path / "edit.safetensors"
    assert main(["merge", str(vectors[0]), str(other), "--out", str(out)]) == 0
    assert "no two vectors have a tensor in common" in capsys.readouterr().err


def test_inspect_shows_a_vector(
    vectors: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(vectors[0]), "--layers"]) == 0
    text, err = capsys.readouterr()
    for word in ("task vector", "2 entries", "float32", "query", "0.500", "task", "t0", "bytes"):
        assert word in text, word
    assert f"{vectors[0].stat().st_size:,} bytes" in text
    assert "next" not in text
    assert "next" in err
    assert "--linearized" not in err
    linearized = replace(TaskVector.load(vectors[0]), metadata={"method": "linearized"})
    linearized.save(vectors[0])
    assert main(["inspect", str(vectors[0])]) == 0
    assert "--linearized" in capsys.readouterr().err


def test_inspect_shows_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    Mask.from_dense({"layer.0.key.weight": torch.eye(4) > 0}, metadata={"made": "by [hand]"}).save(
        path
    )
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for word in ("a mask of 4 entries", "density 0.2500", "key", "bitmap", "by [hand]"):
        assert word in text, word


def test_inspect_shows_a_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = tmp_path / "p.safetensors", "layer.0.key.weight"
    Patch({name: (4, 4)}, {name: torch.tensor([1, 6])}, {name: torch.ones(2)}).save(path)
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for word in ("a patch of 2 entries", "density 0.1250", "key", "bytes"):
        assert word in text, word
    assert "next" not in text


def test_inspect_needs_no_memory_for_the_entries_that_a_patch_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.safetensors"
    shape = (1 << 30, 1 << 30)  # an index of it would take 137 TB
    Patch({"w": shape}, {"w": torch.tensor([0, (1 << 60) - 1])}, {"w": torch.ones(2)}).save(path)
    assert main(["inspect", str(path)]) == 0
    assert "of 1,152,921,504,606,846,976 entries" in capsys.readouterr().out


def test_inspect_shows_metadata_of_any_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mask = tmp_path / "v.safetensors", Mask.from_dense({"w": torch.ones(2) > 0})
    for kept in ("x", None, 3):
        about = {"sources": [{"scale": 1.0, "kept": kept, "of": {"task": "a"}}]}
        TaskVector(mask, torch.ones(2), metadata=about).save(path)
        assert main(["inspect", str(path)]) == 0
        assert "task" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "path", "coefficient"),
    [
        ("a.safetensors:0.4", "a.safetensors", 0.4),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("a.safetensors", "a.safetensors", 1.0),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
        ("C:a.safetensors:2", "C:a.safetensors", 2.0),
    ],
)
def test_terms(text: str, path: str, coefficient: float) -> None:
    assert parse_term(text) == (Path(path), coefficient)


@pytest.mark.parametrize("text", ["a.safetensors:", "a.safetensors:b", "x:nan", ":1"])
def test_bad_terms(text: str) -> None:
    with pytest.raises(TalosValueError, match=r"FILE\.safetensors:NUMBER"):
        parse_term(text)


def test_from_calibration_to_evaluation(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, vector = tmp_path / "mask.safetensors", tmp_path / "vector.safetensors"
    common = ["--model", model, "--data", data, "--max-length", "16"]
    scored = ["--samples", "24", "--rounds", "2", "--batch-size", "8"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    assert "talos train" in capsys.readouterr().err
    assert Mask.load(mask).density == pytest.approx(0.1, abs=1e-4)
    assert Mask.load(mask).metadata["task"] == "pets"
    trained = ["--mask", str(mask), "--steps", "8", "--batch-size", "8", "--lr", "0.05"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    assert "talos eval" in capsys.readouterr().err
    assert TaskVector.load(vector).mask == Mask.load(mask)
    assert TaskVector.load(vector).values.abs().max() > 0
    with Watch() as watch:
        assert main(["eval", *common, "--vector", str(vector), "--scale", "grid"]) == 0
    # 20 coefficients; 0 needs no edit, and neither does the test where it is chosen.
    pair = ["add_delta_", "scatter_"]
    assert watch.launches in (20 * pair, 21 * pair)
    text, err = capsys.readouterr()
    assert "talos train" in err  # the vector does not help
    for word in (
        "pets",
        "before",
        "edited",
        "validation accuracy, %",
        "0.05",
    ):
        assert word in text, word
    dense = tmp_path / "dense.safetensors"
    assert main(["train", *common, "--steps", "2", "--out", str(dense)]) == 0
    assert TaskVector.load(dense).mask.density == 1.0
    first = mask.read_bytes()
    assert main(["calibrate", *common, *scored, "--out", str(mask), "--overwrite"]) == 0
    assert mask.read_bytes() == first


@pytest.mark.parametrize(
    ("method", "options", "settings"),
    [
        ("linearized", [], {}),
        ("l_lora", ["--rank", "4"], {"rank": 4, "lora_alpha": 16.0, "method_seed": 0}),
        ("lota", ["--density", "0.2", "--sparse-lr", "0.01"], {"density": 0.2, "sparse_lr": 0.01}),
    ],
)
def test_other_methods_train_and_are_evaluated(
    method: str,
    options: list[str],
    settings: dict[str, object],
    model: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vector = tmp_path / "vector.safetensors"
    common = ["--model", model, "--data", data, "--max-length", "16"]
    trained = ["--method", method, "--steps", "3", "--batch-size", "8", "--out", str(vector)]
    assert main(["train", *common, *trained, *options]) == 0
    linearized = ["--linearized"] if method == "linearized" else []
    assert ("--linearized" in capsys.readouterr().err) == bool(linearized)
    metadata = TaskVector.load(vector).metadata
    assert metadata.items() >= {"method": method, "task": "pets", "seed": 0, **settings}.items()
    assert main(["eval", *common, "--vector", str(vector), *linearized]) == 0
    shown = capsys.readouterr()
    assert "edited" in shown.out
    assert "warning" not in shown.err
    other = [] if linearized else ["--linearized"]
    assert main(["eval", *common, "--vector", str(vector), *other]) == 0
    word = "with" if linearized else "without"
    expected = f"warning: a vector of the method {method} must be evaluated {word} --linearized"
    assert expected in capsys.readouterr().err


def test_a_dry_run_shows_what_would_be_scored(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = ["calibrate", "--model", model, "--data", data, "--density", "0.25", "--dry-run"]
    assert main([*arguments, "--samples", "40", "--seed", "5"]) == 0
    text, err = capsys.readouterr()
    encoder = load_encoder(model)
    selection = select_parameters(encoder.classifier(["cat", "dog"]), "maskable")
    entries = sum(each.numel for each in selection.values())
    rows = [line.split() for line in text.splitlines()]
    assert ["scored", "total", f"{len(selection):,}", f"{entries:,}"] in rows
    left_out = sum(p.numel() for p in encoder.parameters() if p.requires_grad) - entries
    assert ["left", "out", "total", "3", f"{left_out:,}"] in rows
    assert any(row[:3] == ["left", "out", "embedding"] and row[-1] == "embedding" for row in rows)
    assert f"{round(0.25 * entries):,} of {entries:,} entries will be selected" in text
    for word in ("scores of", "40 samples", "activations of a batch of 32"):
        assert word in text, word
    again = err.splitlines()[-1].strip()
    assert again == (
        f"talos calibrate --data {data} --model {model} --density 0.25 --samples 40 --seed 5 "
        "--out mask.safetensors"
    )
    assert main([*arguments, "--layers"]) == 0
    assert re.search(r"scored +1 +query +1 +1,024", capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before


def test_calibration_prints_speed_densities_and_stability(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    arguments = ["calibrate", "--model", model, "--data", data, "--out", str(path)]
    arguments += ["--batch-size", "16"]
    assert main([*arguments, "--samples", "32", "--check", "--labels", "importance"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"calibrate pets +[\d.,]+ samples/s", err), err
    mask = Mask.load(path)
    assert re.search(r"\(density 0\.100\), [\d.]+ [kM]?B; [\d.,]+ samples/s", out), out
    for row in mask.describe().by_kind():
        cells = [row.kind, str(row.tensors), f"{row.numel:,}", f"{row.nnz:,}", f"{row.density:.3f}"]
        assert re.search(" +".join(cells), out), cells
    stability, chance = mask.metadata["stability"], mask.metadata["stability_by_chance"]
    assert f"stability {stability:.2f}: " in out
    assert f"({chance:.2f} by chance)" in out
    assert main([*arguments, "--overwrite", "--samples", "8", "--parity", "released"]) == 0
    assert Mask.load(path).metadata["target"] == "logit"
    assert Mask.load(path) != mask
    assert "stability" not in capsys.readouterr().out  # of one batch there are no halves


@pytest.mark.slow
def test_clip_from_calibration_to_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_tiny_clip(tmp_path / "clip")
    images = save_images(tmp_path / "bright", {"dark": 40, "light": 40})
    mask, vector = tmp_path / "mask.safetensors", tmp_path / "vector.safetensors"
    common = ["--model", f"openclip:{CLIP}:{weights}", "--data", str(images), "--batch-size", "8"]
    assert main(["calibrate", *common, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"frozen +total.*", text)
    assert "no command trains it" in text
    scored = ["--samples", "24", "--rounds", "2", "--density", "0.3"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    assert all(name.startswith("visual.") for name in Mask.load(mask).names)
    trained = ["--mask", str(mask), "--steps", "12", "--lr", "0.01"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    assert TaskVector.load(vector).mask == Mask.load(mask)
    assert TaskVector.load(vector).values.abs().max() > 0
    assert main(["eval", *common, "--vector", str(vector), "--scale", "grid"]) == 0
    assert "validation accuracy, %" in capsys.readouterr().out
    digits = ["--model", common[1], "--data", "digits", "--samples", "16", "--rounds", "1"]
    assert main(["calibrate", *digits, "--out", str(mask), "--overwrite"]) == 0
    assert Mask.load(mask).metadata["task"] == "digits"


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_tiny_t5, save_tiny_gpt2])
def test_a_language_model_from_calibration_to_training(
    save: Callable[[Path], Path], data: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model")
    mask, vector = tmp_path / "mask.safetensors", tmp_path / "vector.safetensors"
    common = ["--model", str(folder), "--data", data, "--batch-size", "8"]
    scored = ["--samples", "16", "--rounds", "2", "--density", "0.2"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    assert set(Mask.load(mask).names) <= set(load_file(folder / "model.safetensors"))
    trained = ["--mask", str(mask), "--steps", "12", "--lr", "0.01"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    assert TaskVector.load(vector).metadata["model"] == "model"
    assert main(["eval", *common, "--vector", str(vector)]) == 0
    assert TaskVector.load(vector).values.abs().max() > 0


def test_too_many_samples_are_refused(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m.safetensors")
    arguments = ["calibrate", "--model", model, "--data", data, "--samples", "5000", "--out", out]
    refused(arguments, capsys, "--samples must be at most 96", tmp_path)


def test_data_of_one_name_is_refused(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = other / Path(data).name
    second.write_bytes(Path(data).read_bytes())
    assert main(["eval", "--model", model, "--data", data, "--data", str(second)]) == 2
    assert "--data must have different names" in capsys.readouterr().err


def test_a_vector_of_another_model_is_refused(
    model: str, data: str, vectors: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--model", model, "--data", data, "--vector", str(vectors[0])]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "layer.0.query.weight" in err
    assert "error: " in err
    assert "Traceback" not in out + err


def test_ctrl_c_before_the_work_begins_prints_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "check_input", interrupt)
    assert main(["inspect", "a.safetensors"]) == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing was written\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_prints_what_is_kept(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", START, "demo", "--model", model, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell would hand on that interrupts are ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "masks").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "interrupted: " in stderr
    assert "Traceback" not in stdout + stderr
