"""State by parameter, as torch's optimizers hold it; state dicts store it by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosError, TalosValueError
from talos.masks import Mask
from talos.names import resolve_names
from talos.options import as_real

__all__ = ["ARRAYS", "OWN", "Saved", "State", "StateReader", "checked_state", "foreign"]

State = Mapping[str, Any]
"""`step` and arrays `[nnz]` of one parameter; empty before its first step."""

ARRAYS = ("step", "exp_avg", "exp_avg_sq", "master")
"""What a step updates, in the order of a bucket's arrays."""
OWN = (*ARRAYS, "base", "fingerprint")
"""All that an optimizer keeps of a parameter; `talos.optim.base` makes the last two."""


@dataclass(frozen=True)
class Saved:
    """The checked contents of a state dict.

    Attributes:
        groups: the hyper-parameters of each param group.
        states: the state by parameter, in the order of the optimizer's own groups.
        others: what other code keeps in the state.
    """

    groups: list[dict[str, Any]]
    states: dict[Tensor, State]
    others: dict[Any, Any]


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
    digest = found.get("fingerprint")
    if isinstance(digest, Tensor):
        if digest.shape or digest.is_meta or digest.is_floating_point() or digest.is_complex():
            raise TalosValueError(
                f"{what} must hold fingerprint as one integer for {name}, got {digest!r:.100}"
            )
        taken["fingerprint"] = digest
    for key in ("exp_avg", "exp_avg_sq", "master", "base"):
        value = found.get(key)
        if key in ("master", "base") and value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != (nnz,) or value.is_meta:
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            where = " on meta" if isinstance(value, Tensor) and value.is_meta else ""
            raise TalosValueError(
                f"{what} must hold {key} of shape ({nnz},) for {name}, got {shape}{where}"
            )
        if not value.is_floating_point() or value.layout != torch.strided:
            raise TalosValueError(
                f"{what} must hold {key} dense and in floating point, got {value.layout} of "
                f"{value.dtype}"
            )
        taken[key] = value.detach()
    return taken


@dataclass(frozen=True)
class StateReader:
    """Reads state dicts for an optimizer's groups.

    Attributes:
        groups: the optimizer's own.
        defaults: hyper-parameters for groups that lack them, as those of older versions may.
        names: the parameters' names in the mask.
        mask: the entries that are trained.
    """

    groups: Sequence[Mapping[str, Any]]
    defaults: Mapping[str, Any]
    names: Mapping[Tensor, str]
    mask: Mask

    def read(self, state_dict: Mapping[str, Any]) -> Saved:
        """Check all of a state dict and return its contents; the optimizer stays as it is.

        Arrays are as the state dict holds them: `[nnz]` in the mask's order, or DTensors of them.

        Raises:
            TalosValueError: it belongs to another mask, or its groups, names or sizes differ, or
                it is no state dict.
        """
        try:
            return self._read(state_dict)
        except TalosError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TalosValueError(
                "state_dict must be what state_dict() of this optimizer returns, got another "
                f"structure ({error!r:.100})"
            ) from error

    def _read(self, state_dict: Mapping[str, Any]) -> Saved:
        groups = state_dict["param_groups"]
        if len(groups) != len(self.groups):
            raise TalosValueError(
                f"state_dict must have {len(self.groups)} param groups, got {len(groups)}"
            )
        mask = self.mask
        states: dict[Tensor, State] = {}
        others = dict(state_dict["state"])
        for own, group in zip(self.groups, groups, strict=True):
            if group.get("mask") != mask.fingerprint:
                raise TalosValueError(
                    f"state_dict must belong to the mask {mask.fingerprint}, "
                    f"got {group.get('mask', 'the state of another optimizer')}; "
                    "make the optimizer with the mask that was trained"
                )
            keys = self._keys(own, group)
            for param in own["params"]:
                name = self.names[param]
                found = others.pop(keys[param], {})
                states[param] = checked_state(name, found, mask.indices[name].nnz, "state_dict")
                kept = {key: value for key, value in found.items() if key not in OWN}
                others[param] = {key: _like(param, value) for key, value in kept.items()}
        merged = [
            {**self.defaults, **group, "param_names": own["param_names"]}
            for own, group in zip(self.groups, groups, strict=True)
        ]
        return Saved(merged, states, foreign(others))

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


def _like(param: Tensor, value: Any) -> Any:
    """Copy other code's quantity to its parameter's device and dtype, as torch does."""
    if not isinstance(value, Tensor):
        return value
    dtype = param.dtype if value.is_floating_point() else value.dtype
    return value.detach().to(param.device, dtype, copy=True)
