"""CLIP models of open_clip: the same logits, the visual tower trained, safetensors read."""

import json
import sys
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import talos
from talos.app.models import ClipEncoder, load_clip, load_encoder
from talos.app.tasks import load_image_folder
from talos.errors import TalosError, TalosOSError, TalosValueError
from talos.names import named_parameters
from tests.tiny_models import CLIP, save_images, save_tiny_clip, save_tiny_transformers_clip

TEXTS = ("a photo of a cat", "a photo of a dog", "a photo of the sun")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def encoder(weights: Path) -> ClipEncoder:
    return load_clip(f"{CLIP}:{weights}")


def test_logits_are_those_of_open_clip(weights: Path, encoder: ClipEncoder) -> None:
    reference = open_clip.create_model(CLIP, pretrained=str(weights)).eval()
    images = torch.randn(5, 3, 32, 32)
    tokens = open_clip.get_tokenizer(CLIP)(list(TEXTS))
    with torch.no_grad():
        expected, _ = reference.get_logits(images, tokens)
        logits = encoder.classifier(TEXTS)({"pixel_values": images, "labels": torch.zeros(5)})
    torch.testing.assert_close(logits, expected)
    assert encoder.scale == pytest.approx(1 / 0.07)


def test_images_are_prepared_as_open_clip_prepares_them(weights: Path, tmp_path: Path) -> None:
    task = load_image_folder(save_images(tmp_path / "pets", {"cat": 4, "dog": 4}))
    _, _, transform = open_clip.create_model_and_transforms(CLIP, pretrained=str(weights))
    [batch] = task.batches("test", load_clip(f"{CLIP}:{weights}").tokenizer)
    for pixels, example in zip(batch["pixel_values"], task.test, strict=True):
        assert torch.equal(pixels, transform(example.open()))


def test_only_the_visual_tower_is_trained(encoder: ClipEncoder) -> None:
    classifier = encoder.classifier(TEXTS)
    trained = {name for name, p in named_parameters(classifier).items() if p.requires_grad}
    assert trained == {f"visual.{n}" for n, _ in encoder.clip.visual.named_parameters()}
    assert "head" not in classifier.state_dict()
    assert not classifier.head.requires_grad
    images = [{"pixel_values": torch.randn(8, 3, 32, 32)}]
    mask = talos.calibrate(classifier, images, density=0.2, rounds=2)
    assert set(mask.names) < trained
    ours = {"class_embedding", "positional_embedding", "proj"}
    assert {name.removeprefix("visual.") for name in trained - set(mask.names)} == ours


def test_heads_of_one_encoder_share_its_weights(encoder: ClipEncoder) -> None:
    one, other = encoder.classifier(TEXTS), encoder.classifier(TEXTS[:2])
    assert one.encoder is other.encoder is encoder
    assert torch.equal(one.head[:2], other.head)


def test_one_name_loads_it(weights: Path) -> None:
    loaded = load_encoder(f"openclip:{CLIP}:{weights}")
    assert isinstance(loaded, ClipEncoder)
    assert loaded.name == f"openclip:{CLIP}:tiny.safetensors"
    assert not loaded.training


def test_a_tag_is_downloaded_as_safetensors_with_its_preprocessing(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(weights)

    tags = {
        "whole": {"hf_hub": "owner/repo/", "mean": (0.1, 0.2, 0.3), "quick_gelu": True},
        "named": {"hf_hub": "owner/repo/some_model.pt"},
        "elsewhere": {"url": "a/model.pt"},
    }
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags[tag])
    encoder = load_clip(f"{CLIP}:whole")
    assert encoder.tokenizer.transforms[-1].mean == (0.1, 0.2, 0.3)
    kinds = {type(module).__name__ for module in encoder.clip.visual.modules()}
    assert "QuickGELU" in kinds
    assert "GELU" not in kinds
    assert encoder.name == f"openclip:{CLIP}:whole"
    load_clip(f"{CLIP}:named")
    assert asked == [
        ("owner/repo", "open_clip_model.safetensors"),
        ("owner/repo", "some_model.safetensors"),
    ]
    with pytest.raises(TalosValueError, match=r"on the Hugging Face hub, got .*:elsewhere without"):
        load_clip(f"{CLIP}:elsewhere")


