"""From training on the command line to a model in use: names, folders, heads, predictions."""

import csv
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import talos
from talos.app.cli import main
from talos.task_vectors import TaskVector
from tests.cases import assert_bit_equal
from tests.tiny import save_tiny_encoder
from tests.tiny_models import CLIP, save_images, save_tiny_clip, save_tiny_gpt2, save_tiny_t5


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def write_rows(path: Path, rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(rows.items())
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, a task `pets.csv` of three labels, its mask and its vector."""
    home = tmp_path_factory.mktemp("production")
    save_tiny_encoder(home / "base")
    sounds = {"cat": "meow", "dog": "woof", "cow": "moo"}
    rows = {f"{sound * (1 + i % 3)} {i}": pet for pet, sound in sounds.items() for i in range(40)}
    write_rows(home / "pets.csv", rows)
    train(home, ["--model", str(home / "base"), "--data", str(home / "pets.csv")])
    return home


def train(home: Path, common: list[str]) -> None:
    """Writes `mask.safetensors` and `vector.safetensors` as the command line makes them."""
    scored = ["--samples", "24", "--rounds", "2", "--density", "0.3", "--batch-size", "8"]
    run("calibrate", *common, *scored, "--out", home / "mask.safetensors")
    trained = ["--steps", "12", "--lr", "0.01", "--batch-size", "8"]
    mask, out = home / "mask.safetensors", home / "vector.safetensors"
    run("train", *common, *trained, "--mask", mask, "--out", out)


def test_mask_and_vector_fit_the_users_own_model(home: Path) -> None:
    model = AutoModel.from_pretrained(home / "base")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    vector = TaskVector.load(home / "vector.safetensors")
    vector.apply_(model)
    for name, each in model.state_dict().items():
        changed = vector.to_dense(name) if name in vector.mask.names else 0
        assert torch.equal(each, before[name] + changed)
    assert any(vector.to_dense(name).any() for name in vector.mask.names)
    optimizer = talos.SparseAdam(model, talos.Mask.load(home / "mask.safetensors"))
    assert optimizer.task_vector().mask == vector.mask


@pytest.mark.parametrize("kept", ["all", "changed"])
def test_an_extracted_vector_merges_with_a_trained_one(
    kept: str, home: Path, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(home / "base")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[:4] += 0.25
    model.save_pretrained(tmp_path / "tuned")
    made, edit = tmp_path / "made.safetensors", tmp_path / "edit.safetensors"
    run("extract", home / "base", tmp_path / "tuned", "--mask", kept, "--out", made)
    trained = TaskVector.load(home / "vector.safetensors")
    assert set(trained.mask.names) <= set(TaskVector.load(made).mask.names)
    run("merge", f"{home}/vector.safetensors:0.5", f"{made}:1", "--out", edit)
    words = ["--model", home / "base", "--data", home / "pets.csv"]
    run("eval", *words, "--vector", made)
    run("eval", *words, "--vector", edit)
    name = "encoder.layer.0.attention.self.query.weight"
    both = 0.5 * trained.to_dense(name) + TaskVector.load(made).to_dense(name)
    torch.testing.assert_close(TaskVector.load(edit).to_dense(name), both)


@pytest.mark.parametrize(
    ("save", "auto"),
    [(save_tiny_t5, AutoModelForSeq2SeqLM), (save_tiny_gpt2, AutoModelForCausalLM)],
    ids=["t5", "gpt2"],
)
def test_a_language_models_vector_fits_its_own_class(
    save: Callable[[Path], Path], auto: type[AutoModel], home: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model")
    train(tmp_path, ["--model", str(folder), "--data", str(home / "pets.csv")])
    model = auto.from_pretrained(folder)
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    vector.apply_(model)
    run("export", tmp_path / "vector.safetensors", "--base", folder, "--out", tmp_path / "out")
    for name, each in auto.from_pretrained(tmp_path / "out").state_dict().items():
        assert_bit_equal(each, model.state_dict()[name])


def test_a_clip_vector_fits_open_clip(tmp_path: Path) -> None:
    weights = save_tiny_clip(tmp_path / "clip")
    images = save_images(tmp_path / "bright", {"dark": 40, "light": 40})
    train(tmp_path, ["--model", f"openclip:{CLIP}:{weights}", "--data", str(images)])
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    assert all(name.startswith("visual.") for name in vector.mask.names)
    vector.apply_(open_clip.create_model(CLIP, pretrained=str(weights)))
