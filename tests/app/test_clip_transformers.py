"""CLIP models of transformers: the same logits, the image tower trained, images as data."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from talos.app.cli import main
from talos.app.models import TransformersClipEncoder, can_load, load_encoder, takes_images
from talos.app.tasks import load_image_folder
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.tiny_models import save_images, save_tiny_transformers_clip

TEXTS = ("a photo of a cat", "a photo of a dog", "a photo of the sun")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_transformers_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TransformersClipEncoder:
    loaded = load_encoder(folder)
    assert isinstance(loaded, TransformersClipEncoder)
    return loaded


def test_logits_are_those_of_transformers(folder: Path, encoder: TransformersClipEncoder) -> None:
    reference = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(TEXTS), padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = reference(
            pixel_values=images,
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        logits = encoder.classifier(TEXTS)({"pixel_values": images})
    torch.testing.assert_close(logits, expected.logits_per_image)
    assert not encoder.training


def test_images_are_prepared_as_transformers_prepares_them(
    folder: Path, encoder: TransformersClipEncoder, tmp_path: Path
) -> None:
    task = load_image_folder(save_images(tmp_path / "pets", {"cat": 4, "dog": 4}, size=40))
    processor = CLIPImageProcessor.from_pretrained(folder)
    [batch] = task.batches("train", encoder.tokenizer)
    for pixels, example in zip(batch["pixel_values"], task.train, strict=True):
        expected = processor(images=example.open(), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected)


def test_only_the_image_tower_is_trained(encoder: TransformersClipEncoder) -> None:
    trained = {name for name, p in encoder.clip.named_parameters() if p.requires_grad}
    own = {"vision_model", "visual_projection"}
    everything = {name for name, _ in encoder.clip.named_parameters()}
    assert trained == {name for name in everything if name.split(".")[0] in own}


def test_it_is_known_by_its_configuration(folder: Path, tmp_path: Path) -> None:
    assert takes_images(str(folder))
    assert can_load(folder)
    assert not takes_images(str(tmp_path))


def test_a_folder_without_a_processor_or_with_one_tower_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_transformers_clip(tmp_path / "clip")
    files = {file: file.read_bytes() for file in folder.iterdir() if "processor" in file.name}
    for file in files:
        file.unlink()
    with pytest.raises(TalosValueError, match=r"must hold an image processor, got .*clip without"):
        load_encoder(folder)
    for file, content in files.items():
        file.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["projection_dim"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TalosValueError, match=r"shapes of its configuration, got .*projection"):
        load_encoder(folder)
    config["text_config"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TalosValueError, match="source must be a folder that transformers can load"):
        load_encoder(folder)


def test_from_calibration_to_evaluation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path / "bright", {"dark": 30, "light": 30})
    mask, vector = tmp_path / "mask.safetensors", tmp_path / "vector.safetensors"
    common = ["--model", str(folder), "--data", str(images), "--batch-size", "8"]
    scored = ["--samples", "16", "--rounds", "2", "--density", "0.3"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    assert all("vision_model." in n or "visual_projection." in n for n in Mask.load(mask).names)
    trained = ["--mask", str(mask), "--steps", "8", "--lr", "0.01"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    assert TaskVector.load(vector).values.abs().max() > 0
    assert main(["eval", *common, "--vector", str(vector)]) == 0
    assert "edited" in capsys.readouterr().out
    edited, rows = tmp_path / "edited", tmp_path / "rows.csv"
    written = ["--base", str(folder), "--data", str(images), "--out", str(edited)]
    assert main(["export", str(vector), *written]) == 0
    before, after = (CLIPModel.from_pretrained(each).state_dict() for each in (folder, edited))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)
    assert main(["predict", "--model", str(edited), "--data", str(images), "--out", str(rows)]) == 0
    assert len(rows.read_text().splitlines()) == 61


def test_texts_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pets.csv"
    data.write_text("text,label\n" + "".join(f"a {i},cat\nb {i},dog\n" for i in range(9)))
    assert main(["calibrate", "--model", str(folder), "--data", str(data), "--dry-run"]) == 2
    expected = rf"--model must read the texts of pets, got {folder}, which reads images"
    assert expected in capsys.readouterr().err


def test_a_class_with_too_many_tokens_is_refused(encoder: TransformersClipEncoder) -> None:
    most = encoder.clip.config.text_config.max_position_embeddings
    with pytest.raises(TalosValueError, match=f"class_texts must have at most {most} tokens each"):
        encoder.classifier(["a", "a b " * most])
