"""Names of modules and parameters as if nothing wrapped the model, and how names are matched.

`torch.compile`, DataParallel, DDP, FSDP and activation checkpointing put a part of their own into
names. Here these parts are left out. Wrappers are recognised by their type: a module that is really
called "module" keeps its name.

A class of your own that only wraps a model says so in its attribute `talos_wraps`: the name of the
attribute that holds the model. Its weights then have the model's own names, so that a mask or a
vector of the wrapper fits the model alone. The names of the wrapper's `state_dict` are found, too.
`talos` still calls the wrapper.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.files import Checkpoint
from talos.tensors import first_names, place

__all__ = [
    "check_module",
    "listed",
    "match_prefixes",
    "match_tensors",
    "named_buffers",
    "named_modules",
    "named_parameters",
    "named_tensors",
    "renamed",
    "resolve_names",
    "unwrapped",
    "with_nearest",
]

T = TypeVar("T", bound=Tensor)

# Where a wrapper is defined, its class, and its attribute for the wrapped module. A wrapper whose
# home was never imported wraps nothing, so nothing is imported here.
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
_HIDDEN = {name for _, _, name in _WRAPPERS} - {"module"}  # no module of a model has such a name


def check_module(model: object, name: str = "model") -> None:
    """Refuse a model that is no module.

    Raises:
        TalosTypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TalosTypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def _wrappers() -> dict[type, str]:
    """Return the imported classes of wrappers, each with its attribute for the wrapped module."""
    found = [(getattr(sys.modules.get(home), kind, None), name) for home, kind, name in _WRAPPERS]
    return {kind: name for kind, name in found if kind is not None}


def _wrapped_attribute(module: nn.Module, wrappers: Mapping[type, str]) -> str | None:
    """Return the attribute that holds the wrapped module; None if `module` wraps nothing."""
    return next((name for kind, name in wrappers.items() if isinstance(module, kind)), None)


def _hidden_name(module: nn.Module, wrappers: Mapping[type, str]) -> str | None:
    """Return the attribute that is left out of names; None if there is none."""
    if (found := _wrapped_attribute(module, wrappers)) is not None:
        return found
    name: object = getattr(type(module), "talos_wraps", None)
    if name is not None and not (isinstance(name, str) and name in module._modules):
        raise TalosValueError(
            f"talos_wraps must name a module that {type(module).__name__} holds "
            f"({', '.join(module._modules) or 'it holds none'}), got {name!r}"
        )
    return name


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DDP, FSDP and checkpoint wrappers.

    Raises:
        TalosTypeError: `model` is no module.
    """
    check_module(model)
    wrappers = _wrappers()
    while (attribute := _wrapped_attribute(model, wrappers)) is not None:
        model = getattr(model, attribute)
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `model.named_modules()` yields, with names as if nothing were wrapped.

    Args:
        model: any module.

    Yields:
        Name and module, each module once. A wrapper and what it wraps have the same name.

    Raises:
        TalosTypeError: `model` is no module.
        TalosValueError: the `talos_wraps` of a class names none of its modules.
    """
    return _walk(model, _hidden_name)


