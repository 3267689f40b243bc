"""What is attention, and how its fused layers are laid out: real libraries and attention itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talos.architecture.attention import Projection, attention_projections
from talos.batches import default_logits
from talos.errors import TalosValueError
from talos.methods import METHODS
from talos.names import named_parameters
from talos.params import select_attention, select_parameters

E = 16
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
SIZES = {
    "vocab_size": 11,
    "hidden_size": E,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
MLA = {
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 8,
}
GPT = {"vocab_size": 11, "n_embd": E, "n_layer": 1, "n_head": 4, "n_positions": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "CodeGen": {**GPT, "rotary_dim": 4},
    "GPTNeoX": SIZES,
    "Phi3": SIZES,
    "GPTBigCode": {**GPT, "multi_query": False},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPT2": {**GPT, "add_cross_attention": True},
    "Bloom": {"vocab_size": 11, "hidden_size": E, "n_layer": 1, "n_head": 4},
    "ModernBert": {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
    "DeepseekV2": {**SIZES, **MLA, "q_lora_rank": None},
    "DeepseekV3": {**SIZES, **MLA, "q_lora_rank": 8},
    "Mamba": SIZES,
    "Jamba": {
        **SIZES,
        "num_experts": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "Qwen3Next": {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 0,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "mlp_only_layers": [0, 1],
    },
}


def of_transformers(name: str) -> nn.Module:
    """A small model of random weights."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}Model")(config).eval()
    return model


