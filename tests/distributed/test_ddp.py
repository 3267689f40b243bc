"""Data parallel training: the same weights as one process, with only selected entries sent."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from talos import (
    Mask,
    SparseAdam,
    TalosError,
    average_gradients,
    reduce_selected,
)
from talos.distributed import check_same, rank, world_size
from talos.optim.compact_gradient import CompactGradient
from tests.cases import assert_bit_equal, assert_close
from tests.distributed.processes import in_processes

STEPS, ROWS = 3, 2
SETTINGS = ("", "gradient_as_bucket_view", "find_unused_parameters", "static_graph")


class Model(nn.Module):
    """An embedding, linear layers and a weight that is used transposed; a layer is never used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.up = nn.Embedding(10, 8), nn.Linear(8, 40)
            self.norm, self.down, self.head = nn.LayerNorm(40), nn.Linear(40, 8), nn.Linear(8, 3)
            self.turned = nn.Parameter(torch.randn(6, 8).t())
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(self.norm(self.up(self.embed(tokens)).relu())).tanh()
        output: Tensor = self.head(hidden.mean(1) + (hidden @ self.turned).sum((1, 2))[:, None])
        return output


def mask_of(model: nn.Module, seed: int = 1) -> Mask:
    """Selects a part of four tensors, a whole one, and nothing elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    densities = {"embed.weight": 0.3, "up.weight": 0.03, "down.weight": 0.1, "turned": 0.5}
    shapes = {name: param.shape for name, param in model.named_parameters()}
    chosen = {n: torch.rand(shapes[n], generator=generator) < d for n, d in densities.items()}
    return Mask.from_dense(chosen | {"up.bias": torch.ones(40) > 0})


def batches(accumulate: int) -> list[list[tuple[Tensor, Tensor]]]:
    """The batches of each step, in the order of ranks and accumulation."""
    generator = torch.Generator().manual_seed(2)
    many = accumulate * 12  # as many for each number of ranks
    return [
        [
            (torch.randint(10, (ROWS, 5), generator=generator),
             torch.randint(3, (ROWS,), generator=generator))
            for _ in range(many)
        ]
        for _ in range(STEPS)
    ]  # fmt: skip


def train(
    ranks: int,
    *,
    wrap: Callable[[nn.Module, SparseAdam], nn.Module] = lambda model, optimizer: model,
    own: int | None = None,
    dtype: torch.dtype = torch.float32,
    compact: bool = False,
    accumulate: int = 1,
    average: bool = False,
    keep: bool = False,
) -> tuple[Tensor, SparseAdam]:
    """Train and return the task vector's values; without `own` on the batches of all ranks."""
    model = Model(dtype)
    optimizer = SparseAdam(model, mask_of(model), lr=1e-2, weight_decay=0.1)
    if compact:
        optimizer.compact_gradients()
    net = wrap(model, optimizer)
    for every in batches(accumulate):
        optimizer.zero_grad(set_to_none=not keep)
        given = [every[i::ranks] for i in (range(ranks) if own is None else [own])]
        mine = [each for part in given for each in part[:accumulate]]
        for number, (tokens, labels) in enumerate(mine):
            last = number == len(mine) - 1
            waits = isinstance(net, DistributedDataParallel) and not last
            with net.no_sync() if waits else nullcontext():
                (cross_entropy(net(tokens), labels) / len(mine)).backward()
        if average:
            average_gradients(optimizer)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    return optimizer.task_vector().values, optimizer


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the number of elements of each all-reduce."""
    sizes: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def hooked(model: nn.Module, optimizer: SparseAdam, **settings: Any) -> nn.Module:
    wrapped = plain(model, optimizer, **settings)
    reduce_selected(wrapped, optimizer)
    return wrapped


def plain(model: nn.Module, _: SparseAdam, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=0.001, **settings)


def trainings(dtype: torch.dtype) -> dict[tuple[Any, ...], Tensor]:
    """Train in every way; return task vectors by way, accumulation, compactness and settings."""
    size, own = world_size(), rank()
    found = {}
    for accumulate, compact in itertools.product((1, 2), (False, True)):
        how = {"dtype": dtype, "accumulate": accumulate, "compact": compact}
        key = (accumulate, compact)
        found["one", *key, ""], _ = train(size, **how)
        found["average", *key, ""], _ = train(size, own=own, average=True, **how)
        for option, way in itertools.product(SETTINGS if size == 2 else [""], (plain, hooked)):
            if option != "static_graph" or accumulate == 1:  # torch refuses no_sync there
                wrap = partial(way, **({option: True} if option else {}))
                found[way.__name__, *key, option], _ = train(size, own=own, wrap=wrap, **how)
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_train_as_one_process_does(size: int) -> None:
    dtype = torch.float32 if size == 2 else torch.float64
    results = in_processes(size, trainings, dtype)
    for found in results:
        for (way, accumulate, compact, option), values in found.items():
            assert_bit_equal(values, results[0][way, accumulate, compact, option])
            assert_close(values, found["one", accumulate, compact, ""], reduction=True)
            if size == 2 and way != "one":  # a sum of two has one order
                compact = compact and option != "gradient_as_bucket_view"  # DDP's own are dense
                assert_bit_equal(values, found["plain", accumulate, compact, ""])
                if accumulate == 1:
                    assert_bit_equal(values, found["one", 1, compact, ""])


def gradients_of_a_step() -> None:
    """Check what is sent, and what the gradients hold afterwards."""
    torch.manual_seed(rank())
    inputs = torch.randint(10, (ROWS, 5)), torch.randint(3, (ROWS,))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Model(dtype)
        optimizer = SparseAdam(model, mask := mask_of(model))
        group = dist.new_group(backend="gloo")
        wrapped = DistributedDataParallel(model, process_group=group)
        cross_entropy(wrapped(inputs[0]), inputs[1]).backward()
        expected = {name: param.grad for name, param in model.named_parameters()}
        optimizer.zero_grad()
        wrapped = DistributedDataParallel(model, process_group=group)
        reduce_selected(wrapped, optimizer)
        with counted() as sizes:
            cross_entropy(wrapped(inputs[0]), inputs[1]).backward()
        assert sizes == [mask.nnz]
        for name, param in model.named_parameters():
            if param.grad is None:
                continue
            selected = mask.to_dense(name)
            assert_bit_equal(param.grad[selected], expected[name][selected])
            assert not param.grad[~selected].any()
            param.grad = None
        optimizer.compact_gradients()
        cross_entropy(wrapped(inputs[0]), inputs[1]).backward()
        for name, param in model.named_parameters():
            if param.requires_grad:
                assert isinstance(param.grad, CompactGradient)
                assert_bit_equal(param.grad.entries.to(dtype), expected[name][mask.to_dense(name)])


def test_a_bucket_is_one_call_and_other_entries_become_zero() -> None:
    in_processes(2, gradients_of_a_step)


def other_parameters() -> None:
    """Parameters of another optimizer are averaged whole, and NaN elsewhere does no harm."""
    layers = {name: nn.Linear(4, 4, bias=False) for name in "ab"}
    model = nn.Sequential(OrderedDict(layers))
    mask = Mask.from_dense({"a.weight": torch.eye(4) > 0})
    optimizer = SparseAdam({"a.weight": model.a.weight}.items(), mask)
    older = optimizer.state_dict()
    del older["state"][0]["base"]  # it does not know the initial weights
    optimizer.load_state_dict(older)
    wrapped = DistributedDataParallel(model)
    reduce_selected(wrapped, optimizer)
    with pytest.raises(TalosError, match=r"ddp must have no communication hook yet, got one \("):
        reduce_selected(wrapped, optimizer)
    torch.manual_seed(rank())
    spread = model.a.weight.register_hook(
        lambda grad: grad.fill_diagonal_(rank()) / (torch.eye(4) > 0)
    )
    wrapped(torch.randn(3, 4)).sum().backward()
    assert_bit_equal(model.a.weight.grad, torch.eye(4) / 2)
    grad = model.b.weight.grad
    assert grad.count_nonzero() == 16
    check_same({"gradient": grad.tolist()}, "")
    spread.remove()
    optimizer.release()  # from here on whole gradients are averaged
    model.zero_grad()
    wrapped(torch.randn(3, 4)).sum().backward()
    grad = model.a.weight.grad
    assert grad.count_nonzero() == 16
    check_same({"gradient": grad.tolist()}, "")


def missing_gradients() -> None:
    """A gradient that only some ranks have is averaged; one that none has stays None."""
    for compact in (False, True):
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
        mask = Mask.from_dense({f"{name}.weight": torch.eye(2) > 0 for name in "abc"})
        optimizer = SparseAdam(model, mask)
        if compact:
            optimizer.compact_gradients()
        (
            model["a"](torch.ones(1, 2)) + (model["b"](torch.ones(1, 2)) * 4 if rank() else 0)
        ).sum().backward()
        average_gradients(optimizer)
        assert [type(each.weight.grad) is CompactGradient for each in model.values()] == [
            compact, compact, False
        ]  # fmt: skip
        entries = [each.weight.grad for each in (model["a"], model["b"])]
        assert [each.diagonal().tolist() for each in entries] == [[1, 1], [2, 2]]
        assert model["c"].weight.grad is None


def refusals() -> list[str]:
    """Return what each wrong use says."""
    model = nn.Linear(4, 4)
    mask = Mask.from_dense({"weight": torch.eye(4) > 0})
    wrapped = partial(DistributedDataParallel, model)
    said = []

    def note(call: Callable[[], object]) -> None:
        with pytest.raises(TalosError) as caught:
            call()
        said.append(str(caught.value))

    optimizer = SparseAdam(model, mask)
    note(lambda: reduce_selected(model, optimizer))
    note(lambda: reduce_selected(wrapped(), torch.optim.SGD(model.parameters())))
    note(lambda: reduce_selected(wrapped(), SparseAdam(nn.Linear(4, 4), mask)))
    optimizer.release()
    own = Mask.from_dense({"weight": torch.arange(16).view(4, 4) % 5 == rank()})
    optimizer = SparseAdam(model, own)
    note(lambda: reduce_selected(wrapped(), optimizer))
    optimizer.release()
    words = nn.Embedding(4, 4, sparse=True)
    words(torch.tensor([1])).sum().backward()
    note(lambda: average_gradients(SparseAdam(words, mask)))
    torch.manual_seed(rank())
    nn.init.normal_(model.weight)
    optimizer = SparseAdam(model, mask)
    note(lambda: reduce_selected(wrapped(), optimizer))
    optimizer.release()
    optimizer = SparseAdam(fully_shard(nn.Linear(4, 4)), mask)
    note(optimizer.compact_gradients)
    return said


def uses() -> list[str]:
    other_parameters()
    missing_gradients()
    return refusals()


def test_wrong_uses_are_refused_on_every_rank() -> None:
    first, second = in_processes(2, uses)
    assert first == second
    for said, part in zip(first, REFUSALS, strict=True):
        assert re.search(part, said), said


REFUSALS = (
    "ddp must be a DistributedDataParallel, got Linear",
    "optimizer must be a SparseAdam, got SGD",
    "optimizer must train parameters of ddp, got those of another model",
    r"mask must be the same on all ranks, got '\w+' on rank 0 and '\w+' on rank 1; load one file",
    "gradients must be dense, got torch.sparse_coo of a parameter of shape",
    r"the initial weight must be the same on all ranks, got .* on rank 1; load the same weights",
    "gradients of sharded parameters must stay dense, got weight",
)
