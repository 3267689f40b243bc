"""AdamW that trains the selected entries of a model, and keeps state only for them.

`talos_kernels.sparse_adam` holds the equations: decoupled weight decay, bias-corrected moments. A
selected entry has exp_avg and exp_avg_sq, 8 bytes (4 in bf16), and 4 more for a float32 master if
its weight is bf16 or fp16; the compressed index comes on top.

The state of all tensors with one param group, device and dtype lies in flat arrays, a `Bucket`, so
that one launch steps them. `optimizer.state[param]` holds views of those arrays. What other code
puts into `state` or `param_groups` counts from the next step on, as with torch's own optimizers.
Until the first step the state follows its parameters to another device or dtype.

Of a sharded parameter (FSDP2) each rank trains the entries that it holds and keeps their state.
"""

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from talos.distributed import reshard
from talos.errors import TalosRuntimeError, TalosValueError
from talos.masks import Mask
from talos.masks.parts import Parts
from talos.optim.base import Base
from talos.optim.bookkeeping import Bookkeeping
from talos.optim.buckets import Bucket
from talos.optim.clipping import Clipping
from talos.optim.compaction import compact
from talos.optim.marks import Mark
from talos.optim.param_groups import (
    NamedParams,
    by_name,
    check_arguments,
    check_hyperparameters,
    check_not_flattened,
    check_not_wrapped,
    listed,
    module_of,
    named_groups,
    selected_names,
    unselected,
)
from talos.optim.sharded_states import agreement, check_copies, check_same_weights, mesh_of_copies
from talos.optim.watching import hold, let_go, note_step, warn_of_no_gradient
from talos.task_vectors import Patch, TaskVector
from talos.tensors import WatchedBuffers

__all__ = ["SparseAdam"]

_logger = logging.getLogger(__name__)


