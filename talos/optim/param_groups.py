"""Param groups of named parameters, and the checks of what they hold, worded like torch's."""

import gc
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.distributed import sharding
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.names import match_tensors, named_parameters, resolve_names
from talos.options import as_real, integer
from talos.params import check_one_memory
from talos.tensors import place

__all__ = [
    "NamedParams",
    "alike",
    "by_name",
    "check_arguments",
    "check_hyperparameters",
    "check_not_flattened",
    "check_not_wrapped",
    "check_trainable",
    "complete_groups",
    "listed",
    "module_of",
    "named_groups",
    "selected_names",
    "unselected",
]

NamedParams = Iterable[tuple[str, Tensor]]


def listed(model: Any) -> tuple[Any, list[Tensor]]:
    """Return a model argument with lists in place of iterators, and all tensors in it."""
    if isinstance(model, nn.Module):
        return model, list(model.parameters())
    if not isinstance(model, Iterable) or isinstance(model, str | Tensor):
        return model, []
    items = [
        {**item, "params": _listed({"params": item["params"]})} if isinstance(item, dict) else item
        for item in model
    ]
    groups = [item["params"] if isinstance(item, dict) else [item] for item in items]
    every = [each[-1] if isinstance(each, tuple) else each for group in groups for each in group]
    return items, [each for each in every if isinstance(each, Tensor)]


