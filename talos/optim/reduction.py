"""Averages of gradients over ranks that send the selected entries only.

    entries[rank(t, j)] = sum over ranks of (grads[t][j] / ranks)       for every selected entry j

`reduce_selected` is a communication hook of DistributedDataParallel: each of its buckets is one
all-reduce of the selected entries. `average_gradients` needs no wrapper: one all-reduce a dtype
and device. Neither sends an index, because each rank has the mask.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from talos.distributed import check_same, is_sharded, world_size
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.optim.compact_gradient import CompactGradient
from talos.optim.sharded_states import check_same_weights
from talos.optim.sparse_adam import SparseAdam
from talos.optim.watching import at_work
from talos_kernels import Index, TensorIndex, gather_grad_, scatter_

__all__ = ["average_gradients", "reduce_selected"]


def reduce_selected(ddp: nn.parallel.DistributedDataParallel, optimizer: SparseAdam) -> None:
    """Let DistributedDataParallel average the selected entries of each gradient only.

    Each bucket is gathered, averaged and written back. The selected entries are those that DDP
    makes without this, with the same bits where the order of the sums is the same, as on two ranks.
    The others become zero. Gradients may be compact: DDP takes them and gives them back. Its
    buckets stay as large as the tensors that the mask selects from.

    Call it on every rank, once, after both are made and before the first backward. After
    `optimizer.release()` gradients are averaged whole.

    Args:
        ddp: the wrapped model.
        optimizer: made of the model before it was wrapped. Parameters of other optimizers are
            averaged whole.

    Raises:
        TalosRuntimeError: `ddp` has a communication hook.
        TalosTypeError: `ddp` is no DistributedDataParallel, or `optimizer` no SparseAdam.
        TalosValueError: the optimizer trains nothing of the model; or masks or initial weights
            differ between ranks, which every rank raises.

    Example:
        >>> import tempfile
        >>> from talos import Mask
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     meet = f"file://{folder}/meet"
        ...     dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
        ...     model = nn.Linear(2, 2, bias=False)
        ...     mask = Mask.from_dense({"weight": torch.eye(2) > 0})
        ...     optimizer = SparseAdam(model, mask)
        ...     ddp = nn.parallel.DistributedDataParallel(model)
        ...     reduce_selected(ddp, optimizer)
        ...     ddp(torch.tensor([[1.0, 2.0]])).sum().backward()
        ...     dist.destroy_process_group()
        >>> model.weight.grad
        tensor([[1., 0.],
                [0., 2.]])
    """
    if not isinstance(ddp, nn.parallel.DistributedDataParallel):
        raise TalosTypeError(
            f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}; wrap the model "
            "after the optimizer is made"
        )
    if not isinstance(optimizer, SparseAdam):
        raise TalosTypeError(f"optimizer must be a SparseAdam, got {type(optimizer).__name__}")
    names = {
        param: name
        for group in optimizer.param_groups
        for param, name in zip(group["params"], group["param_names"], strict=True)
    }
    if names.keys().isdisjoint(ddp.parameters()):
        raise TalosValueError(
            "optimizer must train parameters of ddp, got those of another model; make it of the "
            "module that ddp wraps"
        )
    group = ddp.process_group
    check_same(
        {"mask": optimizer.mask.fingerprint},
        "load one file on all ranks, or calibrate on all together",
        group,
    )
    check_same_weights(optimizer._base.fingerprints, group)
    indices = {param: optimizer.mask.indices[name] for param, name in names.items()}
    selected = _Selected(optimizer, indices, group)
    try:
        ddp.register_comm_hook(None, lambda _, bucket: selected.reduce(bucket))
    except RuntimeError as error:
        raise TalosRuntimeError(
            f"ddp must have no communication hook yet, got one ({error!s:.80}); call "
            "reduce_selected once, and for another optimizer wrap the model anew"
        ) from error


class _Selected:
    """The communication hook.

    Args:
        optimizer: it trains the parameters; once it is released all entries count.
        indices: the selected entries of each parameter; those of others all count.
        group: the ranks.
    """

    def __init__(
        self,
        optimizer: SparseAdam,
        indices: dict[Tensor, TensorIndex],
        group: dist.ProcessGroup,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._indices, self._group = indices, group
        # DDP makes its buckets anew after the first backward.
        self._packed: dict[int, tuple[list[int], Index]] = {}

    def reduce(self, bucket: Any) -> Future[Tensor]:
        """Average the selected entries of a `GradBucket`; it holds zeros elsewhere then."""
        params = bucket.parameters()
        buffer: Tensor = bucket.buffer()
        index = self._index(bucket.index(), params)
        grads = list(map(_laid_out, bucket.gradients(), params))
        wide = torch.promote_types(buffer.dtype, torch.float32)
        entries = torch.empty(index.nnz, dtype=wide, device=buffer.device)
        gather_grad_(entries, grads, index)
        entries = entries.to(buffer.dtype).mul_(1 / world_size(self._group))

        def put_back(averaged: Any) -> Tensor:
            buffer.zero_()
            scatter_(grads, index, averaged.value()[0])
            return buffer

        work = dist.all_reduce(entries, group=self._group, async_op=True)
        future: Future[Tensor] = work.get_future().then(put_back)
        return future

    def _index(self, number: int, params: list[Tensor]) -> Index:
        if self._indices and not at_work(self._optimizer()):
            self._indices, self._packed = {}, {}
        held = list(map(id, params))
        if number not in self._packed or self._packed[number][0] != held:
            parts = [self._indices.get(param) or _every(param) for param in params]
            self._packed[number] = held, Index.pack(parts, params[0].device)
        return self._packed[number][1]


def _laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient of a bucket in its parameter's strides, in which DDP keeps it there."""
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(param)
    return grad.as_strided(param.shape, param.stride(), grad.storage_offset()) if dense else grad


