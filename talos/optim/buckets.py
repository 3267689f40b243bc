"""The flat state of the tensors that one launch steps: of one param group, device and dtype."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from talos.distributed import is_sharded, local, reduced
from talos.errors import TalosRuntimeError, TalosValueError
from talos.masks.parts import Parts
from talos.optim.compact_gradient import CompactGradient
from talos.optim.compaction import CompactedParam
from talos.optim.gradients import check_entries, check_gradient, gradient_parts, look
from talos.optim.states import ARRAYS, State
from talos_kernels import Index, gather_grad_
from talos_kernels._checks import contiguous, dense_gradients, write_back
from talos_kernels.sparse_adam import sparse_adam_rows_

__all__ = ["Bucket"]

# Lists of looks are compared whole: one tensor after another would take longer than a launch.
_grad, _entries, _selection = attrgetter("grad"), attrgetter("entries"), attrgetter("selection")
_row_major = Tensor.is_contiguous
# Entries whose norm is taken at once: on a CPU torch adds float32 numbers one after another.
PIECE = 1 << 14
Look = tuple[torch.dtype, torch.device, torch.Size, torch.layout]


@dataclass(eq=False)
class Bucket:
    """Tensors that are stepped together, and their state in rank order.

    Attributes:
        group: number of their param group.
        params: by name, in the order of the index; one device and dtype, and sharded alike or not
            at all.
        looks: what each of them was when the bucket was made.
        index: the selected entries of this rank, on their device.
        exp_avg: float32 or bfloat16 `[nnz]`, first moment; float64 for float64 weights.
        exp_avg_sq: `[nnz]` in the same dtype, second moment.
        master: float32 `[nnz]`, the weights before rounding; None for float32 and float64 weights.
        steps: float32 `[tensors]`, how many steps each tensor has taken.
        lr: float64 0-dim, the learning rate on the device.
        lr_value: the number in `lr`, which is uploaded only when it changes.
        absent: an empty tensor that stands for a missing gradient.
        over: the mesh and placements by which ranks have the entries; None: this one has all.
        compacted: the parameters whose gradients are kept compact; none while they are dense.
        accepted: the looks of the gradients that `check` accepted last.
        uniform: whether those have one dtype that the op takes.
        shown: the dictionaries of `Optimizer.state` that show the arrays.
        view_ids: the identities of the views in them.
    """

    group: int
    params: dict[str, Tensor]
    looks: list[Look]
    index: Index
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    steps: Tensor
    lr: Tensor
    absent: Tensor
    over: Any = None
    lr_value: float | None = None
    compacted: dict[str, CompactedParam] = field(default_factory=dict)
    accepted: list[Look] = field(default_factory=list)
    uniform: bool = False
    shown: list[dict[str, Any]] = field(default_factory=list)
    view_ids: list[int] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Keep no hooks and no views: a copy makes views of its own arrays."""
        kept = {key: value for key, value in self.__dict__.items() if key != "views"}
        return {**kept, "compacted": {}, "shown": []}

    @classmethod
    @torch.inference_mode(False)  # the state outlives the caller's mode
    @torch.no_grad()
    def create(
        cls,
        group: int,
        params: dict[str, Tensor],
        parts: Parts,
        moment_dtype: torch.dtype,
        states: Mapping[Tensor, State],
    ) -> "Bucket":
        """Make the state of these tensors; zeros, and masters from the weights, without `states`.

        Args:
            group: number of their param group.
            params: by their names in the mask; one device and dtype.
            parts: the entries that this rank trains.
            moment_dtype: dtype of the moments; float64 weights have float64 ones.
            states: checked state by parameter.
        """
        first = next(iter(params.values()))
        device, wide = first.device, torch.promote_types(first.dtype, torch.float32)
        index = Index.pack([parts.indices[name] for name in params], device)
        dtype = wide if wide == torch.float64 else moment_dtype
        bucket = cls(
            group,
            params,
            list(map(look, params.values())),
            index,
            torch.zeros(index.nnz, dtype=dtype, device=device),
            torch.zeros(index.nnz, dtype=dtype, device=device),
            None,
            torch.zeros(len(params), dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros(0, dtype=wide, device=device),
            parts.over(next(iter(params))),
        )
        if first.dtype != wide:
            bucket.master = bucket.weights()
        for param, views in bucket.views.items():
            given = states.get(param, {})
            views["step"].fill_(float(given.get("step", 0)))
            for key in views.keys() - {"step"}:
                if key in given:
                    views[key].copy_(given[key])
        return bucket

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.looks[0][0]

    @cached_property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the tensors."""
        return is_sharded(next(iter(self.params.values())))

    @property
    def held(self) -> list[Tensor]:
        """What this rank holds of each tensor."""
        params = list(self.params.values())
        return list(map(local, params)) if self.is_sharded else params

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the index."""
        return sum(each.nbytes for each in vars(self).values() if isinstance(each, Tensor | Index))

    @property
    def is_moved(self) -> bool:
        """Whether a weight has another device or dtype than when the bucket was made."""
        kinds = [look[:2] for look in self.looks]
        return [look(param)[:2] for param in self.params.values()] != kinds

    @cached_property
    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """Each tensor's part of the state, as `Optimizer.state` holds it."""
        arrays = [self.exp_avg, self.exp_avg_sq]
        if self.master is not None:
            arrays.append(self.master)
        parts = [[array[entries] for array in arrays] for entries in self.index.slices]
        return {
            param: dict(zip(ARRAYS, (step, *part), strict=False))
            for param, step, part in zip(self.params.values(), self.steps, parts, strict=True)
        }

    def show_in(self, state: dict[Any, Any]) -> None:
        """Put the views into an optimizer's `state`, beside what else is kept there."""
        self.shown = []
        for param, views in self.views.items():
            others = {k: v for k, v in state.get(param, {}).items() if k not in ARRAYS}
            state[param] = {**others, **views}
            self.shown.append(state[param])
        every = chain.from_iterable(map(dict.values, self.views.values()))
        self.view_ids = list(map(id, every))

    @property
    def is_shown(self) -> bool:
        """Whether the dictionaries that `show_in` made still hold these views."""
        own = itemgetter(*next(iter(self.views.values())))
        try:
            return list(map(id, chain.from_iterable(map(own, self.shown)))) == self.view_ids
        except KeyError:
            return False

    def check(self) -> list[Tensor]:
        """Refuse changed tensors and unusable gradients; return what holds each gradient.

        That is a dense tensor, the entries of a compact gradient, or `absent`.
        """
        if list(map(look, self.params.values())) != self.looks:
            self._refuse_params()
        grads: list[Any] = (
            gradient_parts(self.params)
            if self.is_sharded
            else list(map(_grad, self.params.values()))
        )
        kinds = set(map(type, grads))
        selections = [own.index for own in self.compacted.values()]
        if kinds == {CompactGradient} and list(map(_selection, grads)) == selections:
            grads = list(map(_entries, grads))
        elif kinds != {Tensor}:
            grads = [self._held(name, grad) for name, grad in zip(self.params, grads, strict=True)]
        looks = list(map(look, grads))
        if looks != self.accepted:
            self._check_gradients(grads)
            self.accepted = looks
        return grads

    def _refuse_params(self) -> None:
        """Name the parameter that is no longer what it was."""
        for (name, param), (_, _, shape, _) in zip(self.params.items(), self.looks, strict=True):
            if param.device != self.index.device or param.dtype != self.dtype:
                raise TalosRuntimeError(
                    f"{name} was {self.dtype} on {self.index.device} when the optimizer was "
                    f"made, is {param.dtype} on {param.device}; move or cast the model first"
                )
            if param.shape != shape or param.layout != torch.strided:
                raise TalosRuntimeError(
                    f"{name} had shape {tuple(shape)} when the optimizer was made, "
                    f"has {tuple(param.shape)}; make a new optimizer"
                )

    def _held(self, name: str, grad: Tensor | None) -> Tensor:
        """Return what holds a gradient of any kind."""
        if grad is None:
            return self.absent
        if not isinstance(grad, CompactGradient):
            return grad
        own = self.compacted.get(name)
        if own is None or grad.selection is not own.index:
            raise TalosValueError(
                f"{name}.grad must be compacted by this optimizer, got the compact gradient of "
                "another selection; call zero_grad() and compact_gradients() on the one that steps"
            )
        return grad.entries

    def _check_gradients(self, grads: list[Tensor]) -> None:
        """Refuse a gradient that does not fit its parameter; note the kinds of all."""
        for (name, param), part, nnz, grad in zip(
            self.params.items(), self.held, self.index.nnzs, grads, strict=True
        ):
            if isinstance(param.grad, CompactGradient):
                check_entries(name, grad, torch.Size((nnz,)), param)
            elif grad is not self.absent:
                check_gradient(name, part, grad)
        dtypes = {grad.dtype for grad in grads if grad is not self.absent}
        self.uniform = dtypes <= {self.dtype} or (dtypes <= {torch.float32} and not self._is_wide)

    def compact_gradients(self, sampled: bool) -> list[CompactedParam]:
        """Return a new receiver for each tensor's gradient."""
        self.compacted = {
            name: CompactedParam(param, index, _rows(param, index), sampled)
            for (name, param), index in zip(self.params.items(), self.index.split(), strict=True)
        }
        return list(self.compacted.values())

    def step(
        self,
        grads: list[Tensor],
        group: Mapping[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip_factor: Tensor | None,
    ) -> None:
        """Step the tensors that have a gradient; `grads` come from `check`."""
        self._upload_lr(group["lr"])
        beta1, beta2 = map(float, group["betas"])
        params = self.held
        rows = params if all(map(_row_major, params)) else contiguous(params)
        if not self._plain(grads):
            given = [None if each is self.absent else each for each in grads]
            grads = dense_gradients(given, self.index, self.dtype, compact=True)
        sparse_adam_rows_(
            rows, grads, self.index, self.exp_avg, self.exp_avg_sq, self.master, self.steps,
            self.lr, beta1, beta2, float(group["eps"]), float(group["weight_decay"]),
            bool(group["maximize"]), grad_scale, found_inf, clip_factor, int(group["seed"]),
        )  # fmt: skip
        if rows is not params:
            write_back(params, rows)

    def _plain(self, grads: list[Tensor]) -> bool:
        """Return whether the op takes these gradients as they are."""
        return self.uniform and all(map(_row_major, grads))

    def _upload_lr(self, lr: float | Tensor) -> None:
        """Write the rate to the device: a number if it changed, a tensor there at every step."""
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            self.lr.copy_(lr.reshape(()))
            self.lr_value = None
            return
        value = float(lr.item() if isinstance(lr, Tensor) else lr)
        if value != self.lr_value:
            if _captured(self.lr):  # each replay would write it again
                raise TalosRuntimeError(
                    f"lr must be a tensor on the device while a CUDA graph is captured, or the "
                    f"number of the step before, {self.lr_value}, got {value}; step once before "
                    "the capture"
                )
            self.lr.fill_(value)
            self.lr_value = value

    def densify_gradients(self) -> None:
        """Make the gradients dense again."""
        for param in self.params.values():
            if isinstance(param.grad, CompactGradient):
                param.grad = param.grad.to_dense()
        self.compacted = {}

    def _split(self, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the entries of the compact gradients, and the dense ones, None elsewhere."""
        compact = [isinstance(param.grad, CompactGradient) for param in self.params.values()]
        dense = [
            None if is_compact or grad is self.absent else grad
            for grad, is_compact in zip(grads, compact, strict=True)
        ]
        return list(compress(grads, compact)), dense

    def squared_norm(self, grads: list[Tensor]) -> Tensor:
        """Return the sum of squares over the selected entries of all ranks, 0-dim.

        `grads` come from `check`. Of sharded tensors all ranks call this.
        """
        compact, dense = self._split(grads)
        norms = [torch.stack(torch._foreach_norm(compact))] if compact else []
        if len(compact) < len(grads):
            pieces = self.exp_avg.new_empty(-(-self.index.nnz // PIECE), PIECE, dtype=self._wide)
            out, rest = pieces.view(-1).split([self.index.nnz, pieces.numel() - self.index.nnz])
            rest.zero_()
            if not compact and self._plain(grads) and not self._is_wide:
                torch.ops.talos.gather_grad_(out, grads, self.index.buffers, False)
            else:
                gather_grad_(out, dense, self.index)
            norms.append(torch.linalg.vector_norm(pieces, dim=1))
        total = torch.cat(norms).square().sum()
        return reduced(total, "sum", self.over)

    @property
    def _is_wide(self) -> bool:
        """Whether the weights are float64, for which the references run."""
        return self.dtype == torch.float64

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of arithmetic on the weights: float32, or float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def scale_gradients(self, grads: list[Tensor], coefficient: Tensor) -> None:
        """Multiply the gradients by a 0-dim tensor in place; `grads` come from `check`.

        An expanded gradient, whose entries share memory, is replaced by a copy.
        """
        for i, (param, grad) in enumerate(zip(self.params.values(), grads, strict=True)):
            if not grad.is_contiguous() and 0 in grad.stride():
                param.grad = whole = _grad(param).contiguous()
                grads[i] = local(whole)
        # Without `absent`, whose dtype may differ: torch would then scale them one by one.
        if given := [grad for grad in grads if grad is not self.absent]:
            torch._foreach_mul_(given, coefficient.to(self.index.device))

    def zero_compact(self) -> bool:
        """Fill the compact gradients with zeros; return whether all gradients are compact."""
        if not self.compacted:
            return False
        grads = [grad for grad in map(_grad, self.params.values()) if grad is not None]
        compact = [grad.entries for grad in grads if isinstance(grad, CompactGradient)]
        if compact:
            torch._foreach_zero_(compact)
        return len(compact) == len(grads)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Return the weights at the selected entries, from their masters where these hold."""
        weights = self._gathered()
        if self.master is None:
            return weights
        # As in the step: a weight that other code wrote wins over its master.
        ours = self.master.to(self.dtype).float() == weights
        return torch.where(ours, self.master, weights)

    def _gathered(self) -> Tensor:
        """Return the weights at the selected entries, as the model has them, wide."""
        weights = torch.zeros(self.index.nnz, dtype=self._wide, device=self.index.device)
        gather_grad_(weights, self.held, self.index)
        return weights

    def weights_by_name(self) -> dict[str, Tensor]:
        """Return the weights at the selected entries of each tensor."""
        return self._by_name(self.weights())

    @torch.no_grad()
    def own_weights_by_name(self) -> dict[str, Tensor]:
        """Return the same with the bits that the model has, in its dtype."""
        return self._by_name(self._gathered().to(self.dtype))

    def _by_name(self, weights: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.params, weights.split(self.index.nnzs), strict=True))


def _captured(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is recording on the tensor's device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _rows(param: Tensor, index: Index) -> slice:
    """Return the range of rows, along dimension 0, that holds the selected entries."""
    if param.dim() < 2 or index.nnz in (0, param.numel()):
        return slice(0, len(param) if param.dim() else 1)
    (part,) = index.unpack()
    some = part.decode().view(len(param), -1).any(1).nonzero()
    return slice(int(some[0]), int(some[-1]) + 1)
