"""What a parameter's name tells: its layer, and its type inside the layer."""

import re

__all__ = ["KINDS", "kind_of", "layer_of"]

KINDS = (
    "query",
    "key",
    "value",
    "qkv",
    "attention out",
    "mlp in",
    "mlp out",
    "norm",
    "bias",
    "patch",
    "embedding",
    "other",
)
"""The types, in the order in which tables and figures show them."""

# First match wins; patterns are searched in the name without its last part (weight, bias).
_PATTERNS = (
    ("norm", r"norm|(^|\.)ln(_|\d|$)|layer_?norm"),
    ("qkv", r"in_proj|(^|\.)qkv$|c_attn$"),
    ("query", r"(^|\.)(q|query|q_proj|to_q)$|q_proj_weight"),
    ("key", r"(^|\.)(k|key|k_proj|to_k)$|k_proj_weight"),
    ("value", r"(^|\.)(v|value|v_proj|to_v)$|v_proj_weight"),
    ("mlp in", r"intermediate|fc1$|c_fc$|linear1$|wi(_\d)?$|up_proj$|gate_proj$|mlp\.0$"),
    ("attention out", r"(attn|attention).*(out_proj|output\.dense|(^|\.)o|proj|o_proj)$|o_proj$"),
    ("mlp out", r"output\.dense$|fc2$|c_proj$|linear2$|wo$|down_proj$|mlp\.2$"),
    ("patch", r"patch|conv1$"),
    ("embedding", r"embed|wte$|wpe$|shared$|relative_attention_bias"),
)


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter belongs to: the first number in its name.

    Example:
        >>> layer_of("encoder.layer.3.attention.self.query.weight")
        3
        >>> layer_of("embeddings.LayerNorm.weight") is None
        True
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def kind_of(name: str) -> str:
    """The type of a parameter, one of `KINDS`, by the naming habits of transformer libraries.

    Example:
        >>> kind_of("encoder.layer.3.attention.self.query.weight")
        'query'
        >>> kind_of("blocks.0.mlp.fc1.bias")
        'bias'
    """
    module, _, leaf = name.rpartition(".")
    lowered = (module if leaf in ("weight", "bias") else name).lower()
    for kind, pattern in _PATTERNS:
        if re.search(pattern, lowered):
            return "bias" if "bias" in leaf and kind not in ("norm", "embedding") else kind
    return "bias" if "bias" in leaf else "other"
