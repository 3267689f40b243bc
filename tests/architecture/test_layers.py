"""The one table of layer names: kinds, roles and numbers of layers."""

from collections.abc import Callable

import pytest
from torch import nn

from talos.architecture.layers import is_conv1d, is_linear, kind_of, layer_of
from talos.names import named_parameters
from talos.params import body, select_attention
from tests.architecture.test_attention import FUSED, TOLD_APART
from tests.architecture.test_families import FAMILIES


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("encoder.layer.3.attention.self.query.weight", 3, "query"),
        ("encoder.layer.3.attention.self.key.bias", 3, "bias"),
        ("encoder.layer.3.attention.output.dense.weight", 3, "attention out"),
        ("encoder.layer.3.attention.output.LayerNorm.weight", 3, "norm"),
        ("encoder.layer.3.intermediate.dense.weight", 3, "mlp in"),
        ("encoder.layer.3.output.dense.weight", 3, "mlp out"),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", 11, "qkv"),
        ("visual.transformer.resblocks.11.attn.out_proj.weight", 11, "attention out"),
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", 11, "mlp in"),
        ("visual.transformer.resblocks.11.mlp.c_proj.weight", 11, "mlp out"),
        ("visual.transformer.resblocks.11.ln_1.weight", 11, "norm"),
        ("visual.conv1.weight", None, "patch"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", 2, "query"),
        ("encoder.block.2.layer.0.SelfAttention.o.weight", 2, "attention out"),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", 2, "mlp in"),
        ("encoder.block.2.layer.1.DenseReluDense.wo.weight", 2, "mlp out"),
        ("model.layers.5.self_attn.k_proj.weight", 5, "key"),
        ("model.layers.5.self_attn.o_proj.weight", 5, "attention out"),
        ("model.layers.5.mlp.down_proj.weight", 5, "mlp out"),
        ("blocks.4.attn.qkv.weight", 4, "qkv"),
        ("blocks.4.attn.proj.weight", 4, "attention out"),
        ("transformer.h.7.attn.c_attn.weight", 7, "qkv"),
        ("distilbert.transformer.layer.1.attention.out_lin.weight", 1, "attention out"),
        ("distilbert.transformer.layer.1.ffn.lin1.weight", 1, "mlp in"),
        ("distilbert.transformer.layer.1.ffn.lin2.weight", 1, "mlp out"),
        ("deberta.encoder.layer.0.attention.self.query_proj.weight", 0, "query"),
        ("model.layers.0.self_attn.qkv_proj.weight", 0, "qkv"),
        ("model.layers.0.mlp.experts.gate_up_proj", 0, "mlp in"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", 0, "bias"),
        ("layers.0.mlp.Wo.weight", 0, "mlp out"),
        ("attentions.2.out_lin.weight", 2, "attention out"),
        ("down.1.attn1.to_out.0.weight", 1, "attention out"),
        ("layers.0.mixer.out_proj.weight", 0, "other"),
        ("classifier.out_proj.weight", None, "other"),
        ("vit.embeddings.patch_embeddings.projection.weight", None, "patch"),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0, "embedding"),
    ],
)
def test_layer_and_type_of_a_name(name: str, layer: int | None, kind: str) -> None:
    assert (layer_of(name), kind_of(name)) == (layer, kind)


KIND_OF_ROLES = {
    **{(role,): role for role in ("query", "key", "value")},
    **dict.fromkeys(
        [("query", "key", "value"), ("query", "key"), ("key", "value"), ("fused",)], "qkv"
    ),
    ("output",): "attention out",
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda f=family: f.model(f.attentions[-1]) for name, family in FAMILIES.items()},
    **{name: make for name, (make, _) in {**TOLD_APART, **FUSED}.items()},
}


def kind_by_shape(layer: nn.Module) -> str:
    """What a linear layer outside attention is: an MLP widens, then narrows."""
    outputs, inputs = layer.get_parameter("weight").shape
    if is_conv1d(layer):
        outputs, inputs = inputs, outputs
    return "other" if outputs == inputs else "mlp in" if outputs > inputs else "mlp out"


@pytest.mark.parametrize("name", MODELS)
def test_the_kind_of_every_linear_layer_is_its_role(name: str) -> None:
    model = MODELS[name]()
    roles = {key: each.roles for key, each in select_attention(model).items()}
    assert roles
    for key, found in roles.items():
        assert kind_of(key) == ("bias" if "bias" in key else KIND_OF_ROLES[found]), key
    if name in FAMILIES:
        params = named_parameters(model)
        layers = {key.rpartition(".")[0] for key in roles}
        assert set(roles) == {key for key in params if key.rpartition(".")[0] in layers}
        sizes = {tuple(sorted(params[key].shape)) for key in roles if params[key].dim() == 2}
        assert sizes <= {(16, 32), (32, 32), (32, 96)}  # none has the hidden size of an MLP
        for path, module in body(model).items():
            if is_linear(module) and f"{path}.weight" not in roles:
                assert kind_of(f"{path}.weight") == kind_by_shape(module), path
