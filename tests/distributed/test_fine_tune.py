"""`fine_tune` on several ranks: the vector of one process, and errors that end all ranks."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from talos import FineTuneStep, Mask, TalosError, TalosValueError, TaskVector, fine_tune
from talos.distributed import rank, world_size
from talos.methods import LLora
from tests.cases import assert_bit_equal, assert_close
from tests.distributed.processes import in_processes
from tests.distributed.test_ddp import counted

STEPS = 3
SAVED: dict[str, Any] = {"steps": STEPS}
METHODS: tuple[Any, ...] = ("talos", "nonlinear", "linearized", LLora(rank=2), "lota")


class _Holder:
    """A batch that holds itself, so that its content cannot be read."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels, self.itself = x, labels, self


def _held_loss(model: nn.Module, batch: _Holder) -> Tensor:
    return nn.functional.cross_entropy(model(batch.x), batch.labels)


class Model(nn.Module):
    """Attention without its softmax; a layer that only some batches use, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj", "some", "none"):
                setattr(self, name, nn.Linear(8, 8))
            self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.out_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x))
        if x[0, 0] > 0:
            mixed = mixed + self.some(x)
        logits: Tensor = self.head(mixed)
        return logits


class _Extra(Model):
    """Its `state_dict` holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


def mask_of(model: nn.Module) -> Mask:
    generator = torch.Generator().manual_seed(1)
    layers = {n: p for n, p in model.named_parameters() if "head" not in n}
    return Mask.from_dense(
        {n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in layers.items()}
    )


