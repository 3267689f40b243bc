"""`optimizer.patch()`: replicas that get the patches hold the optimizer's bits, step by step."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from talos import Mask, Patch, SparseAdam, TaskVector
from talos.errors import TalosRuntimeError, TalosValueError
from tests.cases import assert_bit_equal, dense_mask

STEPS = 20
SHAPES = {"embed": (50, 7), "weight": (97, 31), "bias": (31,), "unused": (9, 4)}
DENSITIES = {"embed": 0.3, "weight": 0.02, "bias": 1.0, "unused": 0.0}
FP32, BF16 = torch.float32, torch.bfloat16


class Weights(nn.Module):
    """Parameters without a network: gradients are set from outside."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, (name, shape) in enumerate(SHAPES.items()):
            value = torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
            self.register_parameter(name, nn.Parameter(value))


def mask_of_all() -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask.from_dense(
        {
            name: dense_mask(math.prod(shape), DENSITIES[name], generator).view(shape)
            for name, shape in SHAPES.items()
        }
    )


def train(model: nn.Module, optimizer: SparseAdam, step: int) -> None:
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def assert_replica(replica: dict[str, Tensor], model: nn.Module) -> None:
    for name, param in model.named_parameters():
        assert_bit_equal(replica[name], param.detach())


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (torch.float16, torch.float64), (FP32, BF16)])
def test_every_patch_of_twenty_steps_gives_the_optimizers_bits(
    dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    model, mask = Weights(*dtypes), mask_of_all()
    (first, *others), hyper = model.named_parameters(), {"weight_decay": 0.1}
    groups = [{"params": [first], "lr": 3e-3}, {"params": others, **hyper}]
    plain, coded, filed = bits(model), bits(model), bits(model)
    optimizer = SparseAdam(groups, mask, lr=1e-3)
    visible = 0
    for step in range(STEPS):
        before = bits(model)
        train(model, optimizer, step)
        patch = optimizer.patch()
        changed = {name: before[name] != param for name, param in model.named_parameters()}
        assert len(patch) == sum(int(each.sum()) for each in changed.values())
        visible += len(patch)
        for name in patch.names:  # what any receiver does
            where = patch.positions[name].long()
            assert torch.equal(where, changed[name].view(-1).nonzero()[:, 0])
            plain[name].view(-1).index_copy_(0, where, patch.values[name])
        assert_replica(plain, model)
        Patch.decode(patch.encode(mask), mask).apply_(coded)
        assert_replica(coded, model)
        if step % 5 == 0:
            patch.save(tmp_path / f"{step}.safetensors")
            Patch.load(tmp_path / f"{step}.safetensors").apply_(filed)
            assert_replica(filed, model)
        else:
            patch.apply_(filed)
    share = visible / STEPS / mask.nnz
    assert share > 0.9 if dtypes == (FP32,) else share < 0.9  # rounding hides small steps


def test_a_patch_counts_from_the_last_one_or_from_a_mark() -> None:
    model, mask = Weights(FP32), mask_of_all()
    optimizer = SparseAdam(model, mask)
    first = bits(model)
    assert len(optimizer.patch()) == 0
    for step in range(3):
        train(model, optimizer, step)
    optimizer.patch().apply_(first)  # three steps at once
    assert_replica(first, model)
    train(model, optimizer, 3)
    optimizer.mark()
    assert len(optimizer.patch()) == 0


def test_what_other_code_writes_is_sent_too_and_minus_zero_is_not_zero() -> None:
    for dtype in (FP32, BF16, torch.float64):
        model, mask = Weights(dtype), mask_of_all()
        replica = bits(model)
        optimizer = SparseAdam(model, mask)
        optimizer.patch()
        with torch.no_grad():
            model.bias[3], model.bias[4] = -0.0, 0.0
            optimizer.patch().apply_(replica)
            model.bias[3], model.bias[4] = 0.0, -0.0
        patch = optimizer.patch()
        assert patch.positions["bias"].tolist() == [3, 4]
        patch.apply_(replica)
        assert_replica(replica, model)


def test_a_loaded_state_counts_from_its_own_initial_weights() -> None:
    model, mask = Weights(BF16), mask_of_all()
    replica, late = bits(model), bits(model)
    optimizer = SparseAdam(model, mask)
    for step in range(2):
        train(model, optimizer, step)
        optimizer.patch().apply_(late)
    resumed = copy.deepcopy(model)
    other = SparseAdam(resumed, mask)
    other.load_state_dict(optimizer.state_dict())
    other.patch().apply_(replica)
    assert_replica(replica, resumed)
    train(resumed, other, 2)
    other.patch().apply_(replica)
    assert_replica(replica, resumed)
    train(model, optimizer, 2)  # a copy keeps the mark of the one it was made of
    twin = copy.deepcopy(optimizer)
    assert twin.patch() == optimizer.patch()
    optimizer.load_state_dict(other.state_dict())  # the replicas have what the last patch gave
    assert len(optimizer.patch()) == 0


def test_without_known_initial_weights_patches_begin_at_a_mark() -> None:
    mask, states = mask_of_all(), []
    for scale in (1, 2):
        model = Weights(FP32)
        with torch.no_grad():
            for param in model.parameters():
                param *= scale
        optimizer = SparseAdam(model, mask)
        states.append(optimizer.state_dict())
    for entry in states[0]["state"].values():
        del entry["base"]
    optimizer.load_state_dict(states[0])
    with pytest.raises(TalosRuntimeError, match=r"or call mark\(\) where patches begin"):
        optimizer.patch()
    optimizer.mark()
    replica = bits(model)
    train(model, optimizer, 0)
    optimizer.patch().apply_(replica)
    assert_replica(replica, model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_has_the_names_of_its_checkpoint(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model, mask = Weights(FP32), mask_of_all()
    optimizer = SparseAdam(wrap(model), mask)
    replica = wrap(copy.deepcopy(model))
    train(model, optimizer, 0)
    patch = optimizer.patch()
    assert patch.names == ("embed", "weight", "bias")
    patch.apply_(replica)
    assert_replica(
        {name.split(".")[-1]: p.detach() for name, p in replica.named_parameters()}, model
    )


def test_unselected_weights_are_not_read() -> None:
    model, mask = Weights(FP32), mask_of_all()
    model.unused = nn.Parameter(model.unused.detach().to("meta"))
    optimizer = SparseAdam(model, mask)
    train_others = [("embed", model.embed), ("weight", model.weight), ("bias", model.bias)]
    for _, param in train_others:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.patch().names == ("embed", "weight", "bias")


def test_the_patch_is_that_of_the_task_vector() -> None:
    model, mask = Weights(FP32), mask_of_all()
    base = copy.deepcopy(model)
    optimizer = SparseAdam(model, mask)
    for step in range(2):
        train(model, optimizer, step)
    assert optimizer.patch() == Patch.from_models(base, model)
    assert isinstance(optimizer.task_vector(), TaskVector)


def test_a_model_that_follows_or_moves_or_diverges() -> None:
    model, mask = Weights(FP32), mask_of_all()
    replica = bits(model)
    optimizer = SparseAdam(model, mask)
    model.bfloat16()  # before the first step the state follows
    replica = {name: each.bfloat16() for name, each in replica.items()}
    assert len(optimizer.patch()) == 0
    train(model, optimizer, 0)
    optimizer.patch().apply_(replica)
    assert_replica(replica, model)
    with torch.no_grad():
        model.bias[0] = math.nan
    with pytest.raises(TalosValueError, match="values of bias must be finite"):
        optimizer.patch()
    with torch.no_grad():
        model.bias[0] = 1.0
    assert optimizer.patch().positions["bias"].tolist() == [0]  # the mark did not move
    model.float()
    with pytest.raises(TalosRuntimeError, match="move or cast the model first"):
        optimizer.patch()
