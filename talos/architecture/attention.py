"""Which weights project to queries, keys and values and back, and which modules are attention.

A projection is a layer of its own (`q_proj`), a part of a fused one (`qkv`, `in_proj_weight`), or
the output projection behind the heads (`out_proj`). `talos.architecture.layers` lists the names.

The rows of a fused layer are queries, keys and values in three equal parts where its name and shape
show it. Where libraries order them differently under one name (`query_key_value`, `qkv_proj`), the
layer is taken as one whole.

Attention is taken whole or not at all. A module that has some projections under known names and
others under unknown ones, as multi-head latent attention does, is refused: only a part of it would
be trained. So is one that has all four and further layers named after a role, such as Longformer's
`query_global`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from talos.architecture.layers import (
    ATTENTION,
    PACKED,
    PARTS,
    SPLIT,
    is_conv1d,
    is_linear,
    roles_of,
)
from talos.errors import TalosValueError

__all__ = ["Projection", "attention_projections", "projections"]

_INPUTS = ("query", "key", "value")
_ROLE_IN_NAME = re.compile(r"query|key|value|(^|_)[qkv]+(_|$)", re.IGNORECASE)
# Where a layer named `qkv` or `c_attn` has the query, key and value of one head, then of the next.
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
        roles: of each of the equal parts of its outputs: query, key, value or output; "fused" if
            it holds all three in another order.
        transposed: whether a weight is [in, out], as in GPT-2, instead of [out, in].
    """

    name: str
    param: nn.Parameter
    roles: tuple[str, ...]
    transposed: bool = False

    def part(self, tensor: Tensor, role: str) -> Tensor:
        """Return the outputs of one role, a view: [out, in] of a weight, [out] of a bias.

        Args:
            tensor: of the parameter's shape.
            role: one of `roles`.
        """
        outputs = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        return outputs.chunk(len(self.roles))[self.roles.index(role)]


def projections(
    path: str, module: nn.Module, owner: nn.Module | None = None
) -> Iterator[Projection]:
    """Yield the projections among one module's own parameters, biases included.

    Args:
        path: the module's name in its model.
        module: the module.
        owner: the module that holds it; some libraries order the rows of a fused layer by heads.

    Example:
        >>> module = nn.MultiheadAttention(4, 2)
        >>> [(each.name, each.roles) for each in projections("attn", module)]
        [('in_proj_weight', ('query', 'key', 'value')), ('in_proj_bias', ('query', 'key', 'value'))]
        >>> [each.name for each in projections("attn.out_proj", module.out_proj)]
        ['weight', 'bias']
    """
    linear = is_linear(module)
    for name, param in module.named_parameters(recurse=False):
        if name in (*PACKED, *SPLIT):
            yield Projection(name, param, roles_of(name))
        elif linear and (roles := _roles(path, module, owner)):
            yield Projection(name, param, roles, is_conv1d(module))


def _roles(path: str, layer: nn.Module, owner: nn.Module | None) -> tuple[str, ...]:
    """Return the roles of a linear layer, by its name and the shape of its weight."""
    roles = roles_of(path)
    if roles != _INPUTS:
        return roles
    weight: Any = layer.weight  # no parameter where it is computed
    outputs, inputs = weight.shape
    if is_conv1d(layer):
        inputs, outputs = outputs, inputs
        if path.endswith("c_attn") and outputs == 2 * inputs:  # beside a `q_attn`
            return ("key", "value")
    by_heads = type(owner).__module__.startswith(_BY_HEADS)
    return ("fused",) if by_heads or outputs != len(_INPUTS) * inputs else _INPUTS


def attention_projections(modules: Iterable[tuple[str, nn.Module]]) -> list[Projection]:
    """Return the projections of all attention modules.

    Queries, keys and values are attention without an output projection too, unless another linear
    layer beside them could be one. An output projection alone is none, unless its module is called
    attention and has other linear layers.

    Args:
        modules: names and modules of a model.

    Returns:
        A `Projection` a parameter, in the order of the modules.

    Raises:
        TalosValueError: an attention module that requires gradients has only some of the
            projections under known names, or further layers that are named after a role.

    Example:
        >>> block = nn.TransformerEncoderLayer(4, 2, 8)
        >>> [each.name for each in attention_projections(block.named_modules())]
        ['in_proj_weight', 'in_proj_bias', 'weight', 'bias']
    """
    named = dict(modules)
    found: dict[str, list[Projection]] = {}
    others = []
    for path, module in named.items():
        parent = path.rpartition(".")[0]
        own = list(projections(path, module, named.get(parent)))
        if own:
            holder = parent if is_linear(module) else path
            found.setdefault(PARTS.sub("", holder), []).extend(own)
        elif is_linear(module):
            others.append(path)
    taken = []
    for holder, own in found.items():
        kind, inside = type(named.get(holder)).__name__, f"{holder}." if holder else ""
        missing, more = _missing(own), any(path.startswith(inside) for path in others)
        if missing == ["output"] and not more:
            missing = []
        called_attention = any(map(ATTENTION.search, (holder, kind)))
        if (missing == [*_INPUTS] and not more) or ("query" in missing and not called_attention):
            continue
        beside = [path for path in others if _is_part(path, holder)]
        if (missing or beside) and any(each.param.requires_grad for each in own):
            lacks = f"without {', '.join(missing)}" if missing else f"beside {', '.join(beside)}"
            raise TalosValueError(
                "model must have query, key, value and output projections of known names, and no "
                f"others, in every attention module, got {holder or kind} {lacks}; freeze it to "
                "leave it out, or name weights by a regular expression: params="
            )
        taken += own
    return taken


def _is_part(path: str, holder: str) -> bool:
    """Return whether a linear layer of an unknown name is named after a role, in the holder."""
    parent, _, leaf = path.rpartition(".")
    return PARTS.sub("", parent) == holder and _ROLE_IN_NAME.search(leaf) is not None


def _missing(own: list[Projection]) -> list[str]:
    """Return the roles that no projection has."""
    present = {role for each in own for role in each.roles}
    present.update(_INPUTS if "fused" in present else ())
    return [role for role in (*_INPUTS, "output") if role not in present]
