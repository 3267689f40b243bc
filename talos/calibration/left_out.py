"""Weights that the preset "maskable" leaves out because it does not know their kind.

It leaves out on purpose heads, embeddings of any kind, norms over channels or the batch, and the
routers of experts. Other weights, such as convolutions in one or three dimensions, recurrent layers
and bare parameters of unknown use, keep their base values, and the mask's density does not count
them.
"""

import re
import warnings
from collections.abc import Hashable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from talos.architecture.experts import is_router
from talos.architecture.layers import kind_of
from talos.names import named_parameters
from talos.params import Candidates, body
from talos.tensors import place

__all__ = ["left_out", "warn_of_left_out"]

_ON_PURPOSE = (
    *(nn.Embedding, nn.EmbeddingBag, nn.GroupNorm),
    nn.modules.batchnorm._NormBase,
)
# Embeddings that are bare parameters, and the projection of CLIP, which is its head.
_EMBEDDING = re.compile(r"token|position|(^|[._])pos([._]|$)|relative|rel_pos|\bproj$|_projection$")
_NAMED = 5  # in a message
_LEAST = 0.01  # of the model's weights; fewer need no warning


def warn_of_left_out(model: nn.Module, chosen: Candidates, params: str) -> dict[str, Any] | None:
    """Warn the caller's caller of weights that "maskable" leaves out.

    Args:
        model: any module.
        chosen: the candidates that `params` selected.
        params: what the user passed. Other presets and patterns leave the rest out on purpose.

    Returns:
        The names and the share of those weights, for a mask's metadata; None without "maskable".
    """
    if params != "maskable":
        return None
    sizes, share = left_out(model, chosen)
    if share > _LEAST:
        names = sorted(sizes, key=lambda name: -sizes[name])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"params='maskable' leaves out {share:.1%} of the model's weights, of kinds that it "
            f"does not know: {', '.join(names[:_NAMED])}{more}; they keep their base values; take "
            "those that linear layers or norms use by a regular expression (params=), or freeze "
            "them (requires_grad_(False))",
            stacklevel=3,
        )
    return {"names": list(sizes), "share": share}


def left_out(model: nn.Module, chosen: Candidates) -> tuple[dict[str, int], float]:
    """Find the weights that are neither candidates nor left out on purpose, nor frozen.

    Args:
        model: any module.
        chosen: what the preset "maskable" selects of it.

    Returns:
        Their sizes by name, with `*` for numbers of layers, in the order of the model; and their
        share of all weights of the model.

    Example:
        >>> from talos.params import select_parameters
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(3, 4, 1))
        >>> left_out(model, select_parameters(model))
        ({'1.weight': 12, '1.bias': 4}, 0.64)
    """
    unknown: set[Hashable] = set()
    known = {place(each.param) for each in chosen.values()}
    for module in body(model).values():
        meant = isinstance(module, _ON_PURPOSE) or is_router(module)
        (known if meant else unknown).update(map(place, module.parameters(recurse=False)))
    unknown -= known
    named = {name: param for name, param in named_parameters(model).items() if not is_lazy(param)}
    sizes: dict[str, int] = {}
    for name, param in named.items():
        bare = kind_of(name) == "embedding" or _EMBEDDING.search(name.lower())
        if param.requires_grad and place(param) in unknown and not bare:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            sizes[pattern] = sizes.get(pattern, 0) + param.numel()
    total = sum(param.numel() for param in named.values())
    return sizes, sum(sizes.values()) / max(total, 1)
