"""Weights that are computed from parameters before every use, which no mask can select.

torch's parametrizations, `weight_norm`, `spectral_norm` and `prune` replace a weight by other
parameters. What the layer uses then is no parameter, and the parameters are no weight of a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Computed", "computed_weights"]


@dataclass(frozen=True)
class Computed:
    """A weight that is computed.

    Attributes:
        name: of the weight in its module.
        kind: what computes it.
        sources: the parameters from which it is computed, by their names in the module.
        remedy: the call that makes it a parameter again.
    """

    name: str
    kind: str
    sources: dict[str, nn.Parameter]
    remedy: str


def computed_weights(module: nn.Module) -> Iterator[Computed]:
    """Yield the computed weights of one module.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
        >>> [(each.name, sorted(each.sources)) for each in computed_weights(layer)]
        [('weight', ['parametrizations.weight.original0', 'parametrizations.weight.original1'])]
    """
    if parametrize.is_parametrized(module):
        for name, steps in cast(nn.ModuleDict, module.parametrizations).items():
            kind = ", ".join(type(step).__name__.lstrip("_") for step in steps.children())
            sources = {
                f"parametrizations.{name}.{own}": param for own, param in steps.named_parameters()
            }
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
            yield Computed(name, kind, sources, remedy)
    for name, value in vars(module).items():
        if not isinstance(value, Tensor):
            continue
        own = module.named_parameters(recurse=False)
        if sources := {key: param for key, param in own if key.startswith(f"{name}_")}:
            hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
            remedy = "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove"
            yield Computed(name, ", ".join(hooks) or "a hook", sources, remedy)
