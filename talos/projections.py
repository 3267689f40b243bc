"""Which weights of a model project to queries, keys and values, and back: by libraries' names.

A projection is a layer of its own (`q_proj`, `query`, `q`, `q_lin`, ...), a part of a fused one
(`in_proj_weight` of `nn.MultiheadAttention`, `qkv`, `Wqkv`; `c_attn` of GPT-2, in columns), or the
layer behind the heads (`out_proj`, `o`, `attention.output.dense`, `attn.proj`, ...).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = [
    "CONV1D_ATTENTION",
    "FUSED_LAYERS",
    "PACKED",
    "QK_LAYERS",
    "SPLIT",
    "Projection",
    "has_thirds",
    "is_conv1d",
    "projections",
]

PACKED = ("in_proj_weight", "in_proj_bias")  # rows of the queries, of the keys, of the values
SPLIT = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
FUSED_LAYERS = ("qkv", "Wqkv", "qkv_proj", "c_attn", "query_key_value")
_BY_HEADS = ("query_key_value",)  # rows of a head's query, key and value, then of the next head's
CONV1D_ATTENTION = ("c_attn", "q_attn")
_LAYERS = {
    "query": ("q_proj", "query", "q", "to_q", "wq", "q_lin", "query_proj", "linear_q"),
    "key": ("k_proj", "key", "k", "to_k", "wk", "k_lin", "key_proj", "linear_k"),
    "value": ("v_proj", "value", "v", "to_v", "wv", "v_lin", "value_proj", "linear_v"),
}
_ROLES = {layer: (role,) for role, layers in _LAYERS.items() for layer in layers}
QK_LAYERS = _LAYERS["query"] + _LAYERS["key"]
_OUTPUT = re.compile(
    r"(^|\.)(o|o_proj|out_proj|out_lin|linear_out)$|attention\.output\.dense$"
    r"|(attn|attention)\.(proj|c_proj|dense|wo|Wo|to_out\.0)$"
)
_ALL = ("query", "key", "value")


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


def has_thirds(leaf: str, module: nn.Module) -> bool:
    """Whether a fused layer's rows are those of the queries, of the keys and of the values.

    Grouped queries have fewer keys and values, and some models go head by head.

    Args:
        leaf: the layer's own name.
        module: a linear layer.
    """
    outputs, inputs = module.get_parameter("weight").shape
    return leaf not in _BY_HEADS and outputs == len(_ALL) * inputs


def projections(path: str, module: nn.Module) -> Iterator[Projection]:
    """The projections among one module's own parameters, biases included.

    Args:
        path: the module's name in its model.
        module: the module.

    Yields:
        A `Projection` a parameter.

    Example:
        >>> module = nn.MultiheadAttention(4, 2)
        >>> [(each.name, each.roles) for each in projections("attn", module)]
        [('in_proj_weight', ('query', 'key', 'value')), ('in_proj_bias', ('query', 'key', 'value'))]
        >>> [each.name for each in projections("attn.out_proj", module.out_proj)]
        ['weight', 'bias']
    """
    leaf = path.rpartition(".")[2]
    transposed = is_conv1d(module)
    layer = isinstance(module, nn.Linear) or transposed
    for name, param in module.named_parameters(recurse=False):
        roles: tuple[str, ...] = ()
        if name in SPLIT:
            roles = (_ALL[SPLIT.index(name)],)
        elif name in PACKED:
            roles = _ALL
        elif layer and leaf in _ROLES:
            roles = _ROLES[leaf]
        elif transposed and leaf in CONV1D_ATTENTION:
            roles = _conv1d_roles(leaf, module)
        elif layer and leaf in FUSED_LAYERS:
            roles = _ALL if has_thirds(leaf, module) else ("fused",)
        elif layer and _OUTPUT.search(path):
            roles = ("output",)
        if roles:
            yield Projection(name, param, roles, transposed)


def _conv1d_roles(leaf: str, module: nn.Module) -> tuple[str, ...]:
    """Beside a `q_attn`, in cross-attention, `c_attn` has keys and values only."""
    if leaf == "q_attn":
        return _ALL[:1]
    inputs, outputs = module.get_parameter("weight").shape
    return _ALL if outputs == 3 * inputs else _ALL[1:]
