"""The state of an optimizer in flat buckets: kept up to date, saved and loaded.

`optimizer.state[param]` holds views of the buckets' arrays. What other code puts into `state` or
`param_groups` counts from the next step on, as with torch's own optimizers. Until the first step
the state follows its parameters to another device or dtype, and into the shards that FSDP2 makes.
"""

import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.distributed import is_sharded, reshard
from talos.errors import TalosRuntimeError
from talos.masks import Mask
from talos.masks.parts import Parts
from talos.names import named_parameters, resolve_names
from talos.optim.base import Base
from talos.optim.buckets import Bucket
from talos.optim.clipping import Clipping
from talos.optim.exchange import Exchange
from talos.optim.marks import Mark
from talos.optim.param_groups import alike, complete_groups, module_of
from talos.optim.sharded_states import agreement, check_shares, spread, take
from talos.optim.states import ARRAYS, OWN, Saved, State, StateReader, checked_state, foreign
from talos.optim.watching import hold, let_go
from talos.params import check_one_memory
from talos.tensors import WatchedBuffers

__all__ = ["Bookkeeping"]


class Bookkeeping(torch.optim.Optimizer):
    """What `SparseAdam` keeps, and how that stays true; a subclass makes the steps."""

    # Copies and pickles keep these beside torch's own attributes; hooks are dropped, as by torch.
    _KEPT = (
        *("_mask", "_moment_dtype", "_names", "_parts", "_buckets", "_untrained", "_base"),
        *("_mark", "_complete", "_stepped", "_trained"),
    )
    _mask: Mask
    _moment_dtype: torch.dtype
    _names: dict[Tensor, str]
    _parts: Parts
    _buckets: list[Bucket]
    _untrained: dict[str, Tensor]
    _base: Base
    _mark: Mark
    _exchange: Exchange | None
    _complete: bool
    _stepped: bool
    _clipping: Clipping
    _buffers: WatchedBuffers
    _stop_compacting: "weakref.finalize[..., Any] | None"

    def _checked(self) -> list[list[Tensor]]:
        """Bring the state up to date; return each bucket's gradients, from `Bucket.check`."""
        self._make_ready()
        return [bucket.check() for bucket in self._buckets]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups; before the first step with the parameters that the model has now."""
        if self._complete and not self._stepped:
            self.follow_sharding()
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def _make_ready(self) -> None:
        """Take over changes of `state` and groups; before the first step follow the parameters."""
        self._refresh()
        if self._stepped:
            return
        moved = any(bucket.is_moved for bucket in self._buckets)
        with agreement(self._mask, self._names, self._parts.mesh is not None):
            own = {name: param for param, name in self._names.items()}
            check_one_memory({**self._untrained, **own}, own)
            if self._parts.several and not moved:
                for bucket in self._buckets:
                    bucket.check()
        if moved:
            self._follow()

    def _refresh(self) -> None:
        """Take over what other code put into `state`, and how it grouped the parameters."""
        regrouped = self._regrouped()
        # By identity, without a parameter's hash, which is slow.
        now = list(map(id, self.state.values()))
        if not regrouped and now == self._shown and all(b.is_shown for b in self._buckets):
            return
        states = {
            param: checked_state(
                name, self.state.get(param, {}), self._parts.indices[name].nnz, "optimizer.state"
            )
            for param, name in self._names.items()
        }
        self._build(states)
        self._show()

    def _regrouped(self) -> bool:
        """Return whether other code regrouped or reordered the parameters; name them then."""
        if self._grouped == [list(map(id, group["params"])) for group in self.param_groups]:
            return False
        complete_groups(self.param_groups, self._names, self.defaults)
        return True

    def _follow(self) -> None:
        """Move the state to where its parameters are now, in their dtype; no step was taken yet."""
        dtypes = {name: weights.dtype for name, weights in self._base.weights.items()}
        cast = {n: p for p, n in self._names.items() if dtypes[n] != p.dtype}
        states = {param: dict(self.state[param]) for param in self._names}
        for param in cast.values():  # the master is the cast weight
            states[param].pop("master", None)
        self._build(states)
        self._base.cast(cast, self._buckets, self._parts)
        self._show()

    def follow_sharding(self) -> None:
        """Take over the parameters that `fully_shard` put in place of this optimizer's.

        Before the first step every use of `param_groups` does this by itself.

        Raises:
            TalosRuntimeError: the optimizer has made a step, or its gradients are compact.
        """
        moved = _sharded_instead(self._buffers.model, {**self._untrained, **self._parts.params})
        known = {*self._names, *moved, *moved.values()}
        groups = self.__dict__["param_groups"]
        if not moved or any(param not in known for group in groups for param in group["params"]):
            return  # with others in the groups, as Accelerate puts there for a while
        if self._stepped or self._stop_compacting is not None or self._parts.mesh is not None:
            raise TalosRuntimeError(
                "the model must be sharded before the first step and before compact_gradients(), "
                "and not with shard_state=True, "
                f"got {len(moved)} parameters that fully_shard replaced since; shard the model, "
                "then make the optimizer and load its state"
            )
        self._names = {moved.get(param, param): name for param, name in self._names.items()}
        self._untrained = {n: moved.get(param, param) for n, param in self._untrained.items()}
        for group in groups:
            group["params"] = [moved.get(param, param) for param in group["params"]]
        self._parts = parts = Parts(self._mask, {name: p for p, name in self._names.items()})
        self.state = defaultdict(dict, {moved.get(k, k): each for k, each in self.state.items()})
        self._build({p: take(parts, n, self.state.get(p, {})) for p, n in self._names.items()})
        for weights in (self._base.weights, self._mark.weights):
            weights.update({name: parts.part(name, each) for name, each in weights.items()})
        self._show()
        if let_go(self):
            hold(self, self._names, self._mask, self._untrained)

    def _build(self, states: Mapping[Tensor, State]) -> None:
        """Make new buckets with this state by parameter; the old arrays stay as they were."""
        compacted = {n: each for bucket in self._buckets for n, each in bucket.compacted.items()}
        self._buckets[:] = [
            Bucket.create(number, params, self._parts, self._moment_dtype, states)
            for number, params in alike(self.param_groups, self._names)
        ]
        for bucket in self._buckets:
            bucket.compacted = {n: compacted[n] for n in bucket.params if n in compacted}

    def _show(self) -> None:
        """Put the views and the initial weights into `state`; prepare to send the weights."""
        mesh = self._parts.mesh
        self._exchange = None if mesh is None else Exchange(self._parts, self._buckets)
        for bucket in self._buckets:
            bucket.show_in(self.state)
        for param, name in self._names.items():
            state = self.state[param]
            for key in OWN[len(ARRAYS) :]:
                state.pop(key, None)
            state.update(self._base.state(name))
        self._shown = list(map(id, self.state.values()))
        self._grouped = [list(map(id, group["params"])) for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state by parameter, and the groups.

        Returns:
            torch's dictionary. The state of a parameter also holds `base`, the initial weights at
            its selected entries, and `fingerprint`, that of the whole initial tensor.

        Where parameters or their state are sharded, all ranks call this. The arrays of sharded
        parameters are DTensors, of which each rank holds an even share:
        torch.distributed.checkpoint writes every value once, `torch.save` only this rank's. With
        `shard_state` the arrays are whole.
        """
        self._refresh()
        state = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        saved = {
            i: spread(self._parts, self._names[p], self.state[p]) for i, p in enumerate(params)
        }
        state["state"] = {**state["state"], **saved}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that an optimizer with the same mask saved.

        Args:
            state_dict: what `state_dict()` returned, on this number of ranks or another one; it is
                copied. Arrays may be whole tensors or DTensors.

        State is found by the parameters' names and cast to their device and dtype; missing masters
        are made from the weights. A group that lacks a hyper-parameter, as in a state dict of an
        older version, keeps the one that this optimizer was made with. Where parameters are
        sharded, all ranks call this.

        Raises:
            TalosValueError: it belongs to another mask, its groups, names or sizes differ, or it
                has one rank's share on several. The optimizer stays as it was.
        """
        self._regrouped()
        saved: list[Saved] = []

        # torch would cast the state to each weight's dtype and assign it by place, so it is given
        # none. These hooks run after the caller's pre-hooks and before the caller's post-hooks.
        def read(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            reader = StateReader(self.param_groups, self.defaults, self._names, self._mask)
            with agreement(self._mask, self._names, self._parts.mesh is not None):
                saved.append(reader.read(state_dict))
            check_shares(saved[0].states.values())
            return {**state_dict, "state": {}, "param_groups": saved[0].groups}

        def fill(_: torch.optim.Optimizer) -> None:
            (found,) = saved
            names = self._names
            states = {p: take(self._parts, names[p], each) for p, each in found.states.items()}
            self._base = Base.loaded({names[p]: each for p, each in states.items()})
            self.state = defaultdict(dict, found.others)
            self._build(states)
            self._show()
            self._stepped = False

        hooks = (
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep; they make their own views in `state`."""
        self._refresh()
        kept = {name: getattr(self, name) for name in self._KEPT}
        names = list(self._names.items())  # a tensor has no hash before it is rebuilt
        return {**super().__getstate__(), **kept, "state": foreign(self.state), "_names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild a copy; `load_state_dict` calls this, too, with the loaded groups."""
        if "_names" not in state:
            super().__setstate__(state)
            return
        super().__setstate__({**state, "_names": dict(state["_names"])})
        self.state = defaultdict(dict, self.state)
        self._stop_compacting = None  # a copy begins with dense gradients
        self._clipping = Clipping(self._buckets)  # and without a deferred clipping
        self._buffers = WatchedBuffers(module_of(None, self._names))
        self._show()


def _sharded_instead(model: nn.Module | None, params: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Return the sharded parameters that a model holds now in place of whole ones of its names."""
    if model is None or not (dist.is_available() and dist.is_initialized()):
        return {}
    reshard(model)
    now = named_parameters(model, remove_duplicate=False)
    known = resolve_names(params, now)
    pairs = [(param, now[known[name]]) for name, param in params.items() if name in known]
    return {old: new for old, new in pairs if is_sharded(new) and not is_sharded(old)}