def batches(ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of all ranks in turn; of the first ones only rank 0's uses the layer `some`."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(ranks * STEPS):
        x = torch.randn(4, 8, generator=generator)
        x[0, 0] = 1.0 if number % ranks == 0 else -1.0
        found.append((x, torch.randint(3, (4,), generator=generator)))
    return found


def train(method: Any, data: Any, **settings: Any) -> tuple[TaskVector, list[FineTuneStep]]:
    model, steps = Model(), list[FineTuneStep]()
    mask = mask_of(model) if method == "talos" else None
    options = {"method": method, "steps": STEPS, "lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* selected tensors got no gradient")
        vector = fine_tune(model, data, mask, on_step=steps.append, **{**options, **settings})
    return vector, steps


def ranks_train(methods: tuple[Any, ...]) -> list[Any]:
    found = []
    for method in methods:
        with counted() as sizes:
            vector, steps = train(method, batches(world_size())[rank() :: world_size()])
        found.append((vector, [(each.loss, each.grad_norm) for each in steps], sizes))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_end_with_the_vector_of_one_process(size: int) -> None:
    methods = METHODS if size == 2 else METHODS[:2]
    results = in_processes(size, ranks_train, methods)
    for number, method in enumerate(methods):
        one, steps = train(method, batches(size), accumulate=size)
        for found in results:
            vector, losses, sizes = found[number]
            assert_bit_equal(vector.values, results[0][number][0].values)
            assert vector.mask == one.mask
            assert vector.metadata == one.metadata
            if size == 2:  # a sum of two has one order
                assert_bit_equal(vector.values, one.values)
            assert_close(vector.values, one.values, reduction=True)
            for (loss, norm), step in zip(losses, steps, strict=True):
                assert loss == pytest.approx(step.loss, rel=1e-6)
                assert norm == pytest.approx(step.grad_norm, rel=1e-6)
            if method == "talos":
                tensors = sum(index.nnz > 0 for index in one.mask.indices.values())
                assert sizes == [1, one.mask.nnz + tensors] * STEPS  # the loss, and one call


def same_layers(ranks: int) -> list[Any]:
    """Batches that all use the layer `some`."""
    found = batches(ranks)
    for x, _ in found:
        x[0, 0] = 1.0
    return found


def sharded_models_train(mask: Mask, folder: str) -> list[Any]:
    own, results = same_layers(world_size())[rank() :: world_size()], []

    def sharded(method: Any, **settings: Any) -> Any:
        model = Model()
        for layer in model.children():
            fully_shard(layer)
        fully_shard(model)
        chosen = mask if method == "talos" else None
        return fine_tune(model, own, chosen, method=method, steps=STEPS, lr=1e-2, **settings)

    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("a broken sample")

    warnings.filterwarnings("ignore", ".* selected tensors got no gradient")
    results += [sharded(method) for method in SHARDED]
    for settings in ({"method": "linearized"}, {"method": LLora()}, {"checkpoint": folder}):
        with pytest.raises(TalosValueError) as caught:
            sharded(**{"method": "nonlinear", **settings})
        results.append(str(caught.value))
    with counted() as sizes, pytest.raises(KeyError):
        sharded("nonlinear", loss_fn=broken)
    results.append(sizes)
    return results


SHARDED = ("talos", "nonlinear", "lota")


def test_models_that_fsdp2_shards_train_as_in_one_process(tmp_path: Path) -> None:
    mask = mask_of(Model())
    for found in in_processes(2, sharded_models_train, mask, str(tmp_path)):
        for method, vector in zip(SHARDED, found, strict=False):
            model, chosen = Model(), mask if method == "talos" else None
            options: dict[str, Any] = {"method": method, "steps": STEPS, "lr": 1e-2}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* selected tensors got no gradient")
                one = fine_tune(model, same_layers(2), chosen, accumulate=2, **options)
            assert vector.mask == one.mask
            assert_close(vector.values, one.values, reduction=True)
        *said, sizes = found[len(SHARDED) :]
        assert "whole weights for the method linearized, got 14 that are sharded" in said[0]
        assert "whole weights for the method l_lora, got 14 that are sharded" in said[1]
        assert "checkpoint must be None with sharded parameters" in said[2]
        assert sizes == []  # no rank waits for another one's loss


def refusals(folder: str) -> list[str]:
    """Return what each rank raises, case by case."""
    own = batches(world_size())[rank() :: world_size()]

    def differs(**settings: Any) -> Callable[[], object]:
        return lambda: train("talos", own, **settings)

    def loss(model: nn.Module, batch: Any, *, error: bool) -> Tensor:
        if rank() == 1 and error:
            raise KeyError("a broken sample")
        return model(batch[0]).sum() * (torch.nan if rank() == 1 else 1.0)

    def stop(step: FineTuneStep) -> None:
        if rank() == 1:
            raise OSError("no place for a log")

    def ends() -> Iterator[Any]:
        yield own[0]
        if rank() == 1:
            raise ValueError("the data end here")
        yield own[1]

    def other_weights() -> None:
        model = Model()
        with torch.no_grad():
            model.head.weight[0, 0] += rank()
        fine_tune(model, own, mask_of(model), steps=1)

    cases = (
        differs(lr=0.1 if rank() else 0.2),
        differs(steps=0 if rank() else 2),
        differs(loss_fn=partial(loss, error=True)),
        differs(loss_fn=partial(loss, error=False)),
        differs(max_grad_norm=None if rank() else 1.0),
        other_weights,
        lambda: fine_tune(DistributedDataParallel(Model()), own, steps=1),
        lambda: fine_tune(Model(), ends(), steps=2),
        lambda: fine_tune(Model(), own, steps=2, on_step=stop),
    )
    said = []
    for case in cases:
        with pytest.raises((TalosError, KeyError, OSError, ValueError)) as caught:
            case()
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    dist.barrier()  # no rank waits for another one
    uneven = own[: 2 - rank()]  # begins again where it ends
    train("talos", uneven)
    train("nonlinear", [_Holder(*each) for each in own], loss_fn=_held_loss)
    fine_tune(_Extra(), own, steps=1)

    def kill(step: FineTuneStep) -> None:
        raise KeyboardInterrupt

    model, options = Model(), {**SAVED, "checkpoint": folder, "every": 1}
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("ignore", ".* selected tensors got no gradient")
        with pytest.raises(KeyboardInterrupt):
            fine_tune(model, batches(1), mask_of(model), on_step=kill, **options)
    said.append(" ".join(str(each.message) for each in seen))
    return said


def test_an_error_of_one_rank_ends_all_and_one_process_resumes(tmp_path: Path) -> None:
    first, second = in_processes(2, refusals, str(tmp_path / "run"))
    for (mine, theirs), expected in zip(zip(first, second, strict=True), SAID, strict=True):
        for said, part in zip((mine, theirs), expected, strict=True):
            assert part in said if part else not said, said
    vectors = []
    for options in ({"checkpoint": tmp_path / "run", "resume": True}, {}):
        model = Model()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* selected tensors got no gradient")
            vectors.append(fine_tune(model, batches(1), mask_of(model), **SAVED, **options))
    assert_bit_equal(vectors[0].values, vectors[1].values)


BOTH = 2
SAID = (
    ("lr must be the same on all ranks, got '0.2' on rank 0 and '0.1' on rank 1; pass the",) * BOTH,
    ("TalosRuntimeError: rank 1 raised TalosValueError: steps must", "TalosValueError: steps must"),
    ("TalosRuntimeError: rank 1 raised KeyError: 'a broken sample'", "KeyError: 'a broken sample'"),
    ("rank 1 raised TalosValueError: lr must keep the loss finite, got nan at step 1",
     "TalosValueError: lr must keep the loss finite, got nan at step 1"),
    ("max_grad_norm must be the same on all ranks, got '1.0' on rank 0 and 'None' on",) * BOTH,
    ("the sum of the bits of head.weight must be the same on all ranks",) * BOTH,
    ("model must not be wrapped in DistributedDataParallel",) * BOTH,
    ("rank 1 raised ValueError: the data end here", "ValueError: the data end here"),
    ("rank 1 raised OSError: no place for a log", "OSError: no place for a log"),
    ("the first batch is the same on all 2 ranks", ""),
)  # fmt: skip
