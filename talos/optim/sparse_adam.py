"""AdamW that trains, and keeps state for, the selected entries of a model only.

The update is that of `talos_kernels.sparse_adam`: decoupled weight decay, bias-corrected moments.
State of a selected entry: exp_avg and exp_avg_sq, 8 bytes (4 in bf16), and 4 more for the float32
master that bf16 and fp16 weights have; plus the compressed index. A tensor without a selected entry
has no state and is frozen, so that autograd computes no gradient for it.

The state of all tensors of one group, device and dtype is one flat array a quantity, so that a step
is one launch; `optimizer.state[param]` holds views into those arrays. Whoever replaces or clears
what `state` holds changes the optimizer's, as with torch's own. Until the first step the state
follows its parameters to another device or dtype.
"""

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.names import match_tensors, named_parameters
from talos.optim.clipping import Clipping
from talos.optim.compaction import compact
from talos.optim.flat_state import FlatState
from talos.optim.param_groups import (
    NamedParams,
    by_name,
    check_hyperparameters,
    check_moments,
    check_not_wrapped,
    check_trainable,
    module_of,
    named_groups,
    several_processes,
)
from talos.optim.states import Saved, State, StateReader, Watched, foreign, state_of, watched
from talos.optim.watching import warn_of_no_gradient, watch_frozen
from talos.params import check_one_memory
from talos.task_vectors import TaskVector
from talos.task_vectors.fingerprints import fingerprint
from talos.tensors import WatchedBuffers, place

__all__ = ["SparseAdam"]

_logger = logging.getLogger(__name__)


