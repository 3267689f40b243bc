"""Language models that choose among the classes' texts."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from talos.app.models import (
    AnswerClassifier,
    LanguageModel,
    TextEncoder,
    load_encoder,
)
from talos.app.tasks import Example, Task
from talos.errors import TalosValueError
from tests.tiny import save_tiny_encoder
from tests.tiny_models import save_tiny_gpt2, save_tiny_t5

TEXTS = ("cat", "a big dog")
SAVE = {"t5": save_tiny_t5, "gpt2": save_tiny_gpt2}


@pytest.fixture(scope="module", params=sorted(SAVE))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return load_encoder(folder)


def batch_of(model: LanguageModel, texts: list[str]) -> dict[str, Tensor]:
    task = Task("t", "", ("a",), ("a",), [Example(text, 0) for text in texts], [], [])
    [batch] = task.batches("train", model.tokenizer)
    return batch


def log_probability(model: LanguageModel, text: str, answer: str) -> Tensor:
    """Of one answer after one text, token by token, without padding."""
    asked = model.tokenizer(text)["input_ids"]
    bare, total = model.model, torch.zeros(())
    if bare.config.is_encoder_decoder:
        answered, before = model.tokenizer(answer)["input_ids"], [0]
    else:
        answered, before = model.tokenizer(f" {answer}")["input_ids"], asked
    for token in answered:
        ids = torch.tensor([before])
        if bare.config.is_encoder_decoder:
            output = bare(input_ids=torch.tensor([asked]), decoder_input_ids=ids)
        else:
            output = bare(input_ids=ids)
        total = total + output.logits[0, -1].log_softmax(-1)[token]
        before = [*before, token]
    return total


def test_logits_are_the_log_probabilities_of_the_answers(model: LanguageModel) -> None:
    texts = ["the old cat sleeps", "wow", "a longer text about dogs, 12 of them"]
    with torch.no_grad():
        logits = model.classifier(TEXTS)(batch_of(model, texts))
        for i, text in enumerate(texts):
            for j, answer in enumerate(TEXTS):
                expected = log_probability(model, text, answer)
                torch.testing.assert_close(logits[i, j], expected, atol=1e-4, rtol=1e-5)


def test_a_text_may_have_answers_of_its_own(model: LanguageModel, tmp_path: Path) -> None:
    rows = [("the old cat", ("sleeps", "is 12 dogs")), ("wow", ("no", "yes")), ("a", ("b", "c"))]
    task = Task("t", "", ("1", "2"), ("1", "2"), [Example(a, 1, "", b) for a, b in rows], [], [])
    first, second = task.batches("train", model.tokenizer, batch_size=2)
    assert first["choice_ids"].shape[:2] == (2, 2)
    assert first["choice_ids"].shape[2] > second["choice_ids"].shape[2]
    with torch.no_grad():
        logits = torch.cat([model.classifier(task.class_texts)(each) for each in (first, second)])
        for i, (text, answers) in enumerate(rows):
            for j, answer in enumerate(answers):
                expected = log_probability(model, text, answer)
                torch.testing.assert_close(logits[i, j], expected, atol=1e-4, rtol=1e-5)
    encoder = load_encoder(save_tiny_encoder(tmp_path / "bert"))
    with pytest.raises(TalosValueError, match="tokenizer must be that of a language model, got "):
        task.batches("train", encoder.tokenizer)
    short = Task("t", "", ("1", "2"), ("1", "2"), [Example("a", 1, "", ("b",))], [], [])
    with pytest.raises(TalosValueError, match="answers must be one for each of 2 classes, got 1"):
        short.batches("train", model.tokenizer)


def test_every_parameter_is_the_models_and_no_answer_is_in_the_state(model: LanguageModel) -> None:
    one = model.classifier(TEXTS)
    assert isinstance(one, AnswerClassifier)
    names = [name for name, _ in one.named_parameters()]
    assert names == [f"encoder.model.{name}" for name, _ in model.model.named_parameters()]
    other = model.classifier(["sun", "moon", "stars"])
    assert other.encoder is model
    other.load_state_dict(one.state_dict())
    assert copy.deepcopy(other).head.shape[0] == 3


def test_the_configuration_decides_what_is_loaded(folder: Path, tmp_path: Path) -> None:
    loaded = load_encoder(str(folder))
    assert isinstance(loaded, LanguageModel)
    assert loaded.name == folder.name
    assert not loaded.training
    assert loaded.tokenizer.pad_token_id is not None
    encoder = save_tiny_encoder(tmp_path / "bert")
    assert isinstance(load_encoder(str(encoder)), TextEncoder)


def test_answers_without_tokens_are_refused(model: LanguageModel, monkeypatch) -> None:
    monkeypatch.setattr(
        model, "tokenizer", lambda texts, **options: {"input_ids": [[5], []][: len(texts)]}
    )
    with pytest.raises(TalosValueError, match="class_texts must have tokens, got 'b'"):
        model.classifier(["a", "b"])
    with pytest.raises(TalosValueError, match="at least two texts"):
        model.classifier(["a"])


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TalosValueError, match="a tokenizer with a token to pad with"):
        load_encoder(tmp_path)