class SparseAdam(Bookkeeping):
    """AdamW on the entries that a mask selects (`torch.optim.SparseAdam` is for sparse gradients).

    The constructor freezes every parameter without a selected entry (`requires_grad=False`), so
    that autograd computes no gradient for it; `release()` gives them back to training. Call it
    before you make another optimizer of the same entries: the second one warns otherwise.

    Args:
        model: a module, its `named_parameters()`, or param groups `{"params": named parameters,
            "lr": ...}`. Bare parameters, as trainers pass them, take the names that the module
            holding them gives them.
        mask: which entries are trained.
        lr: learning rate. A tensor is read on its device, without a sync. A CUDA graph reads it at
            every replay; a number must have been uploaded by a step before the capture.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay of the selected entries.
        maximize: ascend instead of descend.
        moment_dtype: float32, or bfloat16 for half the state; bfloat16 moments are rounded
            stochastically.
        seed: seed of that rounding.
        strict: refuse a model with parameters that the mask does not name.
        shard_state: let all ranks of torch.distributed share the state of whole parameters, as
            under DistributedDataParallel. Each rank keeps and steps a share of each tensor's
            selected entries, and a step ends with one call that sends every selected weight once.
            The weights have the same bits with float32 moments.

    With a full mask the weights are those of `torch.optim.AdamW`. The initial weights at the
    selected entries, from which `task_vector` measures, are kept on the CPU in the weights' dtype.

    Raises:
        TalosValueError: the mask selects nothing, names a parameter that the model lacks, or has
            another shape; a selected parameter has requires_grad=False; a hyper-parameter is out
            of range; ranks that share parameters or state have other masks, or with
            `shard_state` other initial weights.
        TalosTypeError: a selected parameter is not float32, bfloat16, float16 or float64, or is on
            meta; or FullyShardedDataParallel (FSDP1) wraps the model.
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
        shard_state: bool = False,
    ) -> None:
        if isinstance(model, nn.Module):
            check_not_flattened(model)
            reshard(model)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "seed": seed,
        }
        model, tensors = listed(model)
        with agreement(mask, tensors, shard_state):
            check_arguments(mask, moment_dtype, seed)
            groups = named_groups(model, mask.names)
            params = by_name(groups)
            check_copies(shard_state, params)
            self._names = selected_names(model, params, mask, strict)
            for group in groups:
                check_hyperparameters({**defaults, **group}, read_tensors=True)
        self._mask = mask
        mesh = mesh_of_copies(shard_state, params)
        self._parts = Parts(mask, {name: param for param, name in self._names.items()}, mesh)
        self._untrained = unselected(params, self._names)
        check_not_wrapped(self._untrained.values())
        self._stop_compacting: weakref.finalize[..., SparseAdam] | None = None
        self._moment_dtype = moment_dtype
        self._buckets: list[Bucket] = []
        self._mark = Mark()
        self._clipping = Clipping(self._buckets)
        self._buffers = WatchedBuffers(module_of(model, self._names))
        self._stepped = self._trained = self._complete = False
        super().__init__(groups, {**defaults, "mask": mask.fingerprint})
        self._complete = True
        self._build({})
        self._base = Base.of(self._buckets)
        if mesh is not None:
            check_same_weights(self._base.fingerprints, mesh)
        self._show()
        self.freeze()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters; only the constructor may call this.

        Args:
            param_group: `{"params": named parameters, ...}`.

        Raises:
            TalosValueError: the optimizer is complete, or a hyper-parameter is out of range.
            TalosTypeError: the parameters have no names.
        """
        (group,) = named_groups([param_group])
        check_hyperparameters({**self.defaults, **group}, read_tensors=True)
        if self._complete:
            raise TalosValueError(
                "all parameters that the mask selects already belong to this optimizer; to train "
                "others, build a new mask and make a new optimizer"
            )
        chosen = [(name, p) for name, p in group["params"] if p in self._names]
        names = [name for name, _ in chosen]
        super().add_param_group({**group, "params": chosen, "param_names": names})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the selected entries; skip parameters whose gradient is None.

        Args:
            closure: computes the gradients and returns the loss.

        Returns:
            The loss that `closure` returned.

        Raises:
            TalosRuntimeError: a parameter was moved, cast or reshaped since the optimizer was made;
                or a CUDA graph is being captured and lr is a new number.
            TalosTypeError: a gradient is sparse or has an unsupported dtype.
            TalosValueError: a gradient has another shape or device, or a hyper-parameter was set
                out of range. Nothing is written in any of these cases.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        note_step(self, stacklevel=4)
        checked = self._checked()  # completes groups that other code made
        for group in self.param_groups:
            check_hyperparameters(group)
        factor = self._clipping.take(checked)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler's number of no gradient
            found_inf = None
        for bucket, grads in zip(self._buckets, checked, strict=True):
            bucket.step(grads, self.param_groups[bucket.group], scale, found_inf, factor)
        if self._exchange is not None:
            self._exchange.run()
        if not self._trained or checked[0][0] is self._buckets[0].absent:
            pairs = zip(self._buckets, checked, strict=True)
            found = any(g is not bucket.absent for bucket, grads in pairs for g in grads)
            if not found and self._stepped:
                self.follow_sharding()
                if not self._trained:
                    warn_of_no_gradient(stacklevel=4)
                    found = True  # warn once
            self._trained |= found
        self._stepped = True
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and a deferred clipping with them.

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

        That norm is much smaller than the one over whole tensors, which
        `torch.nn.utils.clip_grad_norm_` takes of dense gradients: see docs/trainers.md.

        Args:
            max_norm: the largest allowed norm; infinity only computes the norm.
            error_if_nonfinite: raise if the norm is NaN or infinite; waits for the device.
            defer: leave the gradients as they are and let the next step scale them as it reads
                them. For dense gradients this saves a pass that costs as much as the step. The
                result has the same bits with float32 gradients; 16-bit ones are scaled without
                rounding. Gradients must not change before the step: with a GradScaler, call
                `unscale_` first.

        Returns:
            The norm before clipping, float32 0-dim.

        Raises:
            TalosValueError: `max_norm` is not positive.
            TalosRuntimeError: the norm is NaN or infinite and `error_if_nonfinite` is set, and no
                gradient was changed; or gradients changed since a deferred clipping.

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

        Each gradient is compacted as soon as autograd has it, so that at most one is dense at a
        time. For a linear layer's weight only the rows with selected entries are computed.
        `param.grad` is then a `CompactGradient` of 4 bytes a selected entry; accumulation,
        clipping, GradScaler and norms work on it. Autograd does not see the weight gradients of
        linear layers, unless a weight has hooks (`register_hook`), which see them dense.
        DistributedDataParallel reduces compact gradients, too; see `talos.reduce_selected`.

        Args:
            enabled: False goes back to dense gradients, as `release` does.
            sampled: compute the weight gradients of linear layers at their selected entries only
                (`talos_kernels.sddmm_`), in float32. On a GPU this saves a scratch as large as the
                largest such weight, and writing and reading one dense gradient a layer. It has not
                been measured on a GPU: run `pytest benches/bench_sddmm.py` there. It does not help
                on a CPU.

        Raises:
            TalosRuntimeError: a parameter is sharded.

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
        if enabled and self._parts.mesh is not None:
            raise TalosRuntimeError(
                "shard_state must be False with compact gradients, got True: each rank would keep "
                "those of its own share only; use dense gradients"
            )
        if enabled and self._parts.sharded:
            raise TalosRuntimeError(
                "gradients of sharded parameters must stay dense, got "
                f"{self._parts.sharded[0]}: FSDP2 averages them; leave compact_gradients() out"
            )
        if self._clipping.pending:  # its gradients are about to be replaced
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
        """Return what training has changed: current minus initial weights, where selected.

        Returns:
            float32 values on the CPU over the optimizer's mask; for bf16 and fp16 weights the
            masters' change.

        Raises:
            TalosRuntimeError: a parameter was moved, cast or reshaped; or the state comes from a
                checkpoint with other initial weights that does not hold them.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.ones(1, 2) > 0})
            >>> optimizer = SparseAdam(model, mask, lr=0.5)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.task_vector().values
            tensor([-0.5000, -0.5000])
        """
        self._checked()
        values = self._base.change(self._buckets, self._parts)
        made = {"method": "talos", **self._buffers.metadata(stacklevel=2)}
        return TaskVector(self._mask, values, fingerprints=self._base.fingerprints, metadata=made)

    def patch(self) -> Patch:
        """Return the weights that changed since the last patch, for a replica of the model.

        The first patch counts from the initial weights; those of a loaded state count, too. So
        every patch, applied in order to a replica of the initial model, gives it the bits of this
        one. Only what training wrote is seen: the selected entries. In bfloat16 and float16 a
        patch holds the entries whose rounded value changed.

        From the first call on, the optimizer keeps a copy of the selected weights in their own
        dtype, on their device: 2 bytes a selected entry in bfloat16. No other weight is read.

        Returns:
            A patch on the CPU, by the mask's names, without tensors that did not change.

        Raises:
            TalosRuntimeError: as `task_vector`.
            TalosValueError: a weight is NaN or infinite; the next patch counts from the same mark.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.tensor([[True, False]])})
            >>> optimizer = SparseAdam(model, mask, lr=0.5)
            >>> replica = {name: each.clone() for name, each in model.state_dict().items()}
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.patch().apply_(replica)
            >>> torch.equal(replica["weight"], model.weight), len(optimizer.patch())
            (True, 0)
        """
        self._checked()
        return self._mark.patch(self._base, self._buckets, self._parts)

    def mark(self) -> None:
        """Let the next patch count from the weights as they are now, as after a full copy."""
        self._checked()
        self._mark.move(self._buckets)

    def freeze(self) -> None:
        """Freeze the parameters without a selected entry, as the constructor does."""
        for param in self._untrained.values():
            param.requires_grad = False
        hold(self, self._names, self._mask, self._untrained)
        if self._untrained:
            _logger.info("%d parameters without a selected entry are frozen", len(self.frozen))

    def release(self) -> None:
        """Give the parameters that the optimizer froze back to training; make gradients dense."""
        let_go(self)
        self.compact_gradients(False)
        for param in self._untrained.values():
            param.requires_grad = True

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that the optimizer froze."""
        return tuple(self._untrained)

    @property
    def nbytes(self) -> int:
        """Bytes on the weights' device: state, masters, index, and the copy that `patch` keeps.

        With `shard_state` the index has the entries of all ranks, the rest is this rank's share.

        The mask and the initial weights come on top, on the CPU.

        Example:
            >>> mask = Mask.from_dense({"weight": torch.arange(6400).view(80, 80) % 10 == 0})
            >>> optimizer = SparseAdam(torch.nn.Linear(80, 80), mask)
            >>> optimizer.nbytes // mask.nnz  # 8 bytes of moments, the rest is the index
            9
        """
        sent = 0 if self._exchange is None else self._exchange.nbytes
        return sum(bucket.nbytes for bucket in self._buckets) + self._mark.nbytes + sent

    @property
    def mask(self) -> Mask:
        """The selection that is trained."""
        return self._mask
