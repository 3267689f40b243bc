import logging
from collections import OrderedDict
from typing import Any, cast

import pytest
import torch
from torch import nn

from talos.calibration import fisher_diag
from talos.errors import TalosTypeError, TalosValueError
from talos.names import named_parameters
from talos.params import select_parameters

E = 8


class Attention(nn.Module):
    """Separate projections as in BERT and T5, with a relative bias as in T5."""

    def __init__(self, query: str, key: str, value: str) -> None:
        super().__init__()
        for name in (query, key, value):
            self.add_module(name, nn.Linear(E, E))
        self.relative_attention_bias = nn.Embedding(4, 2)


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.proj = nn.Linear(E, E)


class Transformer(nn.Module):
    """One of everything that a preset must take or leave."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(E))
        self.positional = nn.Embedding(5, E)
        self.patches = nn.Conv2d(3, E, 2, 2)
        self.block = nn.TransformerEncoderLayer(E, 2, 2 * E)
        self.bert = Attention("query", "key", "value")
        self.timm = FusedAttention()
        self.norm = nn.RMSNorm(E)
        self.head = nn.Linear(E, 3)


def test_maskable_takes_projections_norms_and_patches_and_leaves_head_and_embeddings() -> None:
    chosen = select_parameters(Transformer())
    left = set(named_parameters(Transformer())) - set(chosen)
    assert left == {
        *("class_embedding", "positional.weight", "head.weight", "head.bias"),
        "bert.relative_attention_bias.weight",
    }
    assert {"block.self_attn.in_proj_weight", "block.self_attn.out_proj.bias"} <= set(chosen)
    assert {"patches.weight", "patches.bias", "norm.weight", "block.norm1.bias"} <= set(chosen)
    assert chosen.rows == {}


def test_qk_takes_queries_and_keys_and_their_rows_of_fused_projections() -> None:
    chosen = select_parameters(Transformer(), "qk")
    assert {name: each.rows for name, each in chosen.items()} == {
        "block.self_attn.in_proj_weight": (0, 2 * E),
        "block.self_attn.in_proj_bias": (0, 2 * E),
        **{
            f"bert.{layer}.{kind}": None
            for layer in ("query", "key")
            for kind in ("weight", "bias")
        },
        "timm.qkv.weight": (0, 2 * E),
        "timm.qkv.bias": (0, 2 * E),
    }
    assert chosen["block.self_attn.in_proj_weight"].numel == 2 * E * E
    assert chosen["timm.qkv.bias"].numel == 2 * E
    assert chosen["bert.key.weight"].numel == E * E


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("q", "k", "v")])
def test_qk_knows_the_names_in_use(names: tuple[str, str, str]) -> None:
    assert set(select_parameters(Attention(*names), "qk")) == {
        f"{layer}.{kind}" for layer in names[:2] for kind in ("weight", "bias")
    }


def test_qk_of_separate_projections_in_multihead_attention() -> None:
    model = nn.MultiheadAttention(E, 2, kdim=5, vdim=6)
    chosen = select_parameters(model, "qk")
    assert {name: each.rows for name, each in chosen.items()} == {
        "q_proj_weight": None,
        "k_proj_weight": None,
        "in_proj_bias": (0, 2 * E),
    }


def test_a_regular_expression_is_searched_for_and_takes_what_it_matches() -> None:
    assert set(select_parameters(Transformer(), r"^head|al\.weight$")) == {
        *("head.weight", "head.bias", "positional.weight")
    }


def test_heads_are_known_by_what_libraries_offer() -> None:
    class Transformers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(E, E)
            self.decoder = nn.Linear(E, 3)

        def get_output_embeddings(self) -> nn.Module:
            return self.decoder

    class Timm(Transformers):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

        def get_classifier(self) -> nn.Module:
            return self.decoder

    for model in (Transformers(), Timm(), nn.Sequential(Timm(), nn.ReLU())):
        assert {name.rpartition("body.")[2] for name in select_parameters(model)} == {
            *("weight", "bias")
        }


@pytest.mark.parametrize("name", ["head", "heads", "classifier", "lm_head", "score", "fc"])
def test_heads_are_known_by_their_names_at_the_top_only(name: str) -> None:
    inner = nn.Sequential(OrderedDict({"body": nn.Linear(2, 2), name: nn.Linear(2, 2)}))
    held = nn.Sequential(OrderedDict(model=inner))
    beside = nn.Sequential(OrderedDict(model=inner, last=nn.Linear(2, 2)))
    assert f"{name}.weight" not in select_parameters(inner)
    assert f"model.{name}.weight" not in select_parameters(held)
    assert f"model.{name}.weight" in select_parameters(beside)


def test_what_is_tied_to_an_embedding_is_left_out_and_tied_weights_come_once() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = nn.Linear(4, 4)
    model.second.weight = model.first.weight
    model.tokens = nn.Embedding(6, 4)
    model.decoder = nn.Linear(4, 6, bias=False)
    model.decoder.weight = model.tokens.weight
    assert list(named_parameters(model)) == [
        *("first.weight", "first.bias", "second.bias", "tokens.weight")
    ]
    assert list(select_parameters(model)) == ["first.weight", "first.bias", "second.bias"]


def test_norms_that_libraries_write_themselves_are_maskable() -> None:
    class T5LayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert list(select_parameters(T5LayerNorm())) == ["weight"]


def test_frozen_parameters_are_passed_over_and_their_number_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="talos"):
        chosen = select_parameters(model)
    assert list(chosen) == ["1.weight", "1.bias"]
    assert chosen.passed_over == 2
    assert "2 of 4 parameters" in caplog.text


def test_no_match_names_the_nearest() -> None:
    with pytest.raises(
        TalosValueError, match=r"'head\.wieght'.*its nearest names are head\.weight"
    ):
        select_parameters(Transformer(), "head.wieght")
    with pytest.raises(TalosValueError, match=r"Linear, got 'qk'.* its first names are weight, b"):
        select_parameters(nn.Linear(2, 2), "qk")
    with pytest.raises(TalosValueError, match=r"ReLU, got 'maskable'.*no parameters"):
        select_parameters(nn.ReLU())


def test_only_frozen_matches_are_refused() -> None:
    with pytest.raises(TalosValueError, match="requires_grad=True, got 'weight', which matches 1"):
        select_parameters(nn.Linear(2, 2).requires_grad_(False), "weight")


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(TalosValueError, match=r"regular expression, got '\['"):
        select_parameters(Transformer(), "[")
    with pytest.raises(TalosTypeError, match="must be a str, got list"):
        select_parameters(Transformer(), cast(Any, ["head"]))


def test_complex_weights_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(
        TalosTypeError, match=r"real floating-point.*got weight of dtype torch\.com"
    ):
        select_parameters(model)


def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(TalosTypeError, match="hold values, got weight"):
        select_parameters(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TalosTypeError, match="hold values, got weight"):
        select_parameters(nn.LazyLinear(2))


def test_gpt2_is_taken_by_its_own_linear_layer_and_has_no_rows_of_queries() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=7, n_embd=E, n_layer=1, n_head=2, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    left = set(named_parameters(model)) - set(select_parameters(model))
    assert left == {"transformer.wte.weight", "transformer.wpe.weight"}
    with pytest.raises(TalosValueError, match=r"keys in transformer.h.0.attn.c_attn, a .*Conv1D"):
        select_parameters(model, "qk")
    scores = fisher_diag(model.double(), [{"input_ids": torch.arange(8).view(2, 4)}])
    attention = scores["transformer.h.0.attn.c_attn.weight"]
    assert attention.shape == (E, 3 * E)
    assert bool((attention > 0).all())