def test_a_tag_that_cannot_be_downloaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(TalosOSError, match=r"got ViT-B-32:openai \(no network\)"):
        load_clip("ViT-B-32:openai")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".npz", ""])
def test_pickled_weights_are_refused(suffix: str, tmp_path: Path, weights: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(load_file(weights), path)
    with pytest.raises(TalosValueError, match="pickled weights are never loaded"):
        load_clip(f"{CLIP}:{path}")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "pickle.safetensors"
    torch.save(load_file(weights), path)
    with pytest.raises(TalosValueError, match=r"pickle\.safetensors: .*not a safetensors file"):
        load_clip(f"{CLIP}:{path}")
    other = {
        name: tensor[:1].clone() for name, tensor in load_file(weights).items() if tensor.dim()
    }
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(TalosValueError, match=f"source must have the weights of {CLIP}"):
        load_clip(f"{CLIP}:{tmp_path / 'other.safetensors'}")


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("ViT-Z:openai", TalosValueError, r"got 'ViT-Z'; the nearest are \S+, .* and \d+ more"),
        ("", TalosValueError, "an architecture of open_clip or a .json file of one, got ''"),
        ("none.json:w.safetensors", TalosOSError, "configuration that can be read, got none.json"),
        (
            "ViT-B-32",
            TalosValueError,
            r"must name weights, got 'ViT-B-32' without; .*laion400m_e31",
        ),
        ("ViT-B-32:nonsense", TalosValueError, r"a pretrained tag \(openai, .*got 'nonsense'"),
        ("ViT-B-32:none.safetensors", TalosOSError, "an existing file, got none.safetensors"),
    ],
)
def test_a_wrong_source_is_refused(source: str, error: type[TalosError], match: str) -> None:
    with pytest.raises(error, match=match):
        load_clip(source)


def test_weights_of_another_architecture_are_refused(weights: Path, tmp_path: Path) -> None:
    other = save_tiny_transformers_clip(tmp_path / "other") / "model.safetensors"
    for architecture, path in (("RN50", weights), ("ViT-B-32", weights), (CLIP, other)):
        with pytest.raises(TalosValueError, match=f"must have the weights of {architecture}, got"):
            load_clip(f"{architecture}:{path}")


@pytest.mark.parametrize("saved", [False, True], ids=["bare", "as open_clip saves it"])
def test_an_architecture_of_ones_own_is_read_from_a_file(
    saved: bool, weights: Path, encoder: ClipEncoder, tmp_path: Path
) -> None:
    config = open_clip.get_model_config(CLIP)
    path = tmp_path / "ViT-B-32.json"  # a name that open_clip has
    own = {"model_cfg": config, "preprocess_cfg": {"mean": (0.1, 0.2, 0.3)}}
    path.write_text(json.dumps(own if saved else config))
    known = open_clip.get_model_config("ViT-B-32")
    loaded = load_clip(f"openclip:{path}:{weights}")
    assert open_clip.get_model_config("ViT-B-32") == known
    assert loaded.name == "openclip:ViT-B-32.json:tiny.safetensors"
    ours, theirs = loaded.clip.state_dict(), encoder.clip.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not saved or tuple(loaded.tokenizer.transforms[-1].mean) == (0.1, 0.2, 0.3)


WHOLE = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "{}", '{"model_cfg": {"embed_dim": 8}}', "[" * 3000),
        json.dumps({"model_cfg": WHOLE, "preprocess_cfg": 3}),
    ],
)
def test_what_is_no_configuration_is_refused(content: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(TalosValueError, match=r"source must name a .*, got .*config.json"):
        load_clip(f"{path}:{weights}")


def test_a_configuration_that_makes_no_model_is_told_from_wrong_weights(
    weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**open_clip.get_model_config(CLIP), "vision_cfg": 3}))
    with pytest.raises(
        TalosValueError, match=r"source must name a configuration .* got .*bad.json"
    ):
        load_clip(f"{path}:{weights}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(TalosError, match=r'pip install "talos-sparse\[clip\]"'):
        load_clip("ViT-B-32:openai")