def named_groups(
    model: nn.Module | NamedParams | Iterable[Tensor] | Iterable[dict[str, Any]],
    selected: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return param groups of `(name, parameter)` pairs.

    Bare tensors take their names from a module that holds them and knows the `selected` names.
    """
    if isinstance(model, nn.Module):
        return [{"params": list(named_parameters(model).items())}]
    if not isinstance(model, Iterable) or isinstance(model, str | Tensor):
        raise TalosTypeError(
            "model must be a torch.nn.Module, named parameters or param groups, got "
            f"{type(model).__name__}"
        )
    items: list[Any] = list(model)
    if not items:
        raise TalosValueError("model must have parameters, got none")
    groups = items if isinstance(items[0], dict) else [{"params": items}]
    listed = [_listed(group) for group in groups]
    bare = [each for params in listed for each in params if not isinstance(each, tuple)]
    names = _names_in_their_module(bare, selected) if bare else {}
    return [
        {**group, "params": [p if isinstance(p, tuple) else (names[id(p)], p) for p in params]}
        for group, params in zip(groups, listed, strict=True)
    ]


def _listed(group: Mapping[str, Any]) -> list[Any]:
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    found = list(params.items() if isinstance(params, Mapping) else params)
    if "param_names" in group:
        return list(zip(group["param_names"], found, strict=True))
    return found


def _names_in_their_module(params: list[Any], selected: Collection[str]) -> dict[int, str]:
    """Return the names of bare tensors, as trainers pass them, in the module that holds them.

    A parameter does not know its name, so this searches the modules of this process.
    """
    for module in _modules_of(params):
        named = named_parameters(module, remove_duplicate=False)
        if len(resolve_names(selected, named)) == len(selected):
            return {id(param): name for name, param in reversed(named.items())}
    raise TalosTypeError(
        "params must be (name, parameter) pairs or the parameters of one module whose names are "
        "the mask's, got bare tensors; pass the model or model.named_parameters()"
    )


def _modules_of(params: Iterable[Tensor]) -> Iterator[nn.Module]:
    """Yield the modules of this process that hold all of these parameters."""
    wanted = set(map(id, params))
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module) or "_parameters" not in module.__dict__:
            continue
        if wanted <= set(map(id, module.parameters())):
            yield module


def module_of(model: object, names: Mapping[Tensor, str]) -> nn.Module:
    """Return the model, or a module with the parameters under these names, or an empty one."""
    if isinstance(model, nn.Module):
        return model
    for module in _modules_of(names):
        named = named_parameters(module, remove_duplicate=False)
        known = resolve_names(names.values(), named)
        if all(named.get(known.get(name, "")) is param for param, name in names.items()):
            return module
    return nn.Module()


def by_name(groups: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return all parameters by name; refuse a name of two tensors."""
    params: dict[str, Tensor] = {}
    for group in groups:
        for name, param in group["params"]:
            if params.setdefault(name, param) is not param:
                raise TalosValueError(
                    f"params must have names of their own, got {name} for two tensors; "
                    "prefix the names of each module"
                )
    return params


def selected_names(
    model: object, params: Mapping[str, Tensor], mask: Mask, strict: bool
) -> dict[Tensor, str]:
    """Return the parameters that a mask selects entries of, with their names in it."""
    if mask.nnz == 0:
        raise TalosValueError("mask must select at least one entry: no weight selected")
    aliases = params
    if isinstance(model, nn.Module):
        aliases = named_parameters(model, remove_duplicate=False)
    matched = match_tensors(mask.shapes, aliases)
    check_one_memory(aliases, {n: p for n, p in matched.items() if mask.indices[n].nnz})
    covered = {place(param) for param in matched.values()}
    if strict and (unknown := [n for n, p in params.items() if place(p) not in covered]):
        raise TalosValueError(
            f"mask must cover every parameter when strict, lacks {len(unknown)}: "
            f"{', '.join(unknown[:5])}"
        )
    names = {param: name for name, param in matched.items() if mask.indices[name].nnz}
    for param, name in names.items():
        check_trainable(name, param)
    return names


def alike(
    groups: Iterable[Mapping[str, Any]], names: Mapping[Tensor, str]
) -> list[tuple[int, dict[str, Tensor]]]:
    """Return the parameters of one group, device and dtype together, by name, with its number.

    They are sharded alike, or not at all.
    """
    found: dict[tuple[Any, ...], dict[str, Tensor]] = {}
    for number, group in enumerate(groups):
        for param in group["params"]:
            key = (number, param.device, param.dtype, sharding(param))
            found.setdefault(key, {})[names[param]] = param
    return [(key[0], members) for key, members in found.items()]


def complete_groups(
    groups: Iterable[dict[str, Any]], names: Mapping[Tensor, str], defaults: Mapping[str, Any]
) -> None:
    """Name the parameters of regrouped groups and fill in what these lack.

    Raises:
        TalosRuntimeError: the groups do not hold exactly the named parameters.
    """
    every = [param for group in groups for param in group["params"]]
    strange = [tuple(param.shape) for param in every if param not in names]
    lost = [name for param, name in names.items() if param not in set(every)]
    if strange or lost or len(every) != len(names):
        raise TalosRuntimeError(
            "param_groups must hold the parameters that the optimizer was made with, each "
            f"once, lacks {', '.join(lost[:5]) or 'none'}, got others of shapes "
            f"{strange[:5] or 'none'}; make a new optimizer, or call requires_grad_(False) on "
            "parameters that should not be trained"
        )
    for group in groups:
        group["param_names"] = [names[param] for param in group["params"]]
        for key, value in defaults.items():
            group.setdefault(key, value)


def check_not_wrapped(params: Collection[Tensor]) -> None:
    """Refuse parameters that DistributedDataParallel wraps already, whoever holds the wrapper."""
    if not (params and dist.is_available() and dist.is_initialized()):
        return
    if _ddp_holds(params):
        gc.collect()  # of a wrapper that nobody uses any more
        if _ddp_holds(params):
            raise TalosRuntimeError(
                "the optimizer must be made before DistributedDataParallel, which would wait for "
                "gradients of frozen tensors; make SparseAdam first (in Lightning in __init__), "
                "then wrap the model, or drop a wrapper that is not used any more"
            )


def _ddp_holds(params: Iterable[Tensor]) -> bool:
    wrapper = nn.parallel.DistributedDataParallel
    return any(isinstance(module, wrapper) for module in _modules_of(params))


def check_not_flattened(model: nn.Module) -> None:
    """Refuse a model that FSDP1 wraps: its flat parameters have no entries of single weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise TalosTypeError(
            "model must be sharded with fully_shard (FSDP2), got FullyShardedDataParallel, which "
            "flattens weights; replace it by torch.distributed.fsdp.fully_shard"
        )


def check_trainable(name: str, param: Tensor) -> None:
    """Refuse a selected parameter that cannot be trained."""
    if param.is_meta:
        raise TalosTypeError(f"{name} must hold data, got the meta device; materialise it first")
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TalosTypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {param.dtype}"
        )
    if not param.requires_grad:
        raise TalosValueError(
            f"{name} is selected by the mask but has requires_grad=False; "
            "call .requires_grad_() on it or leave it out of the mask; if another SparseAdam froze "
            "it, call that one's release()"
        )


def unselected(params: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the parameters without a selected entry that require a gradient."""
    return {n: param for n, param in params.items() if param not in names and param.requires_grad}


def check_arguments(mask: object, moment_dtype: torch.dtype, seed: int) -> None:
    """Refuse what is not a mask, an unsupported dtype of the moments, and a seed out of range."""
    if not isinstance(mask, Mask):
        found = type(mask).__name__
        raise TalosTypeError(f"mask must be a talos.Mask, got {found}; see talos.calibrate")
    if moment_dtype not in (torch.float32, torch.bfloat16):
        raise TalosTypeError(
            f"moment_dtype must be torch.float32 or torch.bfloat16, got {moment_dtype}"
        )
    if integer("seed", seed, 0, "an integer in [0, 2^32)") >= 2**32:
        raise TalosValueError(f"seed must be an integer in [0, 2^32), got {seed!r}")


def check_hyperparameters(group: Mapping[str, Any], *, read_tensors: bool = False) -> None:
    """Refuse hyper-parameters out of range, as `torch.optim.AdamW` does.

    `read_tensors` also reads a learning rate that is a tensor, which waits for its device.
    """
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise TalosValueError(f"Tensor lr must be 1-element, got {lr.numel()}")
    if not isinstance(lr, Tensor) or read_tensors:
        _check_number("learning rate", lr.item() if isinstance(lr, Tensor) else lr)
    _check_number("epsilon value", group["eps"])
    _check_number("weight_decay value", group["weight_decay"])
    if not isinstance(betas, Iterable) or len(betas := list(betas)) != 2:
        raise TalosTypeError(f"betas must be a pair of numbers, got {group['betas']!r}")
    for i, beta in enumerate(betas):
        _check_number(f"beta parameter at index {i}", beta, below=1.0)


def _check_number(what: str, value: Any, below: float = math.inf) -> None:
    number = as_real(value)
    if number is None:
        raise TalosTypeError(f"Invalid {what}: {value!r}; it must be a number")
    if not 0.0 <= number < below:
        raise TalosValueError(f"Invalid {what}: {value}; it must lie in [0, {below})")
