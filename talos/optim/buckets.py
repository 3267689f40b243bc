"""The flat state of all tensors of one param group, device and dtype: what one launch steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.optim.compact_gradient import CompactGradient
from talos.optim.compaction import CompactedParam
from talos_kernels import Index, gather_grad_, sparse_adam_
from talos_kernels.sparse_adam import sparse_adam_rows_

__all__ = ["Bucket"]

# Lists of these are compared as a whole: one tensor after another would take longer than a launch.
_look = attrgetter("dtype", "device", "shape", "layout")
_grad, _entries, _selection = attrgetter("grad"), attrgetter("entries"), attrgetter("selection")
_row_major = Tensor.is_contiguous
# Entries whose norm is taken at once: torch adds float32 one after another on a CPU.
PIECE = 1 << 14
Look = tuple[torch.dtype, torch.device, torch.Size, torch.layout]


@dataclass(eq=False)
class Bucket:
    """Tensors that are stepped together, and their state in rank order.

    Attributes:
        group: number of their param group.
        params: by name, in the order of the index; one device and dtype.
        looks: what each of them was when the bucket was made.
        index: the selected entries, on their device.
        exp_avg: float32 or bfloat16 `[nnz]`, first moment; float64 for float64 weights.
        exp_avg_sq: `[nnz]` of the same dtype, second moment.
        master: float32 `[nnz]`, the weights before rounding; None for weights that need none.
        steps: float32 `[tensors]`, steps that each tensor has taken.
        lr: float64 0-dim, the learning rate on the device.
        lr_value: the number that `lr` holds, so that it is uploaded only when it changes.
        base: `[nnz]` on the CPU, of the tensors' dtype or that of a checkpoint: the initial
            weights.
        compacted: the parameters whose gradients are kept compact; none where they are not.
        absent: stands for a gradient that is None.
        accepted: the looks of the gradients that `check` has accepted last.
        uniform: whether those have one dtype, which the step takes as it is.
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
    lr_value: float | None
    base: Tensor
    absent: Tensor
    compacted: dict[str, CompactedParam] = field(default_factory=dict)
    accepted: list[Look] = field(default_factory=list)
    uniform: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: hooks stay with the parameters that have them."""
        return {**self.__dict__, "compacted": {}}

    @classmethod
    @torch.inference_mode(False)  # the state outlives the caller's mode
    def create(
        cls,
        group: int,
        params: dict[str, Tensor],
        mask: Mask,
        moment_dtype: torch.dtype = torch.float32,
    ) -> "Bucket":
        """State of zeros for these tensors, whose names are the mask's."""
        first = next(iter(params.values()))
        index = mask.pack(list(params), first.device)
        wide = torch.promote_types(first.dtype, torch.float32)
        weights = torch.empty(index.nnz, dtype=wide, device=first.device)
        with torch.no_grad():
            gather_grad_(weights, list(params.values()), index)
        if wide == torch.float64:
            moment_dtype = wide
        return cls(
            group,
            params,
            list(map(_look, params.values())),
            index,
            torch.zeros_like(weights, dtype=moment_dtype),
            torch.zeros_like(weights, dtype=moment_dtype),
            weights if first.dtype != wide else None,
            torch.zeros(len(params), dtype=torch.float32, device=first.device),
            torch.zeros((), dtype=torch.float64, device=first.device),
            None,
            weights.to("cpu", first.dtype, copy=True),
            weights.new_empty(0),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.looks[0][0]

    @property
    def is_moved(self) -> bool:
        """Whether a weight has another device or dtype than the state was made for."""
        kinds = [look[:2] for look in self.looks]
        return [_look(param)[:2] for param in self.params.values()] != kinds

    @torch.no_grad()
    def fill(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Take over state by parameter; where there is none it stays as a new bucket's."""
        parts = zip(self.params.values(), self.index.slices, strict=True)
        for i, (param, entries) in enumerate(parts):
            given = states.get(param)
            if not given:
                continue
            self.steps[i] = given["step"]
            self.exp_avg[entries].copy_(given["exp_avg"])
            self.exp_avg_sq[entries].copy_(given["exp_avg_sq"])
            if self.master is not None and "master" in given:
                self.master[entries].copy_(given["master"])

    def bases(self) -> dict[str, Tensor]:
        """The initial weights by name: views of `base`."""
        return {
            name: self.base[entries]
            for name, entries in zip(self.params, self.index.slices, strict=True)
        }

    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """Each tensor's part of the flat state, as `Optimizer.state` holds it."""
        state = {}
        for i, (param, entries) in enumerate(
            zip(self.params.values(), self.index.slices, strict=True)
        ):
            state[param] = {
                "step": self.steps[i],
                "exp_avg": self.exp_avg[entries],
                "exp_avg_sq": self.exp_avg_sq[entries],
            }
            if self.master is not None:
                state[param]["master"] = self.master[entries]
        return state

    def check(self) -> list[Tensor]:
        """Refuse tensors and gradients that are no longer what the state belongs to.

        Returns:
            What holds each tensor's gradient: a dense tensor, the entries of a compact one, or
            `absent`.
        """
        if list(map(_look, self.params.values())) != self.looks:
            self._refuse_params()
        grads = list(map(_grad, self.params.values()))
        kinds = set(map(type, grads))
        selections = [own.index for own in self.compacted.values()]
        if kinds == {CompactGradient} and list(map(_selection, grads)) == selections:
            grads = list(map(_entries, grads))
        elif kinds != {Tensor}:
            grads = [self._held(name, grad) for name, grad in zip(self.params, grads, strict=True)]
        looks = list(map(_look, grads))
        if looks != self.accepted:
            self._check_gradients(grads)
            self.accepted = looks
        return grads

    def _refuse_params(self) -> None:
        """Say which parameter is no longer what it was."""
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
        """What holds a gradient of any kind."""
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
        """Refuse a gradient that is not what its parameter needs."""
        for (name, param), nnz, grad in zip(
            self.params.items(), self.index.nnzs, grads, strict=True
        ):
            if isinstance(param.grad, CompactGradient):
                _check_entries(name, grad, torch.Size((nnz,)), param)
            elif grad is not self.absent:
                _check_gradient(name, param, grad)
        dtypes = {grad.dtype for grad in grads if grad is not self.absent}
        self.uniform = dtypes <= {self.dtype} or (dtypes <= {torch.float32} and not self._is_wide)

    def compact_gradients(self, sampled: bool) -> list[CompactedParam]:
        """Where each tensor's gradient goes, made anew."""
        self.compacted = {
            name: CompactedParam(param, index, _rows(param, index), sampled)
            for (name, param), index in zip(self.params.items(), self.index.split(), strict=True)
        }
        return list(self.compacted.values())

    def step(
        self,
        grads: list[Tensor],
        group: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip_factor: Tensor | None,
    ) -> None:
        """One step of the tensors that have a gradient, which `check` has returned."""
        self._upload_lr(group["lr"])
        params = list(self.params.values())
        given: Sequence[Tensor | None] = grads
        step: Callable[..., None] = sparse_adam_rows_
        if not (all(map(_row_major, params)) and self._plain(grads)):
            step, given = sparse_adam_, [None if each is self.absent else each for each in grads]
        step(
            params,
            given,
            self.index,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            lr=self.lr,
            betas=tuple(map(float, group["betas"])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            master=self.master,
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip_factor=clip_factor,
            seed=int(group["seed"]),
        )

    def _plain(self, grads: list[Tensor]) -> bool:
        """Whether the ops take these gradients as they are."""
        return self.uniform and all(map(_row_major, grads))

    def _upload_lr(self, lr: float | Tensor) -> None:
        """Write the rate to the device: a number when it changed, a tensor of it each time."""
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            self.lr.copy_(lr.reshape(()))
            self.lr_value = None
            return
        value = float(lr.item() if isinstance(lr, Tensor) else lr)
        if value != self.lr_value:
            if _captured(self.lr):  # each replay would write it anew
                raise TalosRuntimeError(
                    f"lr must be a tensor on the device while a CUDA graph is captured, or the "
                    f"number of the step before, {self.lr_value}, got {value}; step once before "
                    "the capture"
                )
            self.lr.fill_(value)
            self.lr_value = value

    def densify_gradients(self) -> None:
        """Back to dense gradients."""
        for param in self.params.values():
            if isinstance(param.grad, CompactGradient):
                param.grad = param.grad.to_dense()
        self.compacted = {}

    def _split(self, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """The entries of compact gradients; each tensor's dense one, None where it has none."""
        compact = [isinstance(param.grad, CompactGradient) for param in self.params.values()]
        dense = [
            None if is_compact or grad is self.absent else grad
            for grad, is_compact in zip(grads, compact, strict=True)
        ]
        return list(compress(grads, compact)), dense

    def squared_norm(self, grads: list[Tensor]) -> Tensor:
        """The sum of squares over the selected entries of what `check` has returned, 0-dim."""
        compact, dense = self._split(grads)
        norms = [torch.stack(torch._foreach_norm(compact))] if compact else []
        if len(compact) < len(grads):
            rows = -(-self.index.nnz // PIECE)
            pieces = self.exp_avg.new_empty(rows, PIECE, dtype=self._wide)
            out, rest = pieces.view(-1).split([self.index.nnz, pieces.numel() - self.index.nnz])
            rest.zero_()
            if not compact and self._plain(grads) and not self._is_wide:
                torch.ops.talos.gather_grad_(out, grads, self.index.buffers, False)
            else:
                gather_grad_(out, dense, self.index)
            norms.append(torch.linalg.vector_norm(pieces, dim=1))
        return torch.cat(norms).square().sum()

    @property
    def _is_wide(self) -> bool:
        """Whether the weights are float64, which the references serve."""
        return self.dtype == torch.float64

    @property
    def _wide(self) -> torch.dtype:
        """Of arrays of the selected entries that are no narrower than those."""
        return torch.promote_types(self.dtype, torch.float32)

    def scale_gradients(self, grads: list[Tensor], coefficient: Tensor) -> None:
        """Multiply what `check` has returned by a 0-dim tensor, in place.

        A gradient whose entries share memory, an expanded one, is replaced by a copy.
        """
        for i, (param, grad) in enumerate(zip(self.params.values(), grads, strict=True)):
            if not grad.is_contiguous() and 0 in grad.stride():
                param.grad = grads[i] = grad.contiguous()
        # Of one dtype, which `absent` need not have: torch would go through them one by one.
        if given := [grad for grad in grads if grad is not self.absent]:
            torch._foreach_mul_(given, coefficient.to(self.index.device))

    def zero_compact(self) -> bool:
        """Fill the compact gradients with zeros; whether there are none but those."""
        if not self.compacted:
            return False
        grads = [grad for grad in map(_grad, self.params.values()) if grad is not None]
        compact = [grad.entries for grad in grads if isinstance(grad, CompactGradient)]
        if compact:
            torch._foreach_zero_(compact)
        return len(compact) == len(grads)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Current minus initial weights of each tensor: float32 `[nnz]`, on the CPU."""
        weights = self.exp_avg.new_empty(self.index.nnz, dtype=self._wide)
        gather_grad_(weights, list(self.params.values()), self.index)
        if self.master is not None:  # a weight that somebody else wrote wins, as in the step
            ours = self.master.to(self.dtype).float() == weights
            weights = torch.where(ours, self.master, weights)
        delta = (weights.cpu() - self.base.to(weights.dtype)).float()
        return {
            name: delta[entries]
            for name, entries in zip(self.params, self.index.slices, strict=True)
        }


def _captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is done with a tensor, instead of doing it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _rows(param: Tensor, index: Index) -> slice:
    """From the first row of dimension 0 to behind the last in which an entry is selected."""
    if param.dim() < 2 or index.nnz in (0, param.numel()):
        return slice(0, len(param) if param.dim() else 1)
    (part,) = index.unpack()
    some = part.decode().view(len(param), -1).any(1).nonzero()
    return slice(int(some[0]), int(some[-1]) + 1)


def _check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise TalosTypeError(
            f"{name}.grad must be dense, got {grad.layout}; "
            "this optimizer takes dense gradients and trains a sparse selection"
        )
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16, param.dtype):
        raise TalosTypeError(f"{name}.grad must be float32, bfloat16 or float16, got {grad.dtype}")
    if grad.shape != param.shape or grad.device != param.device:
        raise TalosValueError(
            f"{name}.grad must be {tuple(param.shape)} on {param.device}, "
            f"got {tuple(grad.shape)} on {grad.device}"
        )


def _check_entries(name: str, entries: Tensor, shape: torch.Size, param: Tensor) -> None:
    wide = torch.promote_types(param.dtype, torch.float32)
    if _look(entries) != (wide, param.device, shape, torch.strided):
        raise TalosValueError(
            f"{name}.grad.entries must be {wide} of shape {tuple(shape)} on {param.device}, got "
            f"{entries.dtype} of shape {tuple(entries.shape)} on {entries.device}; "
            "write them in place"
        )
