"""`SparseAdam(..., shard_state=True)`: ranks with whole weights share the state."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from talos import Mask, SparseAdam, average_gradients
from talos.distributed import rank
from talos.errors import TalosRuntimeError, TalosValueError
from tests.cases import assert_bit_equal, assert_close
from tests.distributed.processes import in_processes


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def some() -> Mask:
    """Fewer entries of the last bias than ranks, and few of one weight."""
    draw = torch.Generator().manual_seed(3)
    model = network()
    dense = {n: torch.rand(p.shape, generator=draw) < 0.5 for n, p in model.named_parameters()}
    dense["2.bias"][:] = True
    return Mask.from_dense(dense)


def train(model: nn.Module, optimizer: SparseAdam, steps: int, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step + 10 * rank()))
        model(batch.to(dtype)).square().mean().backward()
        average_gradients(optimizer)
        optimizer.step()


def both(folder: Path) -> list[tuple[int, int]]:
    """Train with a state that ranks share and with one of each rank; return the bytes of both."""
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        models, optimizers = [], []
        for shared in (False, True):
            model = network(dtype)
            optimizer = SparseAdam(model, some(), lr=1e-2, weight_decay=0.1, shard_state=shared)
            optimizer.patch()
            train(model, optimizer, 3)
            models.append(model)
            optimizers.append(optimizer)
        whole, own = optimizers
        check_equal(models, optimizers)
        assert own.patch() == whole.patch()
        entries = sum(each["exp_avg"].numel() for each in own.state.values())
        sizes.append((entries, sum(each["exp_avg"].numel() for each in whole.state.values())))

        # Each state loads where the other was made.
        states = [each.state_dict() for each in optimizers]
        if dtype == torch.bfloat16:
            saved = get_optimizer_state_dict(models[1], own)
            dcp.save(saved, checkpoint_id=folder)
            fresh = SparseAdam(models[1], some(), shard_state=True)
            loaded = get_optimizer_state_dict(models[1], fresh)
            dcp.load(loaded, checkpoint_id=folder)
            states[1] = loaded
            own.release()
        else:  # what one rank saves is the whole state
            if rank() == 0:
                torch.save(states[1], folder.with_suffix(".pt"))
            dist.barrier()
            states[1] = torch.load(folder.with_suffix(".pt"), weights_only=True)
        again = []
        for model, state, shared in zip(models, reversed(states), (False, True), strict=True):
            resumed = SparseAdam(model, some(), shard_state=shared)
            resumed.load_state_dict(state)
            train(model, resumed, 2, first=3)
            again.append(resumed)
        check_equal(models, again)
        assert copy.deepcopy(again[1]).task_vector() == again[0].task_vector()
        norms = []
        for model, optimizer in zip(models, again, strict=True):
            model(torch.ones(2, 6, dtype=dtype)).sum().backward()
            norms.append(optimizer.clip_grad_norm_(1.0))
        assert_close(norms[1], norms[0], reduction=True)

    with pytest.raises(TalosRuntimeError, match="shard_state must be False with compact"):
        own.compact_gradients()
    differing = network()
    with torch.no_grad():
        differing[0].weight.add_(rank())
    with pytest.raises(TalosValueError, match=r"the initial .* must be the same on all ranks"):
        SparseAdam(differing, some(), shard_state=True)
    sharded = network()
    fully_shard(sharded)
    with pytest.raises(TalosValueError, match="shard_state must be False with sharded parameters"):
        SparseAdam(sharded, some(), shard_state=True)
    other = Mask.from_dense({"0.bias": torch.arange(7) == rank()})
    with pytest.raises(TalosValueError, match="mask must be the same on all ranks"):
        SparseAdam(network(), other, shard_state=True)
    return sizes


def check_equal(models: list[nn.Module], optimizers: list[SparseAdam]) -> None:
    for one, other in zip(*[model.parameters() for model in models], strict=True):
        assert_bit_equal(one.detach(), other.detach())
    one, other = (each.task_vector() for each in optimizers)
    assert one == other
    assert one.fingerprints == other.fingerprints


def test_ranks_that_share_a_state_train_the_same_bits(tmp_path: Path) -> None:
    found = in_processes(3, both, tmp_path / "saved")
    for case in range(2):
        assert sum(each[case][0] for each in found) == found[0][case][1] == some().nnz
        assert max(each[case][0] for each in found) < 0.75 * some().nnz


def test_one_process_has_all_of_the_state() -> None:
    model = network()
    optimizer = SparseAdam(model, some(), shard_state=True)
    assert optimizer.nbytes == SparseAdam(network(), some()).nbytes
    train_alone(model, optimizer)


def train_alone(model: nn.Module, optimizer: SparseAdam) -> None:
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert optimizer.task_vector().norm() > 0
