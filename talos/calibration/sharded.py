"""Models that FSDP2 shards: which parameters their forward uses, and who keeps which scores.

FSDP2's forward and backward gather the parameters of a module from all ranks and put them in the
place of the sharded ones. Those gathered parameters are the same objects in every forward; only
their memory is freed in between. So they are looked up once, and scored in the place of the sharded
ones. All ranks must run as many forwards and backwards as each other.

Each rank keeps the sums of some rows of every parameter. FSDP2 gathers module by module, in one
order on all ranks. So the ranks add up the scores of a module when the backward has left it and
enters another one: whole sums exist of few modules at a time.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from talos.distributed import is_sharded, local, world_size
from talos.errors import TalosTypeError, TalosValueError
from talos.names import named_modules, unwrapped
from talos.params import Candidates

__all__ = ["ShardedSums", "check_sharded", "gathered"]

Holders = dict[nn.Module, list[str]]  # names of the parameters that FSDP2 gathers with each module


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


def gathered(model: nn.Module, candidates: Candidates) -> tuple[Candidates, Holders]:
    """Return the candidates with the parameters that the model's forward uses.

    Args:
        model: the model; all ranks call this.
        candidates: its parameters.

    Returns:
        Those parameters with the gathered ones in the place of the sharded ones, and the names of
        the latter by the module that FSDP2 gathers them with; none of a model that is not sharded.

    Raises:
        TalosTypeError: a parameter is sharded otherwise than by FSDP2's `fully_shard` alone.
    """
    if not any(is_sharded(each.param) for each in candidates.values()):
        return candidates, {}
    from torch.distributed.fsdp import FSDPModule  # who has no such model need not wait for it

    names = {id(each.param): name for name, each in candidates.items()}
    found = Candidates(candidates)
    found.passed_over = candidates.passed_over
    by: Holders = {}
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
            if not is_sharded(param) and is_sharded(found[name].param):
                found[name] = replace(candidates[name], param=param)
                by.setdefault(owner, []).append(name)
        owner.reshard()
    for name, each in found.items():
        if is_sharded(each.param):
            raise TalosTypeError(
                f"{name} must be sharded by FSDP2's fully_shard alone to be scored, got a DTensor "
                "that stays sharded in the forward; calibrate before the model is made parallel"
            )
    return found, by


class ShardedSums:
    """Sums of scores over all ranks, of which each rank keeps some rows of every parameter.

    The rows do not depend on how the model is sharded: rank r of n has the r-th of n equal parts.

    Args:
        candidates: what is scored, as the model holds it.
        holders: names by the module that FSDP2 gathers them with.
        group: the ranks.
    """

    def __init__(
        self, candidates: Candidates, holders: Holders, group: dist.ProcessGroup | None
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        params: list[Any] = [each.param for each in candidates.values() if is_sharded(each.param)]
        mesh: DeviceMesh = params[0].device_mesh
        if mesh.ndim > 1:
            group = group or dist.group.WORLD
            assert group is not None
            mesh = DeviceMesh.from_group(group, mesh.device_type)
        self._mesh = mesh
        self._shapes = {name: each.param.shape for name, each in candidates.items()}
        self._holders = holders
        self._inside = {module: set(module.modules()) for module in holders}
        self._entered: Holders = {}  # by this backward, with the names that are not added up yet
        self._sums: dict[str, Tensor] = {}

    def hook_modules(self, stack: ExitStack, exchange: Callable[[Iterable[str]], None]) -> None:
        """Follow backwards from module to module, until `stack` closes.

        Args:
            stack: closes the hooks.
            exchange: called with the names of the parameters of modules that a backward has left,
                in the same order on all ranks.
        """

        def enter(module: nn.Module, grad: Tensor) -> None:
            if module not in self._entered:
                names = []
                for each in self._entered:
                    if module not in self._inside[each]:
                        names += self._entered[each]
                        self._entered[each] = []
                self._entered[module] = self._holders[module]
                exchange(names)

        def watch(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            for each in tree_leaves(output):
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(partial(enter, module))

        for module in self._holders:
            stack.callback(module.register_forward_hook(watch).remove)

    def rest(self, names: Collection[str]) -> list[str]:
        """End a backward.

        Args:
            names: of what any rank has not added up yet.

        Returns:
            The same in the order of the candidates.
        """
        self._entered = {}
        return [name for name in self._shapes if name in names]

    def add(self, scores: Mapping[str, Tensor | None]) -> None:
        """Add the scores of all ranks, which all call this, to the sums.

        Args:
            scores: float64 in the shapes of the parameters; None where this rank has none.
        """
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for name, score in scores.items():
                part = self._part(name, score)
                if name in self._sums:
                    local(self._sums[name]).add_(local(part))
                else:
                    self._sums[name] = part

    def _part(self, name: str, score: Tensor | None) -> Tensor:
        """Return the sum of all ranks' scores of a parameter, sharded by rows."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        if score is None:
            score = torch.zeros(
                self._shapes[name], dtype=torch.float64, device=self._mesh.device_type
            )
        own = DTensor.from_local(score, self._mesh, [Partial()], run_check=False)
        return own.redistribute(placements=[Shard(0)])

    def take(self) -> dict[str, Tensor]:
        """Return the sums in the order of the candidates, float64, and begin new ones."""
        return {
            name: self._sums.pop(name) if name in self._sums else self._part(name, None)
            for name in self._shapes
        }