def _walk(
    model: nn.Module, hidden_name: Callable[[nn.Module, Mapping[type, str]], str | None]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once, by a name without what `hidden_name` returns."""
    check_module(model)
    seen: set[int] = set()
    wrappers = _wrappers()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        hidden = hidden_name(module, wrappers)
        for name, child in reversed(module._modules.items()):
            if child is not None:
                own = path if name == hidden else f"{path}.{name}" if path else name
                waiting.append((own, child))


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by names without wrappers.

    A tied parameter comes once, under its first name. Parameters are tied if they are one memory,
    even as two objects.

    Args:
        model: any module.
        remove_duplicate: False: a tied parameter comes under every one of its names, and one of a
            class with `talos_wraps` under that in its `state_dict`, too.

    Returns:
        Name and parameter in the order of `model.named_parameters()`.

    Raises:
        TalosTypeError: `model` is no module.
        TalosValueError: a wrapper and what it wraps have two parameters of one name, or the
            `talos_wraps` of a class names none of its modules.

    Example:
        >>> model = nn.DataParallel(nn.Sequential(nn.Linear(2, 3)))
        >>> list(named_parameters(model))
        ['0.weight', '0.bias']
        >>> class Wrapper(nn.Module):
        ...     talos_wraps = "inner"
        ...
        ...     def __init__(self, inner):
        ...         super().__init__()
        ...         self.inner = inner
        >>> list(named_parameters(Wrapper(nn.Linear(2, 3))))
        ['weight', 'bias']
    """
    found = _named(model, lambda module: module._parameters, every=not remove_duplicate)
    if not remove_duplicate:
        return found
    return {name: found[name] for name in dict.fromkeys(first_names(found).values())}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model by names without wrappers, under every one of their names."""
    return _named(model, lambda module: module._buffers, every=True)


def _named(
    model: nn.Module, own: Callable[[nn.Module], Mapping[str, T | None]], *, every: bool
) -> dict[str, T]:
    """Return what modules hold themselves by name, with `every` by those of state dicts, too."""
    found: dict[str, T] = {}
    for full, each, kind in _held(named_modules(model), own):
        if full in found and place(found[full]) != place(each):
            raise TalosValueError(
                f"model must give each tensor a name of its own, got two of {full}; "
                f"rename that of {kind}, or drop talos_wraps"
            )
        found[full] = each
    if every:  # the parts of torch's own wrappers need no name, `resolve_names` leaves them out
        for full, each, _ in _held(_walk(model, _wrapped_attribute), own):
            found.setdefault(full, each)
    return found


def _held(
    modules: Iterable[tuple[str, nn.Module]],
    own: Callable[[nn.Module], Mapping[str, T | None]],
) -> Iterator[tuple[str, T, str]]:
    """Yield what modules hold themselves, with its name and the class that holds it."""
    for path, module in modules:
        for name, each in own(module).items():
            if each is not None:
                yield f"{path}.{name}" if path else name, each, type(module).__name__


def named_tensors(
    what: str, model: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
) -> Mapping[str, Tensor]:
    """Return the parameters and buffers of a model under all their names.

    Args:
        what: the model's name, for the message.
        model: a module, its state dict, of which other entries than tensors are left out, or a
            checkpoint, whose tensors are not read yet.

    Raises:
        TalosTypeError: it is something else.
    """
    if isinstance(model, nn.Module):
        return {**named_buffers(model), **named_parameters(model, remove_duplicate=False)}
    if isinstance(model, str | os.PathLike):
        return Checkpoint(model)
    if not isinstance(model, Mapping):
        raise TalosTypeError(
            f"{what} must be a module, a state dict or a checkpoint, got {type(model).__name__}"
        )
    if isinstance(model, Checkpoint):
        return model
    return {name: each for name, each in model.items() if isinstance(each, Tensor)}


def resolve_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Find the known name of each name, whatever wrappers the two come from.

    A name is first taken as it is, then without the parts of wrappers, and without a leading
    `module.` if every name has it.

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


def match_prefixes(
    shapes: Mapping[str, Sequence[int]], known: Mapping[str, Sequence[int]]
) -> list[tuple[str, str]]:
    """Find the prefixes by which names differ from known ones of the same shapes.

    As transformers' `base_model_prefix`, the prefix is left out of every name or put before it.
    Only if neither fits, one is replaced by another; a numbered layer is never taken for another.

    Args:
        shapes: of tensors by name, at least one.
        known: shapes of a model's parameters by name.

    Returns:
        What every name begins with, and what it is replaced by; more than one pair is ambiguous.

    Example:
        >>> match_prefixes({"model.a.weight": (2,)}, {"a.weight": (2,), "b.weight": (2,)})
        [('model.', '')]
    """
    parts = next(iter(shapes)).split(".")
    left_out = [(".".join(parts[:cut]) + ".", "") for cut in range(1, len(parts))]
    ends = [("", ".".join(parts)), *((old, ".".join(parts)[len(old) :]) for old, _ in left_out)]
    pairs = [
        (old, name.removesuffix(end)) for old, end in ends for name in known
        if name.endswith(f".{end}")
    ]  # fmt: skip

    def fits(pair: tuple[str, str]) -> bool:
        old, new = pair
        return all(
            name.startswith(old) and tuple(known.get(new + name[len(old) :], (-1,))) == tuple(shape)
            for name, shape in shapes.items()
        )

    def replaces(old: str, new: str) -> bool:
        steps = (old + new).split(".")
        same_end = old.split(".")[-2:-1] == new.split(".")[-2:-1]
        return bool(old) and not same_end and not any(step.isdigit() for step in steps)

    one = [pair for pair in [*left_out, *(p for p in pairs if not p[0])] if fits(pair)]
    return one or [pair for pair in pairs if replaces(*pair) and fits(pair)]


def _bare(names: Sequence[str]) -> list[str]:
    """Return names without the parts of wrappers."""
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
        what: the owner of the shapes, for the message.

    Returns:
        The parameter of each name in `shapes`, in its order.

    Raises:
        TalosValueError: a name is not in `params` (the message lists the nearest names), a shape
            differs, or two names are one tied parameter.
    """
    found = resolve_names(shapes, params)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise TalosValueError(
            f"{what} must name parameters of the model, got {len(missing)} that it lacks: "
            + listed(missing, params)
            + (f"; {len(missing) - 5} more" if len(missing) > 5 else "")
            + f"; {_remedy(what, params)}"
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


def _remedy(what: str, params: Iterable[str]) -> str:
    """Return what to do about names that a model lacks."""
    if what == "patch":  # it belongs to one model, and has no `rename`
        return "take a patch of this model"
    if any(".base_layer." in name for name in params):
        return (
            "the model holds an adapter of PEFT, which changes names: unload() it, or "
            f"call rename on the {what}, as docs/trainers.md shows"
        )
    return f"take a {what} of this model, or call rename on this one"


def renamed(
    names: Sequence[str], mapping: Mapping[str, str], *, strict: bool = True
) -> dict[str, str]:
    r"""Return the new name of each name.

    Args:
        names: of tensors.
        mapping: new names by old ones or by regular expressions; the first that fits renames.
        strict: refuse a key that fits no name.

    Raises:
        TalosTypeError: `mapping` is no mapping of texts.
        TalosValueError: a key fits no name, is no regular expression, or two names become one.

    Example:
        >>> renamed(["a.q", "a.k"], {"a.q": "b", r"\.k$": ".key"})
        {'a.q': 'b', 'a.k': 'a.key'}
    """
    if not isinstance(mapping, Mapping) or not all(
        isinstance(text, str) for pair in mapping.items() for text in pair
    ):
        raise TalosTypeError(f"names must map texts to texts, got {mapping!r}")
    found, used = {name: name for name in names}, set()
    for name in names:
        for old, new in mapping.items():
            if old in found and old != name:
                continue
            try:
                other, count = (new, 1) if old == name else re.subn(old, new, name)
            except (re.error, IndexError) as error:
                raise TalosValueError(
                    f"names must hold names or regular expressions, got {old!r} to {new!r} "
                    f"({error}); escape special characters with a backslash"
                ) from None
            if count:
                used.add(old)
                found[name] = other
                break
    unused = [old for old in mapping if old not in used]
    if strict and unused:
        raise TalosValueError(
            f"names must fit tensors, got {len(unused)} that fit none or only renamed ones: "
            + "; ".join(with_nearest(old, found) for old in unused[:5])
        )
    first: dict[str, str] = {}
    for name, new in found.items():
        if first.setdefault(new, name) != name or not new:
            raise TalosValueError(
                f"names must give each tensor a name of its own, got {new!r} for {first[new]} and "
                f"{name}; choose another"
            )
    return found


def listed(names: Sequence[str], known: Iterable[str]) -> str:
    """Return the first five unknown names for a message, each with its nearest known ones."""
    known = list(known)
    return "; ".join(with_nearest(name, known) for name in names[:5])


def with_nearest(name: str, params: Iterable[str]) -> str:
    """Return an unknown name with the known ones that are most like it, for a message.

    Example:
        >>> with_nearest("a.wieght", {"a.weight": Tensor()})
        'a.wieght (nearest: a.weight)'
    """
    nearest = difflib.get_close_matches(name, params, n=2, cutoff=0.5)
    return f"{name} (nearest: {', '.join(nearest)})" if nearest else name
