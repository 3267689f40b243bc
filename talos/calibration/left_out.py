"""What the preset "maskable" leaves out without meaning to: weights of kinds that it does not know.

It leaves out on purpose heads, embeddings of any kind, norms over channels or the batch and the
routers of experts. The rest, such as convolutions in one or three dimensions, recurrent layers and
bare parameters of unknown use, stays at its base values, and the mask's density does not count it.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from talos.architecture.experts import is_router
from talos.architecture.layers import kind_of
from talos.names import named_parameters
from talos.params import Candidates, body
from talos.tensors import place

__all__ = ["LeftOut", "left_out"]

_ON_PURPOSE = (
    *(nn.Embedding, nn.EmbeddingBag, nn.GroupNorm),
    nn.modules.batchnorm._NormBase,
)
# Embeddings that are bare parameters, and the projection of CLIP, which is its head.
_EMBEDDING = re.compile(r"token|position|(^|[._])pos([._]|$)|relative|rel_pos|\bproj$|_projection$")
_NAMED = 5  # in a message
_LEAST = 0.01


@dataclass(frozen=True)
class LeftOut:
    """Weights of unknown kinds.

    Attributes:
        sizes: their numbers by name, with `*` for numbers of layers, in the order of the model.
        share: of all weights of the model.
    """

    sizes: dict[str, int]
    share: float

    @property
    def message(self) -> str | None:
        """What to tell of them; None where they are few."""
        if self.share <= _LEAST:
            return None
        names = sorted(self.sizes, key=lambda name: -self.sizes[name])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return (
            f"params='maskable' leaves out {self.share:.1%} of the model's weights, of kinds that "
            f"it does not know: {', '.join(names[:_NAMED])}{more}; they keep their base values; "
            "take those that linear layers or norms use by a regular expression (params=), or "
            "freeze them (requires_grad_(False))"
        )


def left_out(model: nn.Module, chosen: Candidates) -> LeftOut:
    """The weights that are neither chosen nor left out on purpose, nor frozen.

    Args:
        model: any module.
        chosen: what the preset "maskable" takes of it.

    Returns:
        Their names and their share.

    Example:
        >>> from talos.params import select_parameters
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(3, 4, 1))
        >>> found = left_out(model, select_parameters(model))
        >>> found.sizes, round(found.share, 2)
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
    return LeftOut(sizes, sum(sizes.values()) / max(total, 1))
