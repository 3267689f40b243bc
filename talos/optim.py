"""AdamW that trains, and keeps state for, the selected entries of a model only.

The update is that of `talos_kernels.sparse_adam`: decoupled weight decay, bias-corrected moments.
State of a selected entry: exp_avg and exp_avg_sq, 8 bytes, 12 with the float32 master that bf16 and
fp16 weights have; plus the compressed index. A tensor without a selected entry has no state and is
frozen, so that autograd computes no gradient for it.

The state of all tensors of one group, device and dtype is one flat array a quantity, so that a step
is one launch; `optimizer.state[param]` holds views into those arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from .buckets import Bucket
from .errors import TalosRuntimeError, TalosTypeError, TalosValueError
from .fingerprints import fingerprints
from .masks import Mask
from .matching import match_tensors
from .params import named_parameters
from .task_vectors import TaskVector

__all__ = ["SparseAdam"]

NamedParams = Iterable[tuple[str, Tensor]]


class SparseAdam(torch.optim.Optimizer):
    """AdamW on the weights that a mask selects (`torch.optim.SparseAdam` is for sparse gradients).

    Args:
        model: a module, its `named_parameters()`, or param groups `{"params": named parameters,
            "lr": ...}`.
        mask: which entries are trained.
        lr: learning rate; a tensor is read on its device, without a sync.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay of the selected entries.
        maximize: ascend instead of descend.
        strict: refuse a model with parameters that the mask does not cover, instead of freezing
            them.

    Parameters without a selected entry are frozen (`requires_grad=False`); `release()` gives them
    back. With a full mask the weights are those of `torch.optim.AdamW`.

    Raises:
        TalosValueError: the mask selects nothing, names what the model lacks, or has other shapes;
            a selected parameter has requires_grad=False; a hyper-parameter is out of range.
        TalosTypeError: a selected parameter is not float32, bfloat16 or float16, or is on meta.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> mask = Mask.from_dense({"weight": torch.tensor([[True, False], [False, True]])})
        >>> optimizer = SparseAdam(model, mask, lr=0.1)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.detach() != before
        tensor([[ True, False],
                [False,  True]])
    """

    # GradScaler hands over its scale and inf flag as tensors instead of reading them on the host.
    _step_supports_amp_scaling = True
    # What deepcopy and pickle keep beside torch's own; the hooks are dropped, as torch does.
    _KEPT = ("_mask", "_names", "_buckets", "_frozen", "_fingerprints", "_incoming")

    def __init__(
        self,
        model: nn.Module | NamedParams | Iterable[dict[str, Any]],
        mask: Mask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        strict: bool = False,
    ) -> None:
        groups = _named_groups(model)
        params = {name: param for group in groups for name, param in group["params"]}
        if mask.nnz == 0:
            raise TalosValueError("mask must select at least one entry: no weight selected")
        aliases: Mapping[str, Tensor] = params
        if isinstance(model, nn.Module):
            aliases = named_parameters(model, remove_duplicate=False)
        matched = match_tensors(mask.shapes, aliases)
        if strict and (unknown := [n for n, p in params.items() if not _holds(matched, p)]):
            raise TalosValueError(
                f"mask must cover every parameter when strict, lacks {len(unknown)}: "
                f"{', '.join(unknown[:5])}"
            )
        self._mask = mask
        self._names = {p: n for n, p in matched.items() if mask.indices[n].nnz}
        for param, name in self._names.items():
            _check_trainable(name, param)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "mask": mask.fingerprint,
        }
        for group in groups:
            _check_hyperparameters({**defaults, **group})
        self._buckets: list[Bucket] = []
        self._frozen: list[Tensor] = []
        self._incoming: list[tuple[Tensor, Tensor]] = []
        self._fingerprints = fingerprints({n: p for p, n in self._names.items()})
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add named parameters that the mask covers, with hyper-parameters of their own.

        Args:
            param_group: `{"params": named parameters, ...}`; those without a selected entry are
                frozen.

        Raises:
            TalosValueError: a hyper-parameter is out of range.
            TalosTypeError: the parameters have no names.
        """
        (group,) = _named_groups([param_group])
        _check_hyperparameters({**self.defaults, **group})
        chosen = [(name, p) for name, p in group["params"] if p in self._names]
        super().add_param_group({**group, "params": chosen})
        for _, param in group["params"]:
            if param not in self._names and param.requires_grad:
                self._frozen.append(param.requires_grad_(False))
        tensors: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for _, param in chosen:
            key = (param.device, param.dtype)
            tensors.setdefault(key, {})[self._names[param]] = param
        for members in tensors.values():
            bucket = Bucket.create(len(self.param_groups) - 1, members, self._mask)
            self._buckets.append(bucket)
            self.state.update(bucket.views())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the selected entries; a parameter whose gradient is None is passed over.

        Args:
            closure: computes the loss and the gradients.

        Returns:
            What `closure` returned.

        Raises:
            TalosRuntimeError: a parameter was moved, cast or reshaped since the optimizer was made.
            TalosTypeError: a gradient is sparse. Nothing is written in either case.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket in self._buckets:
            bucket.check()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for bucket in self._buckets:
            bucket.step(self.param_groups[bucket.group], scale, found_inf)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients so that the norm over the selected entries is at most `max_norm`.

        Args:
            max_norm: the largest norm let through.
            error_if_nonfinite: raise where the norm is NaN or infinite; reads it on the host.

        Returns:
            The norm before clipping, float32 0-dim.

        Raises:
            TalosValueError: `max_norm` is not positive.
            TalosRuntimeError: the norm is NaN or infinite and `error_if_nonfinite` is set; no
                gradient is changed then.
        """
        if not max_norm > 0:
            raise TalosValueError(f"max_norm must be positive, got {max_norm}")
        for bucket in self._buckets:
            bucket.check()
        squares = [bucket.gather_gradients()[1] for bucket in self._buckets]
        device = squares[0].device
        norm = torch.stack([square.to(device) for square in squares]).sum().sqrt()
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise TalosRuntimeError(
                f"the gradient norm over the selected entries is {float(norm)}; "
                "lower the learning rate, or pass error_if_nonfinite=False to go on"
            )
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for bucket in self._buckets:
            grads = [p.grad for p in bucket.params.values() if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, coefficient.to(grads[0].device))
        return norm

    def task_vector(self) -> TaskVector:
        """What training has changed: current minus initial weights, at the selected entries.

        Returns:
            float32 values on the CPU, over the optimizer's mask; of bf16 and fp16 weights, the
            masters' change.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.ones(1, 2) > 0})
            >>> optimizer = SparseAdam(model, mask, lr=0.5)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.task_vector().values
            tensor([-0.5000, -0.5000])
        """
        deltas: dict[str, Tensor] = {}
        for bucket in self._buckets:
            deltas.update(bucket.deltas())
        empty = torch.zeros(0)
        values = torch.cat([deltas.get(name, empty) for name in self._mask.names])
        return TaskVector(
            self._mask, values, fingerprints=self._fingerprints, metadata={"method": "talos"}
        )

    def release(self) -> None:
        """Give the tensors that were frozen for lack of a selected entry back to training."""
        for param in self._frozen:
            param.requires_grad_(True)
        self._frozen.clear()

    @property
    def mask(self) -> Mask:
        """The selection that is trained."""
        return self._mask

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter, the groups, and what `task_vector` measures from.

        Returns:
            torch's dictionary and two keys more: `base`, the initial weights at the selected
            entries (one flat CPU tensor for each group, device and dtype), and `fingerprints`.
        """
        state = super().state_dict()
        bases = [bucket.base for bucket in self._buckets]
        return {**state, "base": bases, "fingerprints": dict(self._fingerprints)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state that another optimizer with the same mask saved.

        Args:
            state_dict: what `state_dict()` returned; it is copied.

        Raises:
            TalosValueError: it belongs to another mask, or its groups or sizes differ. The state is
                left as it was then.
        """

        def check_and_take(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # Runs after the caller's own hooks. torch would cast the state to each weight's dtype,
            # so it is handed an empty one, and __setstate__ copies what was taken.
            self._incoming = self._match_state(state_dict)
            return {**state_dict, "state": {}}

        handle = self.register_load_state_dict_pre_hook(check_and_take)
        try:
            super().load_state_dict(state_dict)
            self._fingerprints = {**state_dict.get("fingerprints", self._fingerprints)}
        finally:
            handle.remove()
            self._incoming = []

    def _match_state(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of own and saved state tensors, in a list that is complete or not returned."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise TalosValueError(
                f"state_dict must have {len(self.param_groups)} param groups, got {len(groups)}"
            )
        pairs = []
        for own_group, group in zip(self.param_groups, groups, strict=True):
            if group.get("mask") != self._mask.fingerprint:
                raise TalosValueError(
                    f"state_dict must belong to the mask {self._mask.fingerprint}, "
                    f"got {group.get('mask', 'the state of another optimizer')}; "
                    "make the optimizer with the mask that was trained"
                )
            if len(group["params"]) != len(own_group["params"]):
                raise TalosValueError(
                    f"state_dict must have {len(own_group['params'])} parameters in this group, "
                    f"got {len(group['params'])}"
                )
            for param, key in zip(own_group["params"], group["params"], strict=True):
                saved = state_dict["state"].get(key, {})
                for name, own in self.state[param].items():
                    if name not in saved or saved[name].shape != own.shape:
                        found = tuple(saved[name].shape) if name in saved else "nothing"
                        raise TalosValueError(
                            f"state_dict must hold {name} of shape {tuple(own.shape)} for "
                            f"{self._names[param]}, got {found}"
                        )
                    pairs.append((own, saved[name]))
        return pairs + self._match_bases(state_dict)

    def _match_bases(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of own and saved initial weights; none where the saver dropped them."""
        saved = state_dict.get("base", [])
        own = [bucket.base for bucket in self._buckets]
        if saved and [base.shape for base in saved] != [base.shape for base in own]:
            raise TalosValueError("state_dict must hold base weights of the optimizer's shapes")
        return list(zip(own, saved, strict=False))

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep; the views in `state` are made again from the buckets."""
        kept = {name: getattr(self, name) for name in self._KEPT if name != "_names"}
        names = list(self._names.items())
        return {**super().__getstate__(), "state": {}, "_names": names, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the optimizer from `__getstate__`, or take over groups in `load_state_dict`."""
        if "_names" in state:
            state = {**state, "_names": dict(state["_names"])}
        super().__setstate__(state)
        for bucket in self._buckets:
            self.state.update(bucket.views())
        with torch.no_grad():
            for own, saved in self._incoming:
                own.copy_(saved)


def _holds(matched: Mapping[str, Tensor], param: Tensor) -> bool:
    return any(param is other for other in matched.values())


def _named_groups(
    model: nn.Module | NamedParams | Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Param groups of `(name, parameter)` pairs."""
    if isinstance(model, nn.Module):
        return [{"params": list(named_parameters(model).items())}]
    items: list[Any] = list(model)
    if not items:
        raise TalosValueError("model must have parameters, got none")
    groups = items if isinstance(items[0], dict) else [{"params": items}]
    return [{**group, "params": _pairs(group)} for group in groups]


def _pairs(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    params = group["params"]
    pairs = list(params.items() if isinstance(params, Mapping) else params)
    if "param_names" in group:
        pairs = list(zip(group["param_names"], pairs, strict=True))
    if not all(isinstance(pair, tuple) for pair in pairs):
        raise TalosTypeError(
            "params must be (name, parameter) pairs, got bare tensors; "
            "pass the model or model.named_parameters()"
        )
    return pairs


def _check_trainable(name: str, param: Tensor) -> None:
    if param.is_meta:
        raise TalosTypeError(f"{name} must hold data, got the meta device; materialise it first")
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TalosTypeError(f"{name} must be float32, bfloat16 or float16, got {param.dtype}")
    if not param.requires_grad:
        raise TalosValueError(
            f"{name} is selected by the mask but has requires_grad=False; "
            "call .requires_grad_() on it or leave it out of the mask"
        )


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Ranges and wording of `torch.optim.AdamW`."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise TalosValueError(f"Tensor lr must be 1-element, got {lr.numel()}")
    elif not (math.isfinite(lr) and lr >= 0.0):
        raise TalosValueError(f"Invalid learning rate: {lr}; it must be finite and >= 0")
    if not (math.isfinite(group["eps"]) and group["eps"] >= 0.0):
        raise TalosValueError(f"Invalid epsilon value: {group['eps']}; it must be finite and >= 0")
    for i, beta in enumerate(group["betas"]):
        if not 0.0 <= beta < 1.0:
            raise TalosValueError(f"Invalid beta parameter at index {i}: {beta}; want [0, 1)")
    decay = group["weight_decay"]
    if not (math.isfinite(decay) and decay >= 0.0):
        raise TalosValueError(f"Invalid weight_decay value: {decay}; it must be finite and >= 0")
