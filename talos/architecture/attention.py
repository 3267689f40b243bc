"""Which modules are attention: those that hold queries, keys, values and an output projection.

By its name alone a layer says little: a state space model has an `out_proj` and an MLP a `c_proj`.
Projections are therefore taken by the module that holds them, all or none. Where a module has some
and the others go by names that nobody here knows, as in multi-head latent attention, it is refused:
it would be trained in part. So is one with all four and further ones beside them that are called
after a role, such as Longformer's `query_global`.
"""

import re
from collections.abc import Iterable

from torch import nn

from talos.architecture.projections import Projection, is_linear, projections
from talos.errors import TalosValueError

__all__ = ["attention_projections"]

_INPUTS = ("query", "key", "value")
# Parts of one attention module: `attention.self.query` and `attention.output.dense`, ...
_PARTS = re.compile(r"(^|\.)(self|output|to_out)$|(?<=attention)\.(attention|att|self_attention)$")
_ROLE_IN_NAME = re.compile(r"query|key|value|(^|_)[qkv]+(_|$)", re.IGNORECASE)
_NAMED_ATTENTION = re.compile(r"(attn|attention)\d*(\.\d+)?$", re.IGNORECASE)


def attention_projections(modules: Iterable[tuple[str, nn.Module]]) -> list[Projection]:
    """The projections of all attention modules.

    Queries, keys and values are attention without an output projection too where no other linear
    layer beside them could be one. An output projection alone is not, unless its module is called
    attention and has other linear layers.

    Args:
        modules: names and modules of a model.

    Returns:
        A `Projection` a parameter, in the order of the modules.

    Raises:
        TalosValueError: an attention module holds some of the projections, one of which requires a
            gradient, but not all, or others that are called after a role.

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
            found.setdefault(_PARTS.sub("", holder), []).extend(own)
        elif is_linear(module):
            others.append(path)
    taken = []
    for holder, own in found.items():
        kind, inside = type(named.get(holder)).__name__, f"{holder}." if holder else ""
        missing, more = _missing(own), any(path.startswith(inside) for path in others)
        if missing == ["output"] and not more:
            missing = []
        called_attention = any(map(_NAMED_ATTENTION.search, (holder, kind)))
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
    """Whether a linear layer of an unknown name is called after a role, inside the holder."""
    parent, _, leaf = path.rpartition(".")
    return _PARTS.sub("", parent) == holder and _ROLE_IN_NAME.search(leaf) is not None


def _missing(own: list[Projection]) -> list[str]:
    have = {role for each in own for role in each.roles}
    have.update(_INPUTS if "fused" in have else ())
    return [role for role in (*_INPUTS, "output") if role not in have]
