"""Models that FSDP2 shards: which parameters their forward uses, and when ranks must run along.

FSDP2's forward and backward gather the parameters of a module from all ranks and put them in the
place of the sharded ones. Those gathered parameters are the same objects in every forward; only
their memory is freed in between. So they are looked up once, and scored in the place of the sharded
ones. All ranks must run as many forwards and backwards as each other.
"""

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from talos.distributed import is_sharded, world_size
from talos.errors import TalosTypeError, TalosValueError
from talos.names import named_modules, unwrapped
from talos.params import Candidates

__all__ = ["check_sharded", "gathered"]


def check_sharded(
    candidates: Candidates, check: bool, group: dist.ProcessGroup | None = None
) -> None:
    """Refuse what a calibration of a sharded model cannot do.

    Args:
        candidates: what is to be scored.
        check: whether the self-test is wanted.
        group: the ranks that share the work.

    Raises:
        TalosValueError: a candidate is sharded, and `check` is True or `group` lacks ranks.
    """
    params: list[Any] = [each.param for each in candidates.values()]
    meshes = [param.device_mesh.size() for param in params if is_sharded(param)]
    if meshes and check:
        raise TalosValueError(
            "check must be False for a model that is sharded, got True; check a copy in one process"
        )
    for ranks in meshes:
        if ranks != world_size(group):
            raise TalosValueError(
                f"group must hold the {ranks} ranks that the model is sharded over, got "
                f"{world_size(group)}; leave it out, or shard the model over that group"
            )


def gathered(model: nn.Module, candidates: Candidates) -> Candidates:
    """Return the candidates with the parameters that the model's forward uses.

    Args:
        model: the model; all ranks call this.
        candidates: its parameters.

    Returns:
        Those parameters with the gathered ones in the place of the sharded ones.

    Raises:
        TalosTypeError: a parameter is sharded otherwise than by FSDP2's `fully_shard` alone.
    """
    if not any(is_sharded(each.param) for each in candidates.values()):
        return candidates
    from torch.distributed.fsdp import FSDPModule  # who has no such model need not wait for it

    names = {id(each.param): name for name, each in candidates.items()}
    found = Candidates(candidates)
    found.passed_over = candidates.passed_over
    holders = [
        (module, attribute, names[id(param)])
        for _, module in named_modules(model)
        for attribute, param in module.named_parameters(recurse=False)
        if id(param) in names
    ]
    for owner in unwrapped(model).modules():
        if not isinstance(owner, FSDPModule):
            continue
        owner.unshard()
        for module, attribute, name in holders:
            param = getattr(module, attribute)
            if not is_sharded(param):
                found[name] = replace(candidates[name], param=param)
        owner.reshard()
    for name, each in found.items():
        if is_sharded(each.param):
            raise TalosTypeError(
                f"{name} must be sharded by FSDP2's fully_shard alone to be scored, got a DTensor "
                "that stays sharded in the forward; calibrate before the model is made parallel"
            )
    return found
