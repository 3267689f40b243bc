"""State by parameter, as torch's optimizers have it: anybody changes it, files hold it by name."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.names import resolve_names
from talos.options import as_real

__all__ = ["Saved", "State", "StateReader", "Watched", "foreign", "state_of", "watched"]

State = Mapping[str, Any]
"""`step` and arrays `[nnz]`, of one parameter; none: it has taken no step."""

MOMENTS = ("exp_avg", "exp_avg_sq")
OWN = ("step", *MOMENTS, "master")


class Watched(defaultdict[Any, Any]):
    """A dictionary that notes when somebody changes it.

    Args:
        changes: to which it appends itself then.
        content: what it holds.
    """

    def __init__(self, changes: list[Any], content: Mapping[Any, Any]) -> None:
        super().__init__(dict, content)
        self._changes = changes


def _noting(name: str) -> Any:
    def method(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self._changes.append(self)
        return getattr(defaultdict, name)(self, *args, **kwargs)

    return method


for _name in (
    *("__delitem__", "__ior__", "__missing__", "__setitem__", "clear", "pop", "popitem"),
    *("setdefault", "update"),
):
    setattr(Watched, _name, _noting(_name))


def watched(
    changes: list[Any], views: Mapping[Tensor, State], others: Mapping[Any, State]
) -> Watched:
    """State as an optimizer shows it.

    Args:
        changes: receives what somebody changes.
        views: the optimizer's own quantities by parameter.
        others: what was shown before, of which foreign quantities are kept.

    Returns:
        Watched dictionaries by parameter, in a watched one.
    """
    inner = {
        param: Watched(changes, {**others.get(param, {}), **own}) for param, own in views.items()
    }
    beside = {key: each for key, each in others.items() if not isinstance(key, Tensor)}
    return Watched(changes, {**beside, **inner})


def foreign(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What others keep in an optimizer's state: quantities of parameters, and whole keys."""
    found = {}
    for key, each in state.items():
        if isinstance(key, Tensor):
            each = {name: value for name, value in each.items() if name not in OWN}
        if each or not isinstance(key, Tensor):
            found[key] = each
    return found


@dataclass(frozen=True)
class Saved:
    """What a state dict holds, checked.

    Attributes:
        groups: the hyper-parameters of each param group.
        states: the state by parameter, in the order of the own groups.
        others: what others keep beside it.
        base: the initial weights at the selected entries by name, on the CPU; None: not held.
        fingerprints: of the whole tensors that those come from.
    """

    groups: list[dict[str, Any]]
    states: dict[Tensor, State]
    others: dict[Any, Any]
    base: dict[str, Tensor] | None
    fingerprints: dict[str, str]


def state_of(name: str, found: State, nnz: int, what: str) -> dict[str, Any]:
    """Check one parameter's state.

    Args:
        name: the parameter's.
        found: its state.
        nnz: how many of its entries are selected.
        what: whose state it is, for the message.

    Returns:
        Its quantities, `step` as a float; empty where there is none.

    Raises:
        TalosValueError: a part is missing or has another form.
    """
    if not found:
        return {}
    step = as_real(found.get("step"))
    if step is None or not step >= 0:
        raise TalosValueError(
            f"{what} must hold step of shape () for {name}, got {found.get('step')!r}"
        )
    taken: dict[str, Any] = {"step": step}
    for key in (*MOMENTS, "master"):
        value = found.get(key)
        if key == "master" and value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != (nnz,) or value.is_meta:
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            raise TalosValueError(
                f"{what} must hold {key} of shape ({nnz},) for {name}, got {shape}"
            )
        if not value.is_floating_point():
            raise TalosValueError(f"{what} must hold {key} in floating point, got {value.dtype}")
        taken[key] = value.detach()
    return taken


def _beside(param: Tensor, value: Any) -> Any:
    """A quantity that others keep of a parameter, on its device and in its dtype, as torch does."""
    if not isinstance(value, Tensor):
        return value
    dtype = param.dtype if value.is_floating_point() else value.dtype
    return value.detach().to(param.device, dtype, copy=True)


