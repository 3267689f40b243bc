"""Mixtures of experts: scores of stacked experts, and a mask's whole way through training."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from talos import Mask, SparseAdam, TaskVector, calibrate, fisher_diag
from talos.errors import TalosRuntimeError
from talos.names import named_parameters
from talos.params import select_parameters
from tests.calibration.models import (
    Apply,
    C,
    E,
    N,
    assert_scores,
    batched,
    inputs,
    oracle,
    pooled,
)
from tests.cases import assert_bit_equal

VOCABULARY, TOKENS = 40, 6
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO_OF_FOUR = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = SIZES | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "q_lora_rank": 8}
DEEPSEEK |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK |= {"num_key_value_heads": 4}
ARIA = SIZES | {"moe_num_experts": 4, "moe_topk": 2, "head_dim": 4}
LLAMA4 = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 20}
DBRX = {"d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 32}
DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 12, "hidden_size": 16, "moe_num_experts": 4}}
DBRX["ffn_config"]["moe_top_k"] = 2

# By the name of the class: of its configuration, its options, how its experts are called.
MIXTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "MixtralForCausalLM": ("MixtralConfig", TWO_OF_FOUR, "experts"),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig",
        TWO_OF_FOUR | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
        "mlp.experts",
    ),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        TWO_OF_FOUR | {"moe_intermediate_size": 12, "head_dim": 8},
        "experts",
    ),
    "GptOssForCausalLM": ("GptOssConfig", TWO_OF_FOUR | {"head_dim": 8}, "experts"),
    "OlmoeForCausalLM": ("OlmoeConfig", TWO_OF_FOUR, "experts"),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", DEEPSEEK, "mlp.experts"),
    "PhimoeForCausalLM": ("PhimoeConfig", TWO_OF_FOUR, "experts"),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", TWO_OF_FOUR, "experts"),
    "JetMoeForCausalLM": ("JetMoeConfig", TWO_OF_FOUR | {"kv_channels": 8}, "put_linear"),
    "Llama4ForCausalLM": ("Llama4TextConfig", LLAMA4 | {"head_dim": 8}, "experts"),
    "AriaTextForCausalLM": ("AriaTextConfig", ARIA, "mlp.experts"),
    "DbrxForCausalLM": ("DbrxConfig", DBRX, "experts.mlp"),
}


def mixture(name: str, implementation: str | None = None) -> nn.Module:
    config, options, _ = MIXTURES[name]
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    if implementation is not None and implementation_of(model) is not None:
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(std=param.shape[-1] ** -0.5)
            else:
                param.add_(0.1 * torch.randn_like(param))
    return model


def implementation_of(model: nn.Module) -> str | None:
    return getattr(model.config, "_experts_implementation", None)


def tokens(count: int = N) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, TOKENS))


def loop(model: nn.Module, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Squares of the gradients of single samples for the labels that seed 0 draws, in float64."""
    model = copy.deepcopy(model).double()
    if implementation_of(model) is not None:
        model.set_experts_implementation("eager")
    params = [named_parameters(model)[name] for name in names]
    scores = {name: torch.zeros_like(param) for name, param in zip(names, params, strict=True)}
    for index, row in enumerate(ids):
        log_probs = model(input_ids=row[None]).logits[0].log_softmax(-1)
        totals = log_probs.detach().exp().cumsum(1)
        uniform = np.random.default_rng([0, 0, index, 0]).random(len(totals))
        labels = (totals <= torch.from_numpy(uniform)[:, None] * totals[:, -1:]).sum(1)
        target = log_probs[torch.arange(len(labels)), labels].sum()
        grads = torch.autograd.grad(target, params, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            scores[name] += 0 if grad is None else grad.square()
    return scores


def asked(ids: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(size)]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_taken_and_scored_as_linear_layers(name: str) -> None:
    model, ids = mixture(name).double(), tokens()
    names = list(select_parameters(model))
    experts = [each for each in names if MIXTURES[name][2] in each]
    assert sum(named_parameters(model)[each].dim() == 3 for each in experts) or "Dbrx" in name
    assert experts
    before, expected = implementation_of(model), loop(model, ids, names)
    for size in (1, 4, N):
        assert_scores(fisher_diag(model, asked(ids, size)), expected, floor=1e-9)
    assert implementation_of(model) == before


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_is_scored_as_the_eager_one(
    implementation: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = mixture("Qwen3MoeForCausalLM", "eager"), tokens()
    expected = fisher_diag(model, asked(ids, 3))
    model.set_experts_implementation(implementation)
    with caplog.at_level(logging.INFO, "talos"):
        scores = fisher_diag(model, asked(ids, 3), check=True)
    for name, score in scores.items():
        assert_bit_equal(score, expected[name])
    assert ("experts multiply one after another" in caplog.text) == (implementation != "eager")
    assert implementation_of(model) == implementation
    with pytest.raises(KeyboardInterrupt):
        fisher_diag(model, asked(ids, 3), on_progress=_interrupt)
    assert implementation_of(model) == implementation


def _interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_experts_that_are_not_scored_stay_as_they_are() -> None:
    model, ids, seen = mixture("MixtralForCausalLM", "batched_mm"), tokens(), []

    def logits(model: nn.Module, batch: Any) -> Tensor:
        seen.append(implementation_of(model))
        return model(**batch).logits

    fisher_diag(model, asked(ids, 3), params="qk", logits_fn=logits)
    assert set(seen) == {"batched_mm"}


def test_an_expert_that_no_token_reached_has_a_score_of_0() -> None:
    model, ids = mixture("GptOssForCausalLM").double(), tokens(4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[3] = -100
    names = list(select_parameters(model))
    expected, scores = loop(model, ids, names), fisher_diag(model, asked(ids, 2))
    for name in (each for each in names if "experts" in each):
        assert not expected[name][3].any()
        assert not scores[name][3].any()
        assert scores[name][:3].any()
    assert_scores(scores, expected, floor=1e-9)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_experts_in_bfloat16_and_under_autocast(name: str) -> None:
    model, ids = mixture(name), tokens(12)
    expected = fisher_diag(model, asked(ids, 4))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = fisher_diag(model, asked(ids, 4))
    stored = fisher_diag(model.bfloat16(), asked(ids, 4))
    for key, score in expected.items():  # a router may send a token elsewhere after rounding
        for other in (autocast[key], stored[key]):
            similarity = functional.cosine_similarity(score.flatten(), other.flatten(), 0)
            assert similarity > 0.8, (key, similarity)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_a_mask_of_experts_is_trained_and_its_vector_applied(
    name: str, compact: bool, tmp_path: Path
) -> None:
    model, ids = mixture(name), tokens(16)
    mask = calibrate(model, asked(ids, 8), density=0.2, rounds=2)
    assert mask.metadata["left_out"]["share"] < 0.01
    experts = [each for each in mask.names if "experts" in each]
    assert sum(mask.to_dense(each).sum() for each in experts) > 0
    mask.save(tmp_path / "mask.safetensors")
    mask = Mask.load(tmp_path / "mask.safetensors")

    base, dense = copy.deepcopy(model), copy.deepcopy(model)
    chosen = {each: mask.to_dense(each) for each in mask.names}
    reference = torch.optim.AdamW(
        [named_parameters(dense)[each] for each in mask.names], lr=1e-2, weight_decay=0.0
    )
    optimizer = SparseAdam(model, mask, lr=1e-2, weight_decay=0.0)
    if compact:
        optimizer.compact_gradients()
    for part in ids.split(4):
        for each, stepper in ((dense, reference), (model, optimizer)):
            stepper.zero_grad()
            each(input_ids=part, labels=part).loss.backward()
            if each is dense:
                for key, keep in chosen.items():
                    named_parameters(dense)[key].grad.mul_(keep)
            stepper.step()
    tuned, started = named_parameters(model), named_parameters(base)
    for key, keep in chosen.items():
        assert_bit_equal(tuned[key].detach()[~keep], started[key].detach()[~keep])
        torch.testing.assert_close(tuned[key], named_parameters(dense)[key], rtol=1e-4, atol=1e-5)
    assert any((tuned[key] != started[key]).any() for key in experts)

    optimizer.task_vector().save(tmp_path / "vector.safetensors")
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    before = {key: param.detach().clone() for key, param in started.items()}
    with vector.applied(base):
        for key in mask.names:
            torch.testing.assert_close(started[key], tuned[key], rtol=1e-6, atol=1e-7)
    for key, param in started.items():
        assert_bit_equal(param.detach(), before[key])


class Bank(nn.Module):
    """Layers in one tensor, of which each token takes the one that its first entry says."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.layers, self.apply_one = nn.Parameter(torch.randn(4, *shape)), apply

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        choice = (rows[:, 0].abs() * 4).long().clamp_max(3)
        y = torch.zeros_like(rows)
        for number in range(4):
            mine = (choice == number).nonzero()[:, 0].flip(0)
            y = y.index_copy(0, mine, self.apply_one(rows[mine], self.layers[number]))
        return y.view_as(x)


class Experts(Bank):
    """The same under a name that says so."""


class Whole(nn.Module):
    """All layers of a stack for every token."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.experts_weight, self.apply_all = nn.Parameter(torch.randn(4, E, E)), apply

    def forward(self, x: Tensor) -> Tensor:
        y = self.apply_all(x.flatten(0, 1), self.experts_weight)
        return torch.tanh(y).sum(0).view_as(x)


class Modules(nn.Module):
    """Experts that are modules of their own, as older code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = ((rows[:, 0].abs() * 3).long().clamp_max(2) == number).nonzero()[:, 0]
            y = y.index_add(0, mine, expert(rows[mine]))
        return y.view_as(x)


STACKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Bank(lambda x, w: functional.linear(x, w), E, E),
    "product": lambda: Bank(lambda x, w: x @ w, E, E),
    "product with the transpose": lambda: Bank(lambda x, w: torch.matmul(x, w.T), E, E),
    "a layer and its slice of biases": lambda: Bank(lambda x, w: x @ w[:E] + w[E], E + 1, E),
    "bmm": lambda: Whole(lambda x, w: torch.bmm(x.expand(4, -1, -1), w)),
    "bmm with the transposes": lambda: Whole(
        lambda x, w: torch.bmm(x.expand(4, -1, -1), w.transpose(1, 2))
    ),
    "matmul with all": lambda: Whole(lambda x, w: x @ w),
    "modules": Modules,
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_layers_are_scored(name: str) -> None:
    model, x = pooled(STACKS[name](), nn.Tanh()).double(), inputs()
    expected = oracle(model, x)
    for size in (1, 2, 5, N):
        assert_scores(fisher_diag(model, batched(x, size), draws="exact", params="."), expected)


def test_experts_are_known_by_their_name_or_number() -> None:
    def chosen(module: nn.Module) -> set[str]:
        return set(select_parameters(nn.Sequential(nn.Linear(E, E), module, nn.Linear(E, C))))

    linear = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert chosen(Experts(functional.linear, E, E)) == linear | {"1.layers"}
    bank = Bank(functional.linear, E, E)
    assert chosen(bank) == linear
    bank.num_experts = 4
    assert chosen(bank) == linear | {"1.layers"}
    bank.num_experts = 3
    assert chosen(bank) == linear
    router = nn.Module()
    router.num_experts, router.weight = 4, nn.Parameter(torch.randn(4, E))
    assert chosen(router) == linear
    assert chosen(nn.Conv1d(E, E, 3)) == chosen(nn.Bilinear(E, E, E, bias=False)) == linear


def test_a_stack_that_is_used_otherwise_is_refused_by_name() -> None:
    model = pooled(Whole(lambda x, w: torch.einsum("ni,eio->eno", x, w)), nn.Tanh()).double()
    with pytest.raises(TalosRuntimeError, match=r"0\.experts_weight must be used only by.*params="):
        fisher_diag(model, [inputs()], params=".")
    model[0].experts_weight.requires_grad_(False)
    model.append(Apply(lambda x: x * 2))
    assert set(fisher_diag(model, [inputs()], params=".")) == {"3.weight", "3.bias"}
