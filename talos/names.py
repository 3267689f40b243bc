"""Names of a model's modules and tensors without wrappers, and how other names fit them.

`torch.compile`, DDP, FSDP and checkpointing put a part of their own into the names. A name is first
taken as it is, then without such parts, and without a leading `module.` where every name has it.
"""

import difflib
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from talos.errors import TalosValueError
from talos.tensors import place

__all__ = [
    "match_tensors",
    "named_buffers",
    "named_modules",
    "named_parameters",
    "resolve_names",
    "unwrapped",
    "with_nearest",
]

# Where a wrapper is defined, its class, the attribute that holds the wrapped module. A wrapper
# whose home was never imported wraps nothing, so none is imported for the sake of the question.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
)


def _wrappers() -> dict[type, str]:
    """The classes of wrappers that were imported, each with its attribute for what it wraps."""
    found = [(getattr(sys.modules.get(home), kind, None), name) for home, kind, name in _WRAPPERS]
    return {kind: name for kind, name in found if kind is not None}


def _wrapped_attribute(module: nn.Module, wrappers: Mapping[type, str]) -> str | None:
    """The attribute that holds the wrapped module, or None where `module` wraps nothing."""
    if not isinstance(module, tuple(wrappers)):
        return None
    return next(name for kind, name in wrappers.items() if isinstance(module, kind))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DDP, FSDP and checkpoint wrappers, or `module` itself."""
    wrappers = _wrappers()
    while (attribute := _wrapped_attribute(module, wrappers)) is not None:
        module = getattr(module, attribute)
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` with names as if nothing were wrapped.

    Wrappers (`torch.compile`, DataParallel, DDP, FSDP, activation checkpointing) are known by their
    type: a module that is really called "module" keeps its name.

    Args:
        model: any module.

    Yields:
        Name and module, each module once. A wrapper and what it wraps have the same name.
    """
    seen: set[int] = set()
    wrappers = _wrappers()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        hidden = _wrapped_attribute(module, wrappers)
        for name, child in reversed(module._modules.items()):
            if child is not None:
                own = path if name == hidden else f"{path}.{name}" if path else name
                waiting.append((own, child))


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """The parameters of `model` by names without wrappers, tied ones once, under their first name.

    Tied are parameters that are one memory, also where they are two objects.

    Args:
        model: any module.
        remove_duplicate: False: a tied parameter comes under every one of its names.

    Returns:
        Name and parameter in the order of `model.named_parameters()`.

    Example:
        >>> import torch, talos.params
        >>> model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 3)))
        >>> list(talos.names.named_parameters(model))
        ['0.weight', '0.bias']
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[Hashable] = set()
    for module_name, module in named_modules(model):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            where = place(param)
            if not remove_duplicate or where not in seen:
                seen.add(where)
                found[f"{module_name}.{name}" if module_name else name] = param
    return found


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of `model` by names without wrappers, under every one of their names."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in named_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


# What wrappers call the module inside; no module of a model is called so.
_HIDDEN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def resolve_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Find the known name of each, whatever wrappers the two come from.

    Args:
        names: of parameters.
        known: of a model's parameters.

    Returns:
        The known name of each that has one.

    Example:
        >>> resolve_names(["module._orig_mod.a.weight"], ["a.weight", "a.bias"])
        {'module._orig_mod.a.weight': 'a.weight'}
    """
    names, known = list(names), list(known)
    exact = set(known)
    bare_known = {bare: name for name, bare in zip(known, _bare(known), strict=True)}
    found = {}
    for name, bare in zip(names, _bare(names), strict=True):
        if name in exact:
            found[name] = name
        elif bare in bare_known:
            found[name] = bare_known[bare]
    return found


def _bare(names: Sequence[str]) -> list[str]:
    """Names without what wrappers put into them."""
    bare = [".".join(part for part in name.split(".") if part not in _HIDDEN) for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def match_tensors(
    shapes: Mapping[str, Sequence[int]], params: Mapping[str, Tensor], *, what: str = "mask"
) -> dict[str, Tensor]:
    """Find the parameter of every named shape.

    Args:
        shapes: shape of each wanted tensor.
        params: a model's parameters by name.
        what: whose tensors the shapes are, for the message.

    Returns:
        The parameter of each name in `shapes`, in its order.

    Raises:
        TalosValueError: a name is not in `params` (the nearest names are told), a shape differs, or
            two names are one tied parameter.
    """
    found = resolve_names(shapes, params)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise TalosValueError(
            f"{what} must name parameters of the model, got {len(missing)} that it lacks: "
            + "; ".join(with_nearest(name, params) for name in missing[:5])
            + ("; ..." if len(missing) > 5 else "")
        )
    matched = {name: params[found[name]] for name in shapes}
    differing = [
        f"{name} is {tuple(shape)} in the {what}, {tuple(matched[name].shape)} in the model"
        for name, shape in shapes.items()
        if tuple(shape) != tuple(matched[name].shape)
    ]
    if differing:
        raise TalosValueError(
            f"{what} must have the model's shapes, got {len(differing)} that differ: "
            + "; ".join(differing[:5])
        )
    first: dict[Hashable, str] = {}
    for name, param in matched.items():
        other = first.setdefault(place(param), name)
        if other != name:
            raise TalosValueError(
                f"{what} must name a tied parameter once, got {other} and {name}, which are one "
                "parameter; drop one of them"
            )
    return matched


def with_nearest(name: str, params: Mapping[str, Tensor]) -> str:
    """Say a name that is not known, and the known ones that are most like it.

    Args:
        name: the unknown one.
        params: by the known names.

    Returns:
        For a message.

    Example:
        >>> with_nearest("a.wieght", {"a.weight": Tensor()})
        'a.wieght (nearest: a.weight)'
    """
    nearest = difflib.get_close_matches(name, params, n=2, cutoff=0.5)
    return f"{name} (nearest: {', '.join(nearest)})" if nearest else name
