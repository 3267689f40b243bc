"""What data parallel training sends in a step: DDP of every weight, of touched tensors, ours.

The tensors of a real model lie in one module on each of two ranks (gloo); a step is a backward with
dense gradients and their average. Bytes are those handed to all-reduce by one rank. Two masks of
one model: the entries of Q and K, and a tenth of every tensor. No form sends an index, because each
rank has the mask. Times are for the ratios: between ranks of one machine sending costs little.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benches import measure
from benches.results import OURS, Record
from benches.shapes import SHAPES, ModelShape
from talos import Mask, SparseAdam, average_gradients, reduce_selected

RANKS, ROUNDS, DENSITY = 2, 7, 0.1
EVERY, TOUCHED, LOOP = "DDP, every weight", "DDP, touched tensors", "average_gradients, compact"


class Tensors(nn.Module):
    """A model's tensors, whose sum is the loss."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        for tensor in shape.tensors:
            weight = nn.Parameter(torch.zeros(tensor.shape))
            self.register_parameter(tensor.name.replace(".", "/"), weight)

    def forward(self, factor: Tensor) -> Tensor:
        parts = [(p * factor).sum() for p in self.parameters() if p.requires_grad]
        return torch.stack(parts).sum()


def mask_of(shape: ModelShape, spread: bool) -> Mask:
    generator = torch.Generator().manual_seed(0)
    if spread:
        sizes = {tensor.name: tensor.shape for tensor in shape.tensors}
        dense = {n: torch.rand(size, generator=generator) < DENSITY for n, size in sizes.items()}
    else:
        dense = shape.masks()
    return Mask.from_dense({name.replace(".", "/"): each for name, each in dense.items()})


@contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """Note the bytes that each all-reduce is given."""
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


def nothing() -> None:
    """Stand for an average that DDP has made in the backward."""


def forms(shape: ModelShape, mask: Mask) -> dict[str, tuple[Callable[[], object], nn.Module]]:
    """Return a step of each form, and its model."""
    factor = torch.tensor(float(dist.get_rank() + 1))

    def step(model: nn.Module, net: nn.Module, after: Callable[[], object]) -> None:
        model.zero_grad()
        net(factor).backward()
        after()

    found = {}
    for form in (EVERY, TOUCHED, OURS, LOOP):
        net = model = Tensors(shape)
        after: Callable[[], object] = nothing
        optimizer = None if form == EVERY else SparseAdam(model, mask)
        if form == LOOP:
            optimizer.compact_gradients()
            after = partial(average_gradients, optimizer)
        else:
            net = DistributedDataParallel(model)
            if form == OURS:
                reduce_selected(net, optimizer)
            else:  # what DDP does without a hook, where it can be counted
                net.register_comm_hook(None, allreduce_hook)
        found[form] = partial(step, model, net, after), model
    return found


def rank_of(number: int, name: str, spread: bool, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=number, world_size=RANKS)
    shape = SHAPES[name]
    mask = mask_of(shape, spread)
    steps, sent = forms(shape, mask), {form: list[int]() for form in (EVERY, TOUCHED, OURS, LOOP)}
    for form, (step, _) in steps.items():
        step()  # DDP makes its buckets anew after the first one
        with counted(sent[form]):
            step()
    for parameter in mask.names:
        selected = mask.to_dense(parameter)
        grads = [model.get_parameter(parameter).grad for _, model in steps.values()]
        assert all(torch.equal(grads[0][selected], g.to_dense()[selected]) for g in grads)
    times = measure.alternated({form: step for form, (step, _) in steps.items()}, ROUNDS)
    if number == 0:
        torch.save((sent, times, mask.nnz), Path(folder, "result"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("spread", [False, True], ids=["q-and-k", "spread"])
def bench_reduction(
    shape: ModelShape, spread: bool, keep: Callable[[Record], object], tmp_path: Path
) -> None:
    given = (shape.name, spread, str(tmp_path))
    torch.multiprocessing.spawn(rank_of, given, RANKS)
    sent, times, nnz = torch.load(tmp_path / "result")
    assert sum(sent[EVERY]) == 4 * shape.numel
    assert sum(sent[OURS]) == 4 * nnz
    where = "a tenth of every tensor" if spread else "Q and K"
    for form, sizes in sent.items():
        middle, width = measure.median_and_spread(times[form])
        keep(Record("reduction", f"{shape.name}, {where}", form, middle, width, sum(sizes)))
