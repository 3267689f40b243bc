"""What a layer is, by its name: the one table of the names that model libraries use.

The presets (`talos.params`), the roles of projections (`talos.architecture.attention`) and the
table of a mask (`Mask.describe`) follow from it. The name of an output projection is ambiguous: an
MLP has a `c_proj` too, a state space model an `out_proj`. So it counts only inside attention.
"""

import re
import sys

from torch import nn

__all__ = [
    "ATTENTION",
    "KINDS",
    "PACKED",
    "PARTS",
    "SPLIT",
    "is_conv1d",
    "is_linear",
    "is_norm",
    "kind_of",
    "layer_of",
    "roles_of",
]

KINDS = (
    *("query", "key", "value", "qkv", "attention out", "mlp in", "mlp out"),
    *("norm", "bias", "patch", "embedding", "other"),
)
"""The kinds of parameters, in the order in which tables and figures show them."""

PACKED = ("in_proj_weight", "in_proj_bias")  # of `nn.MultiheadAttention`
SPLIT = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

# The roles of the equal parts of a layer's outputs, and the layer's names. "fused": queries, keys
# and values in an order that differs between libraries.
_PROJECTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("query",): (
        *("q_proj", "query", "q", "to_q", "wq", "q_lin", "query_proj", "linear_q", SPLIT[0]),
        "q_attn",  # beside a `c_attn` of keys and values, in cross-attention
    ),
    ("key",): ("k_proj", "key", "k", "to_k", "wk", "k_lin", "key_proj", "linear_k", SPLIT[1]),
    ("value",): (
        *("v_proj", "value", "v", "to_v", "wv", "v_lin", "value_proj", "linear_v", SPLIT[2]),
    ),
    ("query", "key"): ("qk",),
    ("key", "value"): ("kv", "to_kv"),
    ("query", "key", "value"): ("qkv", "Wqkv", "to_qkv", "c_attn", *PACKED),
    ("fused",): ("query_key_value", "qkv_proj"),
    ("output",): (
        *("o_proj", "out_proj", "o", "to_out", "wo", "out_lin", "linear_out", "Wo", "out"),
        *("proj", "c_proj", "dense", "projection", "projection_layer", "output", "output_proj"),
    ),
}
_ROLES = {name: roles for roles, names in _PROJECTIONS.items() for name in names}
_MLP = {
    "mlp in": (
        *("fc1", "c_fc", "linear1", "lin1", "wi", "wi_0", "wi_1", "Wi", "fc_in", "mlp.0"),
        *("up_proj", "gate_proj", "gate_up_proj", "dense_h_to_4h"),
        *("intermediate.dense", "intermediate_dense"),
    ),
    "mlp out": (
        *("fc2", "c_proj", "linear2", "lin2", "wo", "Wo", "fc_out", "mlp.2", "mlp.3"),
        *("down_proj", "dense_4h_to_h", "output.dense", "output_dense"),
    ),
}
_MLP_KINDS = {name: kind for kind, names in _MLP.items() for name in names}
_OTHERS = (  # searched in the lower-case path
    ("patch", r"patch|conv1$"),
    ("embedding", r"embed|wte$|wpe$|shared$|relative_attention_bias"),
)

ATTENTION = re.compile(r"(attn|attention)s?\d*(\.\d+)?$", re.IGNORECASE)
"""Finds names of modules and classes that are called attention."""

PARTS = re.compile(r"(^|\.)(self|output|to_out)$|(?<=attention)\.(attention|att|self_attention)$")
"""Finds what the parts of one attention are called: `attention.self`, `attention.output`, ..."""


def layer_of(name: str) -> int | None:
    """Return the number of a parameter's layer: the first number in its name.

    Example:
        >>> layer_of("encoder.layer.3.attention.self.query.weight")
        3
        >>> layer_of("embeddings.LayerNorm.weight") is None
        True
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def kind_of(name: str) -> str:
    """Return the kind of a parameter, one of `KINDS`, by its name.

    Example:
        >>> kind_of("encoder.layer.3.attention.self.query.weight")
        'query'
        >>> kind_of("blocks.0.mlp.fc1.bias")
        'bias'
    """
    module, _, leaf = name.rpartition(".")
    kind = _kind_of_layer(module if leaf in ("weight", "bias") else name)
    return "bias" if "bias" in leaf and kind not in ("norm", "embedding") else kind


def _kind_of_layer(path: str) -> str:
    lowered = path.lower()
    if re.search(r"norm|(^|\.)ln(_|\d|$)", lowered):
        return "norm"
    roles = roles_of(path)
    if roles == ("output",):
        if ATTENTION.search(PARTS.sub("", _shortened(path).rpartition(".")[0])):
            return "attention out"
    elif roles:
        return roles[0] if len(roles) == 1 and roles[0] in KINDS else "qkv"
    parts = path.split(".")
    for end in (".".join(parts[-2:]), parts[-1]):
        if end in _MLP_KINDS:
            return _MLP_KINDS[end]
    return next((kind for kind, pattern in _OTHERS if re.search(pattern, lowered)), "other")


def roles_of(path: str) -> tuple[str, ...]:
    """Return the roles that the equal parts of a layer's outputs have by its name.

    Args:
        path: name of a layer, or of a parameter of `nn.MultiheadAttention`.

    Returns:
        Of query, key, value, output and fused; nothing for a layer that is no projection.

    Example:
        >>> roles_of("attn.q_proj"), roles_of("attn.kv"), roles_of("mlp.fc1")
        (('query',), ('key', 'value'), ())
    """
    return _ROLES.get(_shortened(path).rpartition(".")[2], ())


def _shortened(path: str) -> str:
    """Return the path without the `.0` behind a `to_out` (diffusers)."""
    return re.sub(r"\bto_out\.0$", "to_out", path)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is the linear layer of GPT-2, whose weight is [in, out]."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and isinstance(module, kind)


def is_linear(module: nn.Module) -> bool:
    """Return whether this is a linear layer, of torch or of GPT-2."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_norm(module: nn.Module) -> bool:
    """Return whether this is a LayerNorm or RMSNorm, of torch or of a model library."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    vectors = all(param.dim() == 1 for param in module.parameters(recurse=False))
    return type(module).__name__.lower().endswith(("rmsnorm", "t5layernorm")) and vectors
