"""`SparseAdam` on models that FSDP2 shards, against one process that has the whole batch.

The rows of the model are divided unevenly, and one bias has fewer entries than there are ranks.
Gradients are sums over two halves of the batch. With two ranks their order is that of one process
which adds up the halves, so the bits are equal.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from talos import Mask, SparseAdam, TaskVector
from talos.distributed import local, rank, whole, world_size
from tests.cases import assert_bit_equal, assert_close
from tests.distributed.processes import in_processes

STEPS = 4


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 1)).to(dtype)


def some(model: nn.Module) -> Mask:
    """Half of the entries; none in one bias, and in another tensor only its last row."""
    draw = torch.Generator().manual_seed(3)
    dense = {n: torch.rand(p.shape, generator=draw) < 0.5 for n, p in model.named_parameters()}
    dense["0.bias"][:] = False
    dense["2.weight"][:-1] = False
    dense["3.bias"][:] = True
    return Mask.from_dense(dense)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def batches(steps: int, first: int = 0) -> Iterator[Tensor]:
    for step in range(first, first + steps):
        yield torch.randn(12, 6, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, optimizer: Any, steps: int = STEPS, *, ranks: int = 1, first: int = 0
) -> None:
    """Train with the mean over `ranks` parts of each batch: one after another, or this rank's."""
    dtype = next(model.parameters()).dtype
    for batch in batches(steps, first):
        optimizer.zero_grad()
        parts = batch.to(dtype).chunk(ranks)
        if world_size() > 1:
            (model(parts[rank()]).square().mean()).backward()
        else:
            for part in parts:
                model(part).square().mean().backward()
            for param in model.parameters():
                if param.grad is not None:
                    param.grad /= ranks
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(local(p), p).clone() for name, p in model.named_parameters()}


CASES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"weight_decay": 0.1}),
    (torch.bfloat16, {}),
]


def trained() -> list[tuple[dict[str, Tensor], TaskVector]]:
    found = []
    for dtype, options in CASES:
        model = shard(network(dtype))
        optimizer = SparseAdam(model, some(network()), lr=1e-2, **options)
        train(model, optimizer, ranks=world_size())
        found.append((weights(model), optimizer.task_vector()))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharded_training_equals_one_process(size: int) -> None:
    found = in_processes(size, trained)
    for case, (dtype, options) in enumerate(CASES):
        model = network(dtype)
        optimizer = SparseAdam(model, some(network()), lr=1e-2, **options)
        train(model, optimizer, ranks=size)
        vector = optimizer.task_vector()
        for theirs, other in (each[case] for each in found):
            assert other.mask == vector.mask
            assert other.fingerprints == vector.fingerprints
            for name, param in model.named_parameters():
                if size == 2:
                    assert_bit_equal(theirs[name], param.detach())
                assert_close(theirs[name], param.detach(), reduction=True)
            if size == 2:
                assert_bit_equal(other.values, vector.values)
