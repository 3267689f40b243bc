"""`talos merge`: methods and their options, recipes, what `talos inspect` shows of the result."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import talos
from talos.app.cli import main
from talos.masks import Mask
from talos.names import named_parameters
from talos.task_vectors import TaskVector
from tests.app.test_cli import refused
from tests.tiny import save_tiny_encoder

NAME = "layer.0.query.weight"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TaskVector]:
    """Two vectors of one base, in a.safetensors and b.safetensors of the current folder."""
    monkeypatch.chdir(tmp_path)
    base = {NAME: torch.zeros(8, 8)}
    safetensors.torch.save_file(base, "base.safetensors")
    made = []
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        vector = TaskVector.from_models(base, {NAME: torch.randn(8, 8)}, metadata={"task": name})
        vector.save(f"{name}.safetensors")
        made.append(vector)
    return made


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("", {}),
        ("--method mean", {}),
        ("--method trim --density 0.3", {"density": 0.3}),
        ("--method ties --density 0.3", {"density": 0.3}),
        (
            "--method dare --density 0.3 --seed 5 --follow ties",
            {"density": 0.3, "seed": 5, "follow": "ties"},
        ),
        (
            "--method breadcrumbs --drop-largest 0.1 --drop-smallest 0.3",
            {"drop_largest": 0.1, "drop_smallest": 0.3},
        ),
        (
            "--method tall_masks --strictness 0.2 --least-tasks 1",
            {"strictness": 0.2, "least_tasks": 1},
        ),
    ],
)
def test_options_are_the_settings_of_the_method(
    options: str,
    settings: dict[str, object],
    pair: list[TaskVector],
    capsys: pytest.CaptureFixture[str],
) -> None:
    terms = ["merge", "a.safetensors:0.4", "b.safetensors:-0.6", "--out", "edit.safetensors"]
    assert main([*terms, *options.split()]) == 0
    method = options.split()[1] if options else "task_arithmetic"
    wanted = talos.merge(pair, method, scaling_coefs=[0.4, -0.6], **settings)
    assert TaskVector.load("edit.safetensors") == wanted
    capsys.readouterr()
    assert main(["inspect", "edit.safetensors"]) == 0
    shown, err = capsys.readouterr()
    assert re.search(rf"merge: method +{method}", shown)
    assert "--vector edit.safetensors --scale 1" in err  # the second coefficient is negative
    assert re.search(r"\n +[\d.]+ +a ", shown)
    assert re.search(r"\n +-[\d.]+ +b ", shown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method none", "--method must be task_arithmetic, mean, trim, ties, dare"),
        ("--density 0.1", "--density must be left out with --method task_ar.*for trim, ties, dare"),
        ("--method mean --seed 1", "--seed must be left out with --method mean, got 1; it is for"),
        ("--method ties --density 2", r"--density must lie in \(0, 1\], got 2"),
        ("--method dare --follow dare", "--follow must be task_arithmetic, mean, ties"),
        ("--method tall_masks --least-tasks 0", "--least-tasks must be an integer of at least 1"),
        ("--method breadcrumbs --drop-largest 0.5", "--drop-smallest must leave something"),
    ],
)
def test_options_are_checked_by_name(
    options: str,
    message: str,
    pair: list[TaskVector],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "--out", "edit.safetensors"]
    refused([*words, *options.split()], capsys, message, tmp_path)
    refused(["merge", "a.safetensors"], capsys, "--out must be a file to write", tmp_path)


def test_a_density_that_keeps_nothing_is_refused_by_its_option(
    pair: list[TaskVector], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "a.safetensors", "--out", "edit.safetensors", "--method", "ties"]
    assert main([*words, "--density", "1e-9"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --density must keep at least one of 64 entries")


RECIPE = """
base = "base.safetensors"
method = "ties"
vectors = [{file = "a.safetensors", scaling_coef = 0.4}, "b.safetensors"]
outputs = ["edit.safetensors", {file = "half.safetensors", dtype = "bfloat16"}]