def of_timm(module: str, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    __import__(f"timm.{module}")
    found = timm
    for part in [*module.split("."), name]:
        found = getattr(found, part)
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": found(*args, **kwargs)}).eval()


def holder(name: str, bias: bool = True, **layers: int) -> nn.Module:
    """A module of linear layers."""
    made = {layer: nn.Linear(E, rows, bias=bias) for layer, rows in layers.items()}
    return nn.ModuleDict({name: nn.ModuleDict(made)})


def value_rows(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Which outputs of each weight are values, by what attention is.

    Of a single token the weights of the values are 1 whatever the query and key are, so that these
    get no gradient.
    """
    torch.manual_seed(1)
    output = run(model.double())
    (output * torch.randn_like(output)).sum().backward()
    rows = {}
    for name, found in select_attention(model).items():
        grad = found.param.grad
        if found.param.dim() == 2 and found.roles != ("output",) and grad is not None:
            outputs = (grad.T if found.transposed else grad).abs().amax(1)
            rows[name] = outputs > 1e-9  # others differ from 0 by rounding
    return rows


def text(model: nn.Module, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([[3]]), **inputs).last_hidden_state
    return found


def beside(model: nn.Module) -> Tensor:
    return text(model, encoder_hidden_states=torch.randn(1, 1, E, dtype=torch.float64))


def image(model: nn.Module) -> Tensor:
    found: Tensor = model["attn"](torch.randn(1, 1, E, dtype=torch.float64))
    return found


def square(model: nn.Module) -> Tensor:
    found: Tensor = model["attn"](torch.randn(1, 1, E, dtype=torch.float64), (1, 1))
    return found


def itself(model: nn.Module) -> Tensor:
    x = torch.randn(1, 1, E, dtype=torch.float64)
    found: Tensor = model["attn"](x, x, x)[0]
    return found


TOLD_APART: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "torch": (lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(E, 4)}), itself),
    "GPT-2": (lambda: of_transformers("GPT2"), beside),
    "GPT-J": (lambda: of_transformers("GPTJ"), text),
    "ModernBERT": (lambda: of_transformers("ModernBert"), text),
    "timm": (lambda: of_timm("layers", "Attention", E, num_heads=4), image),
    "PVT": (lambda: of_timm("models.pvt_v2", "Attention", E, num_heads=4), square),
    "Twins": (lambda: of_timm("models.twins", "GlobalSubSampleAttn", E, 4), square),
    "TNT": (lambda: of_timm("models.tnt", "Attention", E, E, 4), image),
}


@pytest.mark.parametrize("name", TOLD_APART)
def test_rows_are_told_apart_as_attention_uses_them(name: str) -> None:
    make, run = TOLD_APART[name]
    model = make()
    found = select_attention(model)
    rows = value_rows(model, run)
    assert any(each.any() for each in rows.values())
    for key, used in rows.items():
        for role in found[key].roles:
            part = found[key].part(torch.arange(len(used)), role)
            assert bool(used[part].all() if role == "value" else not used[part].any()), (key, role)
    roles = {role for each in found.values() for role in each.roles}
    assert roles == {"query", "key", "value", "output"}


FUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "CodeGen": (lambda: of_transformers("CodeGen"), text),
    "GPT-NeoX": (lambda: of_transformers("GPTNeoX"), text),
    "Bloom": (lambda: of_transformers("Bloom"), text),
    "GPTBigCode": (lambda: of_transformers("GPTBigCode"), text),
    "MaxViT": (lambda: of_timm("models.maxxvit", "AttentionCl", E, dim_head=4, bias=True), image),
    "TinyViT": (lambda: of_timm("models.tiny_vit", "Attention", E, 4, 4, 1, (1, 1)), image),
    "EfficientFormer": (
        lambda: of_timm("models.efficientformer", "Attention", E, 4, 4, 1, 1),
        image,
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_rows_in_another_order_are_not_cut_into_thirds(name: str) -> None:
    make, run = FUSED[name]
    model = make()
    fused = {n: each for n, each in select_attention(model).items() if "fused" in each.roles}
    assert fused
    for key, used in value_rows(model, run).items():
        thirds = used.view(3, -1)
        assert not torch.equal(thirds.all(1), torch.tensor([False, False, True])), key
        assert int(used.sum()) == len(used) // 3
    with pytest.raises(TalosValueError, match="params='qk' cannot select queries and keys in"):
        select_parameters(model, "qk")
    with pytest.raises(TalosValueError, match=r"in thirds of its rows for the method l_lora"):
        METHODS["l_lora"]().start(model, HYPER, default_logits)
    for each in fused.values():
        each.param.requires_grad_(False)
    with pytest.raises(TalosValueError, match="params must match a parameter of"):
        select_parameters(model, "qk")


def names(model: nn.Module) -> set[str]:
    return set(select_parameters(model, "attention"))


@pytest.mark.parametrize("name", ["CodeGen", "GPTNeoX", "Phi3", "GPTBigCode", "Bloom"])
def test_what_is_fused_is_taken_whole(name: str) -> None:
    model = of_transformers(name)
    fused = ("qkv_proj", "query_key_value", "c_attn")
    back = (".out_proj", ".o_proj", ".attn.c_proj", "attention.dense")
    wanted = {
        key for key in named_parameters(model) if key.rpartition(".")[0].endswith((*fused, *back))
    }
    assert names(model) == wanted
    trained = METHODS["attention_only"]().start(model, HYPER, default_logits).optimizer.param_groups
    assert sum(len(group["params"]) for group in trained) == len(wanted)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("DeepseekV2", "layers.0.self_attn without key, value;"),
        ("DeepseekV3", "layers.0.self_attn without query, key, value;"),
        ("Qwen3Next", "layers.0.linear_attn without query, key, value;"),
    ],
)
@pytest.mark.parametrize("method", ["attention_only", "l_lora"])
def test_attention_known_in_part_is_refused_until_it_is_frozen(
    name: str, missing: str, method: str
) -> None:
    model = of_transformers(name)
    with pytest.raises(TalosValueError, match=f"got {missing} freeze it to leave it out"):
        METHODS[method]().start(model, HYPER, default_logits)
    model.get_submodule(missing.partition(" ")[0]).requires_grad_(False)
    if name != "Qwen3Next":
        with pytest.raises(TalosValueError, match=r"got layers\.1\.self_attn without"):
            METHODS[method]().start(model, HYPER, default_logits)
        return
    METHODS[method]().start(model, HYPER, default_logits)
    assert names(model) == {f"layers.1.self_attn.{each}_proj.weight" for each in "qkvo"}


def test_an_output_projection_of_a_state_space_model_is_no_attention() -> None:
    with pytest.raises(TalosValueError, match="params must match a parameter of MambaModel"):
        METHODS["attention_only"]().start(of_transformers("Mamba"), HYPER, default_logits)
    hybrid = of_transformers("Jamba")
    assert any("mamba.out_proj" in key for key in named_parameters(hybrid))
    assert names(hybrid) == {f"layers.1.self_attn.{each}_proj.weight" for each in "qkvo"}


@pytest.mark.parametrize(
    "layers",
    [
        {"q": E, "kv": 2 * E, "proj": E},
        {"to_q": E, "to_kv": 2 * E, "to_out": E},
        {"query": E, "key": E, "value": E},  # no layer behind the heads
        {"Wqkv": 3 * E, "out_proj": E, "gate": E},
        {"qkv": E + 8, "proj": E},
    ],
)
def test_complete_attention_is_taken(layers: dict[str, int]) -> None:
    left = ("gate",)
    wanted = {f"attn.{each}.weight" for each in layers if each not in left}
    assert names(holder("attn", bias=False, **layers)) == wanted


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ({"q_proj": E, "kv_a_proj": 4, "kv_b_proj": 2 * E, "o_proj": E}, "key, value"),
        ({"qkv": 3 * E, "final": E}, "output"),
        ({"mixture": 3 * E, "out_proj": E}, "query, key, value"),
        ({"kv": 2 * E, "proj": E}, "query"),
    ],
)
def test_attention_beside_known_attention_is_refused(layers: dict[str, int], missing: str) -> None:
    model = nn.Sequential(holder("attn", qkv=3 * E, proj=E), holder("attn", **layers))
    with pytest.raises(TalosValueError, match=f"got 1.attn without {missing}; freeze it"):
        select_parameters(model, "attention")
    model[1].requires_grad_(False)
    assert {key[:7] for key in names(model)} == {"0.attn."}


@pytest.mark.parametrize(
    "others",
    [
        {"query_global": E, "key_global": E},
        {"pos_q_proj": E},
        {"layout_value": E},
        {"w2e_query": E},
    ],
)
def test_complete_attention_with_further_projections_is_refused(others: dict[str, int]) -> None:
    known = {"query": E, "key": E, "value": E}
    parts = nn.ModuleDict({**holder("self", **known, **others), **holder("output", dense=E)})
    model = nn.ModuleDict({"attention": parts})
    with pytest.raises(TalosValueError, match=f"got attention beside .*{next(iter(others))}"):
        select_parameters(model, "attention")


def test_values_without_queries_are_no_attention() -> None:
    """A critic's value head, the key and value layers of RWKV's feed-forward."""
    extra = nn.ModuleDict({**holder("critic", value=1), **holder("feed_forward", key=E, value=E)})
    model = nn.Sequential(holder("attn", qkv=3 * E, proj=E), extra)
    assert {key[:7] for key in names(model)} == {"0.attn."}


def test_reformers_output_projection_belongs_to_its_heads() -> None:
    inner = nn.ModuleDict(
        {**holder("self_attention", query=E, key=E, value=E), **holder("output", dense=E)}
    )
    assert "attention.output.dense.weight" in names(nn.ModuleDict({"attention": inner}))


def test_output_projections_lie_beside_their_heads_or_one_level_higher() -> None:
    """BERT's and ViT's; an MLP's layers of the same names are not among them."""
    layer = nn.ModuleDict(
        {
            "attention": nn.ModuleDict(
                {**holder("self", query=E, key=E, value=E), **holder("output", dense=E)}
            ),
            **holder("output", dense=E),
            **holder("mlp", c_proj=E, wo=E),
        }
    )
    found = attention_projections(layer.named_modules())
    assert all(isinstance(each, Projection) for each in found)
    assert names(layer) == {
        f"attention.{each}.{kind}"
        for each in ("self.query", "self.key", "self.value", "output.dense")
        for kind in ("weight", "bias")
    }
