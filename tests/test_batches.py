"""How models are called on the batches of others' loops."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from talos.batches import default_logits, labels_of
from talos.calibration import calibrate, fisher_diag
from talos.errors import TalosTypeError, TalosValueError

IDS = torch.arange(24).view(4, 6) % 11


class Model(nn.Module):
    """Tells what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> Tensor:
        self.seen = inputs
        return torch.zeros(2, 3)


class Whole(nn.Module):
    def forward(self, batch: Any) -> Tensor:
        return torch.zeros(len(batch["x"]), 3)


def t5() -> T5:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return T5(T5Config(vocab_size=11, decoder_start_token_id=0, **sizes)).eval()


def test_mappings_go_by_keyword_without_labels() -> None:
    model, x = Model(), torch.zeros(2)
    for batch in ({"x": x, "labels": x}, UserDict(x=x, label=x)):
        default_logits(model, batch)
        assert set(model.seen) == {"x"}
        assert labels_of(batch) is x


def test_a_forward_of_one_argument_gets_the_mapping() -> None:
    assert default_logits(Whole(), {"x": torch.zeros(2), "labels": torch.zeros(2)}).shape == (2, 3)


def test_what_is_no_logits_or_has_no_labels_is_refused() -> None:
    with pytest.raises(TalosTypeError, match=r"must return logits.*got Tensor\(2,\)"):
        default_logits(nn.Flatten(0), torch.zeros(2))
    with pytest.raises(TalosValueError, match=r"got \['x'\]; pass loss_fn"):
        labels_of({"x": 1})


def test_an_encoder_decoder_gets_the_labels_that_its_decoder_reads() -> None:
    model, labels = t5(), IDS.clone()[:, :4]
    labels[1, 3:] = -100
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    logits = default_logits(model, batch)
    assert logits.shape == (4, 4, 11)
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    inputs = {"input_ids": IDS, "attention_mask": batch["attention_mask"]}
    assert torch.equal(logits, model(**inputs, decoder_input_ids=shifted).logits)
    drawn = fisher_diag(model, [batch], draws=2)
    given_inputs = {**inputs, "decoder_input_ids": shifted}
    given = fisher_diag(
        model,
        [given_inputs],
        logits_fn=lambda model, batch: (model(**batch).logits, labels != -100),
        draws=2,
    )
    assert all(torch.equal(score, given[name]) for name, score in drawn.items())
    assert calibrate(model, [batch] * 2, 0.1, 2).nnz > 0


def test_a_classifier_that_is_an_encoder_decoder_needs_no_labels() -> None:
    sizes = {
        f"{side}_{what}": 1
        for side in ("encoder", "decoder")
        for what in ("layers", "attention_heads")
    }
    config = BartConfig(
        vocab_size=11, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, num_labels=3,
        max_position_embeddings=16, eos_token_id=2, **sizes,
    )  # fmt: skip
    model, ids = BartForSequenceClassification(config).eval(), IDS % 2 + 3
    ids[:, -1] = 2
    batch = {"input_ids": ids, "labels": torch.full((4,), 7)}  # another task's labels
    assert default_logits(model, batch).shape == (4, 3)


def test_more_parts_than_a_pair_are_refused() -> None:
    parts = (torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(TalosTypeError, match="got 3 parts; pass logits_fn"):
        default_logits(nn.Linear(3, 2), parts)