[settings]
density = 0.3
"""


def test_a_recipe_names_all_of_a_merge(
    pair: list[TaskVector],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("recipe.toml").write_text(RECIPE)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)  # files lie beside the recipe
    assert main(["merge", "../recipe.toml"]) == 0
    assert "half.safetensors: 2 vectors" in capsys.readouterr().out
    wanted = talos.merge(pair, "ties", density=0.3, scaling_coefs=[0.4, 1.0])
    assert TaskVector.load("../edit.safetensors") == wanted
    assert TaskVector.load("../half.safetensors") == wanted.astype(torch.bfloat16)
    refused(["merge", "../recipe.toml"], capsys, "outputs must not exist.*--overwrite", tmp_path)
    Path("../recipe.toml").write_text(
        RECIPE.replace('method = "ties"\n', "").replace("density = 0.3", "")
    )
    assert main(["merge", "../recipe.toml", "--overwrite"]) == 0
    assert TaskVector.load("../edit.safetensors") == 0.4 * pair[0] + pair[1]
    by_layer = RECIPE.replace("scaling_coef = 0.4", 'scaling_coef = {"layer.0" = 2.0, "" = 0.0}')
    Path("../recipe.toml").write_text(by_layer)
    assert main(["merge", "../recipe.toml", "--overwrite"]) == 0
    wanted = talos.merge(pair, "ties", density=0.3, scaling_coefs=[2.0, 1.0])
    assert TaskVector.load("../edit.safetensors") == wanted


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method", "methods", "keys of the recipe must be among base, method.* got methods"),
        ("scaling_coef ", "scale ", "keys of vectors must be among file, scaling_coef, got scale"),
        ("dtype = ", "type = ", "keys of outputs must be among file, dtype, got type"),
        ("bfloat16", "int8", "dtype must be float32, bfloat16, float16, got 'int8'"),
        ('"ties"', '"tie"', "method must be one of task_arithmetic"),
        ("density = 0.3", "densty = 0.3", "settings of ties must be among .* got densty"),
        ("density = 0.3", "scaling_coefs = [1, 1]", "a table without scaling_coefs"),
        ("scaling_coef = 0.4", 'scaling_coef = "x"', r"scaling_coefs\[0\] must be a finite number"),
        ("half.safe", "edit.safe", "outputs must be different files"),
        ('"half.safetensors"', "3", "outputs must hold files or tables with file"),
        ("vectors", "vectors = []\n[x]\ny", "RECIPE|keys of the recipe"),
        ('"b.safetensors"', '"c.safetensors"', "a term must be an existing file"),
        ("method = ", "method ", "RECIPE must be TOML"),
        ("base.safetensors", "other.safetensors", r"base must be the base .* in the same dtype$"),
        ("scaling_coef = 0.4", f"scaling_coef = {10**400}", "must be a finite number"),
        ("density = 0.3", f"density = {'9' * 5000}", "RECIPE must be TOML"),
        ("density = 0.3", f"density = {'[' * 5000}", "RECIPE must be TOML"),
        ("base.safetensors", "less.safetensors", "base must have the tensors of the vectors"),
        ('"base.safetensors"', "3", "base must be a text"),
    ],
)
def test_a_wrong_recipe_writes_nothing(
    old: str,
    new: str,
    message: str,
    pair: list[TaskVector],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    safetensors.torch.save_file({NAME: torch.ones(8, 8)}, "other.safetensors")
    safetensors.torch.save_file({"w": torch.ones(8, 8)}, "less.safetensors")
    assert old in RECIPE
    Path("recipe.toml").write_text(RECIPE.replace(old, new, 1))
    refused(["merge", "recipe.toml"], capsys, message, tmp_path)


def test_merges_of_linearized_vectors_are_evaluated_as_such(
    pair: list[TaskVector], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "--out", "edit.safetensors", "--overwrite"]
    for methods, wanted in ((("linearized", "talos"), False), (("linearized",) * 2, True)):
        for vector, name, method in zip(pair, ("a", "b"), methods, strict=True):
            replace(vector, metadata={"method": method}).save(f"{name}.safetensors")
        for merge in ("task_arithmetic", "ties"):
            assert main([*words, "--method", merge]) == 0
            assert ("--linearized" in capsys.readouterr().err.rsplit("next", 1)[1]) == wanted
            assert main(["inspect", "edit.safetensors"]) == 0
            assert ("--linearized" in capsys.readouterr().err.rsplit("next", 1)[1]) == wanted


def test_a_recipe_stands_alone(
    pair: list[TaskVector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.toml").write_text(RECIPE)
    refused(["merge", "recipe.toml", "a.safetensors"], capsys, "must stand alone", tmp_path)
    refused(
        ["merge", "recipe.toml", "--density", "0.1"],
        capsys,
        "--density must be left out with a recipe, got 0.1; write it into recipe.toml",
        tmp_path,
    )
    refused(["merge", "none.toml"], capsys, "RECIPE must be an existing file", tmp_path)


def test_the_base_may_be_a_model_and_is_named_in_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from talos.app.models import load_encoder

    monkeypatch.chdir(tmp_path)
    model = save_tiny_encoder(tmp_path / "tiny")
    classifier = load_encoder(model).classifier(["a cat", "a dog"])
    name, param = next(n for n in named_parameters(classifier).items() if "query.weight" in n[0])
    tuned = {name: param.detach() + 1}
    TaskVector.from_models({name: param.detach()}, tuned).save("a.safetensors")
    Path("recipe.toml").write_text(
        'base = "tiny"\nvectors = ["a.safetensors"]\noutputs = ["edit.safetensors"]\n'
    )
    capsys.readouterr()
    assert main(["merge", "recipe.toml"]) == 0
    assert "talos eval --model tiny --data TASK" in capsys.readouterr().err
    mask = Mask.from_dense({name: torch.ones_like(param) > 0})
    TaskVector(mask, torch.ones(mask.nnz), metadata={"model": "org/model"}).save("a.safetensors")
    assert main(["merge", "a.safetensors", "--out", "edit.safetensors", "--overwrite"]) == 0
    assert "talos eval --model org/model --data TASK" in capsys.readouterr().err
    assert main(["inspect", "edit.safetensors"]) == 0
    wanted = "talos eval --model org/model --data TASK --vector edit.safetensors --scale grid"
    assert wanted in capsys.readouterr().err
    replace(mask, metadata={"model": "org/model"}).save("mask.safetensors")
    assert main(["inspect", "mask.safetensors"]) == 0
    assert "talos train --model org/model --data TASK --mask" in capsys.readouterr().err
    TaskVector(mask, torch.ones(mask.nnz), metadata={"extracted": {}}).save("x.safetensors")
    assert main(["inspect", "x.safetensors"]) == 0
    assert "talos export x.safetensors --base BASE" in capsys.readouterr().err


@pytest.mark.parametrize(("density", "kept"), [(0.2, False), (0.25, True), (0.9, True)])
def test_a_density_that_trims_nothing_is_named(
    density: float,
    kept: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    mask = Mask.from_dense({NAME: torch.arange(64).reshape(8, 8) < 16})
    vector = TaskVector(mask, torch.randn(16))
    vector.save("a.safetensors")
    for method in ("trim", "ties"):
        words = ["merge", "a.safetensors", "--out", "e.safetensors", "--overwrite"]
        assert main([*words, "--method", method, "--density", str(density)]) == 0
        shown = capsys.readouterr().err
        assert (TaskVector.load("e.safetensors").mask.nnz == 16) == kept
        line = f"density {density:g} keeps every entry: no vector has more than 0.25"
        assert (line in shown) == kept
