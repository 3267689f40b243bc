"""`SparseAdam` on models that FSDP2 shards, against one process that has the whole batch.

The rows of the model are divided unevenly, and one bias has fewer entries than there are ranks.
Gradients are sums over two halves of the batch. With two ranks their order is that of one process
which adds up the halves, so the bits are equal.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

from talos import Mask, ResidentVectors, SparseAdam, TaskVector
from talos.distributed import local, rank, whole, world_size
from talos.errors import TalosError, TalosRuntimeError, TalosTypeError, TalosValueError
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


FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # as torchtitan saves
LAYOUTS = {"plain": None, "flat": FLAT, "full": FULL_ON_CPU}


def prepared(start: float = 0) -> tuple[nn.Module, SparseAdam]:
    """A model in bfloat16, whose masters are state, and its optimizer."""
    model = network(torch.bfloat16)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(start)
    if world_size() > 1:
        shard(model)
    return model, SparseAdam(model, some(network()), lr=1e-2)


def whole_states(model: nn.Module, optimizer: SparseAdam) -> tuple[Any, TaskVector]:
    states = get_state_dict(model, optimizer, options=FULL)
    return copy.deepcopy(states), optimizer.task_vector()


def save(folder: Path, model: nn.Module, optimizer: SparseAdam) -> None:
    for layout, options in LAYOUTS.items():
        states = get_state_dict(model, optimizer, options=options)
        if layout != "full":
            found = dict(zip(("model", "optimizer"), states, strict=True))
            dcp.save(found, checkpoint_id=folder / layout)
        elif rank() == 0:
            torch.save(states, folder / "full.pt")


def load(folder: Path, then: Path) -> list[tuple[Any, TaskVector]]:
    """Load what `save` wrote into new models of other weights, and save it again."""
    loaded = []
    for layout, options in LAYOUTS.items():
        model, optimizer = prepared(start=1)
        if layout == "full":
            states = torch.load(folder / "full.pt", weights_only=True)
        else:
            states = get_state_dict(model, optimizer, options=options)
            found = dict(zip(("model", "optimizer"), states, strict=True))
            dcp.load(found, checkpoint_id=folder / layout)
            states = found["model"], found["optimizer"]
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states[0],
            optim_state_dict=states[1],
            options=FULL if layout == "full" else options,
        )
        loaded.append(whole_states(model, optimizer))
    save(then, model, optimizer)
    train(model, optimizer, 1, ranks=world_size())
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("sizes", [[2, 3], pytest.param([4, 2], marks=pytest.mark.slow)], ids=str)
def test_a_checkpoint_goes_from_one_number_of_ranks_to_another(
    sizes: list[int], tmp_path: Path
) -> None:
    model, optimizer = prepared()
    train(model, optimizer, 2)
    save(tmp_path / "1", model, optimizer)
    saved, vector = whole_states(model, optimizer)
    wanted = leaves(saved)
    names = ["1", *map(str, sizes), "1 again"]
    for (before, after), size in zip(pairwise(names), [*sizes, 1], strict=True):
        folders = tmp_path / before, tmp_path / after
        found = in_processes(size, load, *folders) if size > 1 else [load(*folders)]
        for states, other in (each for ours in found for each in ours):
            held = leaves(states)
            assert held.keys() == wanted.keys()
            for key, value in wanted.items():
                if isinstance(value, Tensor):
                    assert_bit_equal(held[key], value)
                else:
                    assert held[key] == value
            assert other == vector
            assert other.fingerprints == vector.fingerprints


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What nested dictionaries and lists hold, by its path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, each in value.items() for k, v in leaves(each, f"{path}/{key}").items()}


def made(first: bool) -> tuple[nn.Module, SparseAdam]:
    """A sharded model, and its optimizer, made before or after the sharding."""
    model = network()
    if not first:
        shard(model)
    optimizer = SparseAdam(model, some(network()), lr=1e-2)
    return (shard(model) if first else model), optimizer


def before_a_step(first: bool, folder: Path) -> list[Tensor]:
    """Use an optimizer before its first step in all ways that look at the parameters."""

    def loss(model: nn.Module, seed: int = 0) -> Tensor:
        return model(next(batches(1, seed)).chunk(2)[rank()]).square().mean()

    found: list[Tensor] = []
    model, optimizer = made(first)
    loss(model).backward()
    optimizer.zero_grad()  # drops the gradients of a trial
    loss(model, 1).backward()
    optimizer.step()
    found += weights(model).values()
    for unscale in (False, True):
        model, optimizer = made(first)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        found += weights(model).values()
    model, optimizer = made(first)
    states = get_state_dict(model, optimizer)
    loaded = dict(zip(("model", "optimizer"), states, strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    states = loaded["model"], loaded["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    return [*found, optimizer.task_vector().values]


def switched() -> tuple[nn.Module, SparseAdam]:
    """Put parameters into the groups as Accelerate does while it shards a model."""
    model = network()
    optimizer = SparseAdam(model, some(network()), lr=1e-2)
    (group,) = optimizer.param_groups
    names = group["param_names"]
    group["params"] = [torch.empty_like(param) for param in group["params"]]
    shard(model)
    (group,) = optimizer.param_groups
    group["params"] = [model.get_parameter(name) for name in names]
    return model, optimizer


def starts(folder: Path) -> str:
    """Compare all of that with an optimizer that was made after the sharding."""
    model, optimizer = made(first=False)
    train(model, optimizer, 2, ranks=world_size())
    other, theirs = switched()
    train(other, theirs, 2, ranks=world_size())
    for one, wanted in zip(weights(other).values(), weights(model).values(), strict=True):
        assert_bit_equal(one, wanted)
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    for one, wanted in zip(before_a_step(True, folder), before_a_step(False, folder), strict=True):
        assert_bit_equal(one, wanted)
    before = optimizer.task_vector()
    own = optimizer.state_dict()
    if rank() == 0:
        torch.save(own, folder / "rank0.pt")
    dist.barrier()
    with pytest.raises(TalosValueError, match="a share of its own on each rank"):
        optimizer.load_state_dict(torch.load(folder / "rank0.pt", weights_only=True))
    assert optimizer.task_vector() == before
    model, optimizer = made(first=True)
    model(torch.ones(1, 6)).sum().backward()
    if rank() == 1:
        model[0].weight.grad = torch.zeros(7, 6)
    with pytest.raises(TalosError) as refused:
        optimizer.clip_grad_norm_(1.0)
    return str(refused.value)


def test_an_optimizer_follows_the_sharding_before_its_first_step(tmp_path: Path) -> None:
    ours, theirs = in_processes(2, starts, tmp_path / "saved")
    assert "grad must be sharded as its parameter" in theirs
    assert theirs in ours


def in_other_orders() -> dict[str, str]:
    """Train with optimizers made before `fully_shard`, and return errors of a wrong order."""
    wanted, expected = trained()[0]
    schedules, vectors = [], []
    for first in (True, False):
        model = network()
        if not first:
            shard(model)
        given = model if first else list(model.named_parameters())
        optimizer = SparseAdam(given, some(network()), lr=1e-2, weight_decay=0.1)
        schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        if first:
            shard(model)
        train(model, optimizer, ranks=world_size())
        schedules[-1].step()
        for name, param in weights(model).items():
            assert_bit_equal(param, wanted[name])
        assert optimizer.frozen == ("0.bias",)
        optimizer.release()
        assert all(param.requires_grad for param in model.parameters())
        vectors.append(optimizer.task_vector())
        assert optimizer.nbytes < SparseAdam(network(), some(network())).nbytes
    assert vectors == [expected, expected]

    found = {}
    model = network()
    optimizer = SparseAdam(model, some(network()))
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    shard(model)
    with pytest.raises(TalosRuntimeError) as caught:
        train(model, optimizer, 1, ranks=world_size())
    found["late"] = str(caught.value)
    other = Mask.from_dense({"0.weight": torch.arange(42).view(7, 6) == rank()})
    with pytest.raises(TalosValueError) as refused:
        SparseAdam(shard(network()), other)
    found["masks"] = str(refused.value)
    with pytest.raises(TalosError) as failed:
        SparseAdam(shard(network()), some(network()), lr=1e-2 - rank())
    found["rate"] = str(failed.value)
    wrong: dict[str, tuple[Any, dict[str, Any]]] = {
        "seed must be": (some(network()), {"seed": -1}),
        "mask must be a talos.Mask": (None, {}),
        "names are the mask's": (Mask.from_dense({"other": torch.ones(7, 6) > 0}), {}),
    }
    for message, (mask, options) in wrong.items():
        model = shard(network())
        given = (some(network()), {}) if rank() == 0 else (mask, options)
        for params in (model.parameters(), [{"params": model.parameters()}]):
            with pytest.raises(TalosError, match=message):
                SparseAdam(params, given[0], **given[1])
    with pytest.raises(TalosRuntimeError) as compact:
        SparseAdam(shard(network()), some(network())).compact_gradients()
    found["compact"] = str(compact.value)
    return found


def test_an_optimizer_is_made_before_or_after_sharding_and_not_too_late() -> None:
    for number, found in enumerate(in_processes(2, in_other_orders)):
        assert "sharded before the first step" in found["late"]
        assert "mask must be the same on all ranks, got" in found["masks"]
        assert ("rank 1 raised TalosValueError" in found["rate"]) == (number == 0)
        assert "Invalid learning rate: -0.99" in found["rate"]
        assert "must stay dense" in found["compact"]


def test_fsdp1_is_refused() -> None:
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # making one needs a GPU
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = network()
    with pytest.raises(TalosTypeError, match=r"must be sharded with fully_shard \(FSDP2\)"):
        SparseAdam(wrapper, some(network()))


def clipped_and_scaled() -> list[Tensor]:
    """Norms and skipped steps are those of all ranks; several meshes and policies train."""
    norms = []
    for defer in (False, True):
        model = shard(network())
        optimizer = SparseAdam(model, some(network()), lr=1e-2)
        model(next(batches(1)).chunk(2)[rank()]).square().mean().backward()
        norms.append(optimizer.clip_grad_norm_(0.1, defer=defer))
        optimizer.step()
        norms += weights(model).values()

    model = shard(network())
    optimizer = SparseAdam(model, some(network()), lr=1e-2)
    optimizer.patch()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = weights(model)
    for bad in (True, False):
        optimizer.zero_grad()
        batch = next(batches(1)).chunk(2)[rank()]
        scaler.scale(model(batch).square().mean()).backward()
        if bad and rank() == 1:
            local(model[0].weight.grad)[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(each, before[name]) for name, each in weights(model).items()]
        assert any(moved) != bad
        steps = {float(each["step"]) for each in optimizer.state_dict()["state"].values()}
        assert steps == {float(not bad)}
    assert scaler.get_scale() == 4.0
    replica = {name: each.clone() for name, each in before.items()}
    optimizer.patch().apply_(replica)
    for name, each in weights(model).items():
        assert_bit_equal(replica[name], each)
    optimizer.zero_grad()  # torch does not copy the gradient of a DTensor
    copied = copy.deepcopy(optimizer)
    assert copied.task_vector() == optimizer.task_vector()

    mesh = init_device_mesh("cpu", (world_size(), 1), mesh_dim_names=("copies", "shards"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    settings: list[dict[str, Any]] = [{"mesh": mesh}, {"mp_policy": policy}]
    settings += [{"offload_policy": offload}, {"reshard_after_forward": False}]
    for options in settings:
        model = shard(network(), **options)
        with torch.no_grad():
            model(torch.ones(1, 6))  # leaves the root's weights whole
        optimizer = SparseAdam(model, some(network()), lr=1e-2)
        dtype = options.get("mp_policy", policy).param_dtype if "mp_policy" in options else None
        for batch in batches(2):
            optimizer.zero_grad()
            part = batch.chunk(2)[rank()].to(dtype or torch.float32)
            model(part).square().mean().backward()
            optimizer.clip_grad_norm_(1e9)
            optimizer.step()
        norms += weights(model).values()
    return norms


def test_clipping_scaling_and_policies_are_those_of_all_ranks() -> None:
    ours, theirs = in_processes(2, clipped_and_scaled)
    for one, other in zip(ours, theirs, strict=True):
        assert_bit_equal(one, other)
    model = network()
    optimizer = SparseAdam(model, some(network()), lr=1e-2)
    for part in next(batches(1)).chunk(2):
        (model(part).square().mean() / 2).backward()
    norm = optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    wanted = [norm, *model.parameters()]
    for first in (0, len(wanted)):
        for one, other in zip(ours[first:], wanted, strict=False):
            assert_close(one, other.detach(), reduction=True)
    model = network()
    train(model, SparseAdam(model, some(network()), lr=1e-2), 2, ranks=2)
    for one, other in zip(ours[2 * len(wanted) :], model.parameters(), strict=False):
        assert_close(one, other.detach(), reduction=True)
    for one, other in zip(ours[-len(wanted) + 1 :], model.parameters(), strict=True):
        assert_bit_equal(one, other.detach())


def edited(vector: TaskVector) -> list[Any]:
    """Put a vector on a sharded model and take it off; find it again as a difference."""
    base, model = shard(network()), shard(network())
    with torch.no_grad():
        model(torch.ones(1, 6))  # leaves the root's weights whole
    before = weights(base)
    with vector.applied(model, scale=0.5):
        during = weights(model)
    after = weights(model)
    for name, each in before.items():
        assert_bit_equal(after[name], each)
    vector.apply_(model)
    with vector.applied(model):  # it knows the base below the first edit
        pass
    found = TaskVector.from_models(base, model, vector.mask)
    with pytest.raises(TalosTypeError, match="must hold whole weights"):
        ResidentVectors(model, {"one": vector})
    with torch.no_grad():
        if rank() == 1:
            local(model[0].weight).fill_(3e38)
    with pytest.raises(TalosError) as caught:
        TaskVector(vector.mask, vector.values.sign() * 3e38).apply_(model, force=True)
    return [during, weights(model), found, str(caught.value)]


def test_a_vector_is_put_on_a_sharded_model_and_taken_off() -> None:
    model = network()
    optimizer = SparseAdam(model, some(network()), lr=1e-2)
    train(model, optimizer)
    vector = optimizer.task_vector()
    base = network()
    with vector.applied(base, scale=0.5):
        wanted = {name: each.detach().clone() for name, each in base.named_parameters()}
    vector.apply_(base)
    for during, after, found, error in in_processes(2, edited, vector):
        for name, each in wanted.items():
            assert_bit_equal(during[name], each)
            if name != "0.weight":
                assert_bit_equal(after[name], base.get_parameter(name).detach())
        assert found == TaskVector.from_models(network(), base, vector.mask)
        assert found.fingerprints == vector.fingerprints
        assert "scale must keep every weight finite" in error