def _every(param: Tensor) -> TensorIndex:
    return TensorIndex.encode(torch.ones(param.shape, dtype=torch.bool, device="cpu"))


@torch.no_grad()
def average_gradients(
    optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
) -> None:
    """Average the gradients of an optimizer over all ranks, in one all-reduce a dtype and device.

    For a model without a wrapper, after the last backward of a step and before clipping. All ranks
    call it. Compact gradients are sent as they are: 4 bytes a selected entry, and no memory beside
    them is dense (`SparseAdam.compact_gradients`). A gradient that only some ranks have counts as
    zero on the others. Sharded gradients are left as they are: FSDP2 has averaged them.

    Args:
        optimizer: any; the parameters of its groups, the same on every rank.
        group: the ranks; None: all.

    Raises:
        TalosTypeError: a gradient is sparse.

    Example:
        >>> from talos import Mask
        >>> model = nn.Linear(2, 2, bias=False)
        >>> optimizer = SparseAdam(model, Mask.from_dense({"weight": torch.eye(2) > 0}))
        >>> optimizer.compact_gradients()
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()  # each rank on a batch of its own
        >>> average_gradients(optimizer)
        >>> model.weight.grad.entries
        tensor([1., 2.])
    """
    ranks = world_size(group)
    if ranks == 1:
        return
    every = [param for each in optimizer.param_groups for param in each["params"]]
    params = [param for param in every if param.requires_grad and not is_sharded(param)]
    missing = [param for param in params if param.grad is None]
    for param in missing:
        torch.autograd.backward(param, torch.zeros_like(param))  # compact where that is asked for
    absent = set(map(id, missing))
    for alike in _alike(params):
        tensors = [_held(param) for param in alike]
        there = tensors[0].new_tensor([float(id(param) not in absent) for param in alike])
        flat = torch.cat([*(each.reshape(-1) for each in tensors), there]).mul_(1 / ranks)
        dist.all_reduce(flat, group=group)
        *averaged, there = flat.split([*(each.numel() for each in tensors), len(alike)])
        for param, tensor, mean, some in zip(alike, tensors, averaged, there.tolist(), strict=True):
            if some:
                tensor.copy_(mean.view(tensor.shape))
            else:
                param.grad = None


def _alike(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Return the parameters whose gradients have one device and dtype together."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        held = _held(param)
        found.setdefault((held.device, held.dtype), []).append(param)
    return found.values()


def _held(param: Tensor) -> Tensor:
    """Return what holds a gradient in memory."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TalosTypeError(
            f"gradients must be dense, got {grad.layout} of a parameter of shape "
            f"{tuple(param.shape)}; make the embedding with sparse=False"
        )
    return grad.entries if isinstance(grad, CompactGradient) else grad
