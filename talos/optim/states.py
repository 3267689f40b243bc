"""State by parameter, as torch's optimizers hold it; state dicts store it by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.names import resolve_names
from talos.options import as_real

__all__ = ["OWN", "Saved", "State", "StateReader", "checked_state", "foreign"]

State = Mapping[str, Any]
"""`step` and arrays `[nnz]` of one parameter; empty before its first step."""

OWN = ("step", "exp_avg", "exp_avg_sq", "master")


@dataclass(frozen=True)
class Saved:
    """The checked contents of a state dict.

    Attributes:
        groups: the hyper-parameters of each param group.
        states: the state by parameter, in the order of the optimizer's own groups.
        others: what other code keeps in the state.
        base: the initial weights at the selected entries by name, on the CPU; None: not stored.
        fingerprints: of the whole initial tensors, by name.
    """

    groups: list[dict[str, Any]]
    states: dict[Tensor, State]
    others: dict[Any, Any]
    base: dict[str, Tensor] | None
    fingerprints: dict[str, str]


def foreign(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return what other code keeps in an optimizer's state: by parameter, or under other keys."""
    found = {}
    for key, each in state.items():
        if isinstance(key, Tensor):
            each = {name: value for name, value in each.items() if name not in OWN}
        if each or not isinstance(key, Tensor):
            found[key] = each
    return found


def checked_state(name: str, found: State, nnz: int, what: str) -> dict[str, Any]:
    """Return the optimizer's own part of one parameter's state, `step` as a float.

    Args:
        name: the parameter's name.
        found: its state; an empty one stays empty.
        nnz: how many of its entries are selected.
        what: where the state was found, for the message.

    Raises:
        TalosValueError: a part is missing or has another shape or kind.
    """
    if not found:
        return {}
    step = as_real(found.get("step"))
    if step is None or not step >= 0:
        raise TalosValueError(
            f"{what} must hold step of shape () for {name}, got {found.get('step')!r}"
        )
    taken: dict[str, Any] = {"step": step}
    for key in OWN[1:]:
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


@dataclass(frozen=True)
class StateReader:
    """Reads state dicts for an optimizer's groups.

    Attributes:
        groups: the optimizer's own.
        defaults: hyper-parameters for groups that lack them, as those of older versions may.
        names: the parameters' names in the mask.
        nnz: how many entries of each name are selected.
        mask: the mask's fingerprint.
    """

    groups: Sequence[Mapping[str, Any]]
    defaults: Mapping[str, Any]
    names: Mapping[Tensor, str]
    nnz: Mapping[str, int]
    mask: str

    def read(self, state_dict: Mapping[str, Any]) -> Saved:
        """Check all of a state dict and return its contents; the optimizer stays as it is.

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
        order: list[str] = []  # our names of the saved parameters
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
                states[param] = checked_state(name, found, self.nnz[name], "state_dict")
                others[param] = {key: _like(param, value) for key, value in found.items()}
            by_key = {key: self.names[param] for param, key in keys.items()}
            order += [by_key[key] for key in group["params"]]
        merged = [
            {**self.defaults, **group, "param_names": own["param_names"]}
            for own, group in zip(self.groups, groups, strict=True)
        ]
        base = self._base(state_dict["base"], order) if "base" in state_dict else None
        fingerprints = dict(state_dict.get("fingerprints", {}))
        return Saved(merged, states, foreign(others), base, fingerprints)

    def _keys(self, own: Mapping[str, Any], group: Mapping[str, Any]) -> dict[Tensor, Any]:
        """Return each parameter's key in the saved state: by name, or by place without names."""
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
        """Return the initial weights by name; None if they are on meta, without values.

        A state dict lists them in the order of its parameters; older ones joined those of one
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


def _like(param: Tensor, value: Any) -> Any:
    """Copy other code's quantity to its parameter's device and dtype, as torch does."""
    if not isinstance(value, Tensor):
        return value
    dtype = param.dtype if value.is_floating_point() else value.dtype
    return value.detach().to(param.device, dtype, copy=True)
