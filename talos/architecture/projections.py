"""Which weights of a model project to queries, keys and values, and back: by libraries' names.

A projection is a layer of its own (`q_proj`, `query`, `q`, `q_lin`, ...), a part of a fused one
(`in_proj_weight` of `nn.MultiheadAttention`, `qkv`, `Wqkv`, `kv`; `c_attn` of GPT-2, in columns),
or the layer behind the heads (`out_proj`, `o`, `proj`, `dense`, ...). A layer behind the heads is
told from others of its name by the queries, keys and values beside it: see
`talos.architecture.attention`.

The rows of a fused layer are queries, keys and values in three equal parts where its name and shape
say so. Where libraries lay out the same name in several ways (`query_key_value` and `qkv_proj` by
heads, by blocks of heads or with few keys), they are not told apart, and the layer is one whole.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = [
    "PACKED",
    "SPLIT",
    "Projection",
    "is_conv1d",
    "is_linear",
    "projections",
    "roles_named",
]

PACKED = ("in_proj_weight", "in_proj_bias")  # rows of the queries, of the keys, of the values
SPLIT = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_LAYERS = {
    "query": (
        *("q_proj", "query", "q", "to_q", "wq", "q_lin", "query_proj", "linear_q"),
        "q_attn",  # beside a `c_attn` of keys and values, in cross-attention
    ),
    "key": ("k_proj", "key", "k", "to_k", "wk", "k_lin", "key_proj", "linear_k"),
    "value": ("v_proj", "value", "v", "to_v", "wv", "v_lin", "value_proj", "linear_v"),
    "output": (
        *("o_proj", "out_proj", "o", "to_out", "wo", "out_lin", "linear_out", "Wo", "out"),
        *("proj", "c_proj", "dense", "projection", "projection_layer", "output", "output_proj"),
    ),
}
_ROLES: dict[str, tuple[str, ...]] = {
    **{layer: (role,) for role, layers in _LAYERS.items() for layer in layers},
    **dict.fromkeys(("kv", "to_kv"), ("key", "value")),
    "qk": ("query", "key"),
}
_ALL = ("query", "key", "value")
_IN_THIRDS = ("qkv", "Wqkv", "to_qkv", "c_attn")
_LAID_OUT_VARIOUSLY = ("query_key_value", "qkv_proj")
# Where a layer named as in thirds has a head's query, key and value, then those of the next head.
_BY_HEADS = (
    *("timm.models.efficientformer", "timm.models.maxxvit", "timm.models.tiny_vit"),
    "transformers.models.gpt_bigcode",
)


@dataclass(frozen=True, eq=False)
class Projection:
    """A parameter that projects.

    Attributes:
        name: its name in its module: weight, in_proj_bias, ...
        param: the parameter.
        roles: of each of the equal parts of its outputs: query, key, value or output; "fused" of a
            whole that holds all three in another way.
        transposed: whether a weight is [in, out], as in GPT-2, instead of [out, in].
    """

    name: str
    param: nn.Parameter
    roles: tuple[str, ...]
    transposed: bool = False

    def part(self, tensor: Tensor, role: str) -> Tensor:
        """The outputs of one role, a view.

        Args:
            tensor: of the parameter's shape.
            role: one of `roles`.

        Returns:
            [out, in] of a weight, [out] of a bias.
        """
        outputs = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        return outputs.chunk(len(self.roles))[self.roles.index(role)]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2, whose weight is [in, out]."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and isinstance(module, kind)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, of torch or of GPT-2."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def projections(
    path: str, module: nn.Module, owner: nn.Module | None = None
) -> Iterator[Projection]:
    """The projections among one module's own parameters, biases included.

    Args:
        path: the module's name in its model.
        module: the module.
        owner: what holds the module, by whose library rows are told apart; None: unknown.

    Yields:
        A `Projection` a parameter.

    Example:
        >>> module = nn.MultiheadAttention(4, 2)
        >>> [(each.name, each.roles) for each in projections("attn", module)]
        [('in_proj_weight', ('query', 'key', 'value')), ('in_proj_bias', ('query', 'key', 'value'))]
        >>> [each.name for each in projections("attn.out_proj", module.out_proj)]
        ['weight', 'bias']
    """
    linear = is_linear(module)
    for name, param in module.named_parameters(recurse=False):
        if name in SPLIT:
            yield Projection(name, param, (_ALL[SPLIT.index(name)],))
        elif name in PACKED:
            yield Projection(name, param, _ALL)
        elif linear and (roles := _roles(path, module, owner)):
            yield Projection(name, param, roles, is_conv1d(module))


def roles_named(leaf: str) -> tuple[str, ...]:
    """The roles that the outputs of a layer of this name may have; see `Projection`.

    Example:
        >>> roles_named("q_proj"), roles_named("fc1")
        (('query',), ())
    """
    if leaf in (*PACKED, *_IN_THIRDS, *_LAID_OUT_VARIOUSLY):
        return _ALL
    return (_ALL[SPLIT.index(leaf)],) if leaf in SPLIT else _ROLES.get(leaf, ())


def _roles(path: str, layer: nn.Module, owner: nn.Module | None) -> tuple[str, ...]:
    """What the equal parts of a linear layer's outputs are; nothing where it is no projection."""
    leaf = re.sub(r"\bto_out\.0$", "to_out", path).rpartition(".")[2]
    if leaf in _LAID_OUT_VARIOUSLY:
        return ("fused",)
    if leaf not in _IN_THIRDS:
        return _ROLES.get(leaf, ())
    outputs, inputs = layer.get_parameter("weight").shape
    if is_conv1d(layer):
        inputs, outputs = outputs, inputs
        if leaf == "c_attn" and outputs == 2 * inputs:  # beside a `q_attn`
            return _ALL[1:]
    by_heads = type(owner).__module__.startswith(_BY_HEADS)
    return ("fused",) if by_heads or outputs != len(_ALL) * inputs else _ALL