class SparseAdam(torch.optim.Optimizer):
    """AdamW on the weights that a mask selects (`torch.optim.SparseAdam` is for sparse gradients).

    Args:
        model: a module, its `named_parameters()`, or param groups `{"params": named parameters,
            "lr": ...}`; bare parameters, as trainers hand them over, have their names in the module
            that holds them.
        mask: which entries are trained.
        lr: learning rate; a tensor is read on its device, without a sync. A CUDA graph reads it at
            every replay, and keeps a number that was uploaded before it was captured.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay of the selected entries.
        maximize: ascend instead of descend.
        moment_dtype: float32, or bfloat16 for half the state: its moments are rounded
            stochastically.
        seed: of that rounding's noise.
        strict: refuse a model with parameters that the mask does not cover, instead of freezing
            them.

    Parameters without a selected entry are frozen (`requires_grad=False`); `release()` gives them
    back. With a full mask the weights are those of `torch.optim.AdamW`. What `task_vector` measures
    from, the initial weights at the selected entries, is kept on the CPU in the weights' dtype.

    Raises:
        TalosValueError: the mask selects nothing, names what the model lacks, or has other shapes;
            a selected parameter has requires_grad=False; a hyper-parameter is out of range.
        TalosTypeError: a selected parameter is not float32, bfloat16, float16 or float64, is on
            meta, or is sharded.
        TalosRuntimeError: the model was wrapped in DistributedDataParallel before its tensors were
            frozen.

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
    _KEPT = (
        *("_mask", "_names", "_buckets", "_untrained", "_fingerprints"),
        *("_base_known", "_complete", "_stepped", "_trained"),
    )

    def __init__(
        self,
        model: nn.Module | NamedParams | Iterable[Tensor] | Iterable[dict[str, Any]],
        mask: Mask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        if not isinstance(mask, Mask):
            found = type(mask).__name__
            raise TalosTypeError(f"mask must be a talos.Mask, got {found}; see talos.calibrate")
        check_moments(moment_dtype, seed)
        groups = named_groups(model, mask.names)
        params = by_name(groups)
        if mask.nnz == 0:
            raise TalosValueError("mask must select at least one entry: no weight selected")
        aliases: Mapping[str, Tensor] = params
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
        self._mask = mask
        self._names = {p: n for n, p in matched.items() if mask.indices[n].nnz}
        for param, name in self._names.items():
            check_trainable(name, param)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "seed": seed,
            "mask": mask.fingerprint,
        }
        for group in groups:
            check_hyperparameters({**defaults, **group}, read_tensors=True)
        self._untrained = {
            name: param
            for name, param in params.items()
            if param not in self._names and param.requires_grad
        }
        if self._untrained and isinstance(model, nn.Module):
            check_not_wrapped(model)
        self._stop_compacting: weakref.finalize[..., SparseAdam] | None = None
        self._stop_watching: Callable[[], Any] | None = None
        self._buckets = FlatState(mask, moment_dtype)
        self._clipping = Clipping(self._buckets)
        self._changes: list[Any] = []  # of `state`, by others
        self._saved: Saved | None = None  # while it is loaded
        self._buffers = WatchedBuffers(module_of(model, self._names))
        self._base_known = True
        self._stepped = self._trained = self._complete = False
        self._fingerprints = {n: fingerprint(p) for p, n in self._names.items()}
        super().__init__(groups, defaults)
        self._complete = True
        self._hand_out()
        self.freeze()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters; the constructor calls this for each of its groups.

        Every tensor that the mask selects has a place from then on, so a later call finds none.

        Args:
            param_group: `{"params": named parameters, ...}`.

        Raises:
            TalosValueError: a later call, or a hyper-parameter is out of range.
            TalosTypeError: the parameters have no names.
        """
        (group,) = named_groups([param_group])
        check_hyperparameters({**self.defaults, **group}, read_tensors=True)
        chosen = [(name, p) for name, p in group["params"] if p in self._names]
        if self._complete:
            raise TalosValueError(
                "param_group must hold parameters that the mask selects, got none that is not "
                "trained already; make a new optimizer with a mask that selects them"
            )
        names = [name for name, _ in chosen]
        super().add_param_group({**group, "params": chosen, "param_names": names})
        number = len(self.param_groups) - 1
        self._buckets.add_group(number, {self._names[param]: param for _, param in chosen})
        self.param_groups[number]["base"] = self._buckets.base_of(number)

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
            TalosRuntimeError: a parameter was moved, cast or reshaped since the optimizer was made;
                or a CUDA graph is captured and a number for lr is new.
            TalosTypeError: a gradient is sparse or of another kind of number.
            TalosValueError: a gradient has another shape or device, or a hyper-parameter was set
                out of range. Nothing is written in any of these cases.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_hyperparameters(group)
        checked = self._checked()
        factor = self._clipping.take(checked)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for bucket, grads in zip(self._buckets, checked, strict=True):
            bucket.step(grads, self.param_groups[bucket.group], scale, found_inf, factor)
        if not self._trained:
            self._trained = self._buckets.have_gradients(checked)
            if not self._trained and self._stepped:
                warn_of_no_gradient(stacklevel=3)
                self._trained = True  # said once
        self._stepped = True
        return loss

    def _checked(self) -> list[list[Tensor]]:
        """What each bucket's `check` returns, once the state is what and where it should be."""
        self._make_ready()
        return [bucket.check() for bucket in self._buckets]

    def _make_ready(self) -> None:
        """Take over what others put into `state`; before the first step follow the parameters."""
        self._refresh()
        if not self._stepped and self._buckets.have_moved(self._untrained):
            self._follow()

    def _refresh(self) -> None:
        """Take over what somebody else put into `state`, and how they grouped the parameters."""
        regrouped = self._buckets.regrouped(self.param_groups)
        if self.state is self._handed and not self._changes and not regrouped:
            return
        states = {
            param: state_of(
                name, self.state.get(param, {}), self._mask.indices[name].nnz, "optimizer.state"
            )
            for param, name in self._names.items()
        }
        self._rebuild(states, self._buckets.bases())

    def _follow(self) -> None:
        """Move the state to where its parameters are, in what they are; no step was taken yet."""
        bases, now = self._buckets.bases(), {name: p for p, name in self._names.items()}
        cast = {name: now[name] for name in bases if bases[name].dtype != now[name].dtype}
        bases |= {name: bases[name].to(param.dtype) for name, param in cast.items()}
        states = {param: dict(self.state[param]) for param in self._names}
        for param in cast.values():  # whose master is the weight that was cast
            states[param].pop("master", None)
        self._rebuild(states, bases)
        # What was only cast is a base with a fingerprint of its own.
        deltas = self._buckets.deltas()
        kept = {name: base for name, base in self._fingerprints.items() if name not in cast}
        unchanged = {name: param for name, param in cast.items() if not deltas[name].any()}
        self._fingerprints = kept | {n: fingerprint(p) for n, p in unchanged.items()}

    def _rebuild(self, states: Mapping[Tensor, State], bases: Mapping[str, Tensor]) -> None:
        """Make the buckets anew with this state by parameter and these initial weights by name."""
        groups = [{self._names[p]: p for p in group["params"]} for group in self.param_groups]
        self._buckets.rebuild(groups, states, bases)
        for number, group in enumerate(self.param_groups):
            group["base"] = self._buckets.base_of(number)
        self._hand_out()

    def _hand_out(self) -> None:
        """Show the buckets' state in `state`, and what others have put there beside it."""
        self._changes = []
        before = self.__dict__.get("state", {})
        self._handed = watched(self._changes, self._buckets.views(), before)
        self.state = self._handed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the clipping of them that the step has not done yet.

        Args:
            set_to_none: False keeps their memory and fills it with zeros.
        """
        self._clipping.drop()
        if set_to_none or not all(bucket.zero_compact() for bucket in self._buckets):
            super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(
        self,
        max_norm: float,
        *,
        error_if_nonfinite: bool = False,
        defer: bool = False,
    ) -> Tensor:
        """Scale the gradients so that the norm over the selected entries is at most `max_norm`.

        Args:
            max_norm: the largest norm let through; infinity only computes the norm.
            error_if_nonfinite: raise where the norm is NaN or infinite; reads it on the host.
            defer: let the next step scale what it reads, and leave the gradients as they are: of
                dense ones it saves a pass that costs as much as the step. float32 gradients give
                the same bits; of 16-bit ones the scaled are not rounded. They must not change
                before the step: with a GradScaler call `unscale_` first.

        Returns:
            The norm before clipping, float32 0-dim.

        Raises:
            TalosValueError: `max_norm` is not positive.
            TalosRuntimeError: the norm is NaN or infinite and `error_if_nonfinite` is set; no
                gradient is changed then. Or gradients changed since a clipping that was deferred.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> optimizer = SparseAdam(model, Mask.from_dense({"weight": torch.ones(1, 2) > 0}))
            >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
            >>> optimizer.clip_grad_norm_(1.0, defer=True), model.weight.grad
            (tensor(5.), tensor([[3., 4.]]))
            >>> optimizer.step()
        """
        self._make_ready()
        return self._clipping.clip(max_norm, error_if_nonfinite=error_if_nonfinite, defer=defer)

    def compact_gradients(self, enabled: bool = True, *, sampled: bool = False) -> None:
        """Keep the gradients of the selected entries only, from the next backward on.

        A gradient is compacted the moment it exists, so that at most one is ever dense, and of a
        linear layer's weight only the rows with selected entries are computed. `param.grad` is a
        `CompactGradient` then, 4 bytes a selected entry: it accumulates, and clipping, GradScaler
        and norms work on it. The gradients of linear layers' weights do not pass autograd unless
        such a weight has hooks (`register_hook`), which see them dense; `torch.autograd.grad` does
        not return them.

        Args:
            enabled: False goes back to dense gradients; `release` does too.
            sampled: compute the gradients of linear layers' weights at their selected entries only
                (`talos_kernels.sddmm_`), rounded to no shorter type than float32. On a GPU this
                saves the scratch that all layers share, as large as the largest such weight, and
                one dense gradient written and read a layer; its matrix product is Triton's, not the
                vendor's. It has not been measured on a GPU: `pytest benches/bench_sddmm.py` tells
                where it is faster. A CPU gains nothing.

        Raises:
            TalosRuntimeError: there are several processes: their gradients would not be averaged.

        Example:
            >>> model = torch.nn.Linear(2, 2, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.eye(2) > 0})
            >>> optimizer = SparseAdam(model, mask)
            >>> optimizer.compact_gradients()
            >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
            >>> model.weight.grad.entries
            tensor([1., 2.])
            >>> optimizer.step()
        """
        if enabled and several_processes():
            raise TalosRuntimeError(
                "compact gradients must be trained in one process, got several: those of linear "
                "layers do not pass DistributedDataParallel, which would wait for them"
            )
        if self._clipping.pending:  # its gradients give way to others
            self._clipping.settle()
        if self._stop_compacting is not None:
            self._stop_compacting()
            self._stop_compacting = None
            for bucket in self._buckets:
                bucket.densify_gradients()
        if enabled:
            self._make_ready()
            parts = [b.compact_gradients(sampled) for b in self._buckets]
            params = [each for part in parts for each in part]
            self._stop_compacting = weakref.finalize(self, compact(params))
            self._stop_compacting.atexit = False

    def task_vector(self) -> TaskVector:
        """What training has changed: current minus initial weights, at the selected entries.

        Returns:
            float32 values on the CPU, over the optimizer's mask; of bf16 and fp16 weights, the
            masters' change.

        Raises:
            TalosRuntimeError: a parameter was moved, cast or reshaped; or the state was loaded from
                a checkpoint that belongs to other initial weights and does not hold them.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.ones(1, 2) > 0})
            >>> optimizer = SparseAdam(model, mask, lr=0.5)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.task_vector().values
            tensor([-0.5000, -0.5000])
        """
        if not self._base_known:
            raise TalosRuntimeError(
                "the initial weights are not known: the loaded state belongs to others and does "
                "not hold them; use TaskVector.from_models(base, model, mask)"
            )
        self._checked()
        deltas = self._buckets.deltas()
        empty = torch.zeros(0, dtype=torch.float32, device="cpu")
        values = torch.cat([deltas.get(name, empty) for name in self._mask.names])
        made = {"method": "talos", **self._buffers.metadata(stacklevel=2)}
        return TaskVector(self._mask, values, fingerprints=self._fingerprints, metadata=made)

    def freeze(self) -> None:
        """Freeze the tensors without a selected entry; the constructor has done so once."""
        for param in self._untrained.values():
            param.requires_grad = False
        if self._untrained and self._stop_watching is None:
            self._stop_watching = watch_frozen(self, self._untrained)
            _logger.info("%d parameters without a selected entry are frozen", len(self.frozen))

    def release(self) -> None:
        """Give the tensors that were frozen for lack of a selected entry back to training.

        Gradients are dense again.
        """
        self.compact_gradients(False)
        for param in self._untrained.values():
            param.requires_grad = True
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that were frozen for lack of a selected entry."""
        return tuple(self._untrained)

    @property
    def mask(self) -> Mask:
        """The selection that is trained."""
        return self._mask

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter, the groups, and what `task_vector` measures from.

        Returns:
            torch's dictionary and two keys more: `base`, the initial weights at the selected
            entries (a flat CPU tensor for each parameter, in the order of the groups), and
            `fingerprints`.
        """
        self._refresh()
        state = super().state_dict()
        state["state"] = {
            key: dict(each) if isinstance(each, Watched) else each
            for key, each in state["state"].items()
        }
        bases = self._buckets.bases()
        listed = [bases[self._names[p]] for group in self.param_groups for p in group["params"]]
        return {**state, "base": listed, "fingerprints": dict(self._fingerprints)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state that another optimizer with the same mask saved.

        Args:
            state_dict: what `state_dict()` returned; it is copied. A checkpointer may drop `base`:
                the initial weights are then this optimizer's own, if the state belongs to them.

        State is taken by the parameters' names, whatever device or dtype it was saved in; a master
        is made of the weights where there is none. A group that lacks a hyper-parameter, as those
        of older versions may, has the one that this optimizer was made with.

        Raises:
            TalosValueError: it belongs to another mask, or its groups, names or sizes differ. The
                state is left as it was then.
        """

        def check_and_take(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # Runs after the caller's own hooks. torch would cast the state to each weight's dtype
            # and give it by place, so it is handed none, and __setstate__ fills in what was read.
            nnz = {name: self._mask.indices[name].nnz for name in self._names.values()}
            reader = StateReader(
                self.param_groups, self.defaults, self._names, nnz, self._mask.fingerprint
            )
            self._saved = reader.read(state_dict)
            return {**state_dict, "state": {}, "param_groups": self._saved.groups}

        self._buckets.regrouped(self.param_groups)
        handle = self.register_load_state_dict_pre_hook(check_and_take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._saved = None

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep; the views in `state` are made again from the buckets."""
        self._refresh()
        kept = {name: getattr(self, name) for name in self._KEPT if name != "_names"}
        names = list(self._names.items())
        state = {**super().__getstate__(), "state": foreign(self.state)}
        return {**state, "_names": names, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the optimizer from `__getstate__`, or take over what `load_state_dict` read."""
        if "_names" in state:
            state = {**state, "_names": dict(state["_names"])}
        own = [group["base"] for group in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        if "_names" in state:
            self._stop_compacting = self._stop_watching = None  # a copy begins with dense gradients
            self._clipping = Clipping(self._buckets)  # and with none that is still to be clipped
            self._saved, self._buffers = None, WatchedBuffers(module_of(None, self._names))
            self._hand_out()
        elif (saved := self._saved) is not None:
            bases = self._buckets.bases() if saved.base is None else saved.base
            if saved.base is None:
                self._base_known &= own == [group["base"] for group in self.param_groups]
            else:
                self._fingerprints, self._base_known = saved.fingerprints, True
            self.state = defaultdict(dict, saved.others)
            self._rebuild(saved.states, bases)
            self._stepped = False