@dataclass(frozen=True)
class StateReader:
    """Reads state dicts for an optimizer's groups.

    Attributes:
        groups: the optimizer's own.
        defaults: what a group has where a state dict of an older version says nothing.
        names: of the parameters in the mask.
        nnz: how many entries of each name are selected.
        mask: its fingerprint.
    """

    groups: Sequence[Mapping[str, Any]]
    defaults: Mapping[str, Any]
    names: Mapping[Tensor, str]
    nnz: Mapping[str, int]
    mask: str

    def read(self, state_dict: Mapping[str, Any]) -> Saved:
        """Check all of a state dict; nothing of it is taken over yet.

        Raises:
            TalosValueError: it belongs to another mask, or its groups, names or sizes differ.
        """
        groups = state_dict["param_groups"]
        if len(groups) != len(self.groups):
            raise TalosValueError(
                f"state_dict must have {len(self.groups)} param groups, got {len(groups)}"
            )
        states: dict[Tensor, State] = {}
        others = dict(state_dict["state"])
        order: list[str] = []  # of the saved parameters, by our names
        for own, group in zip(self.groups, groups, strict=True):
            if group.get("mask") != self.mask:
                raise TalosValueError(
                    f"state_dict must belong to the mask {self.mask}, "
                    f"got {group.get('mask', 'the state of another optimizer')}; "
                    "make the optimizer with the mask that was trained"
                )
            keys = self._keys(own, group)
            for param in own["params"]:
                name = self.names[param]
                found = others.pop(keys[param], {})
                states[param] = state_of(name, found, self.nnz[name], "state_dict")
                others[param] = {key: _beside(param, value) for key, value in found.items()}
            by_key = {key: self.names[param] for param, key in keys.items()}
            order += [by_key[key] for key in group["params"]]
        base = self._base(state_dict["base"], order) if "base" in state_dict else None
        merged = [
            {**self.defaults, **group, "params": group["params"], "param_names": own["param_names"]}
            for own, group in zip(self.groups, groups, strict=True)
        ]
        return Saved(
            merged, states, foreign(others), base, dict(state_dict.get("fingerprints", {}))
        )

    def _keys(self, own: Mapping[str, Any], group: Mapping[str, Any]) -> dict[Tensor, Any]:
        """The key in the saved state of each own parameter: by name, by place where it has none."""
        params, keys = own["params"], list(group["params"])
        if len(keys) != len(params):
            raise TalosValueError(
                f"state_dict must have {len(params)} parameters in this group, got {len(keys)}"
            )
        if "param_names" not in group:
            return dict(zip(params, keys, strict=True))
        known = resolve_names(group["param_names"], own["param_names"])
        saved = {
            known[name]: key
            for name, key in zip(group["param_names"], keys, strict=True)
            if name in known
        }
        lacking = [name for name in own["param_names"] if name not in saved]
        if lacking:
            raise TalosValueError(
                f"state_dict must have the parameters of this group, lacks {', '.join(lacking[:5])}"
            )
        return {param: saved[name] for name, param in zip(own["param_names"], params, strict=True)}

    def _base(self, base: Sequence[Tensor], order: Sequence[str]) -> dict[str, Tensor] | None:
        """The initial weights by name; None where their values are lost.

        A state dict lists them in the order of its parameters; version 0.1 joined those of a
        group, device and dtype.
        """
        base = [part.detach() for part in base]
        if any(part.is_meta for part in base):
            return None
        sizes = [self.nnz[name] for name in order]
        if [part.shape for part in base] != [(size,) for size in sizes]:
            dtypes = {part.dtype for part in base}
            if sum(part.numel() for part in base) != sum(sizes) or len(dtypes) > 1:
                raise TalosValueError("state_dict must hold base weights of the optimizer's shapes")
            base = list(torch.cat([part.reshape(-1).cpu() for part in base]).split(sizes))
        return {name: part.cpu() for name, part in zip(order, base, strict=True)}
