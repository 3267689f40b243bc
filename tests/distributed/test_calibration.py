"""Calibration on several ranks: the mask of one process, and errors on all of them."""

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import talos
from talos.calibration.sharded import ShardedSums
from talos.distributed import local, rank, whole, world_size
from talos.errors import TalosError, TalosValueError
from tests.distributed.processes import in_processes


class OwnRMSNorm(nn.Module):
    """A norm as model libraries write it, by elementwise products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())


class Reader(nn.Module):
    """A transformer of one layer over 6 tokens, with a positional embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(6, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = OwnRMSNorm()
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layer(self.tokens(ids) + self.positions)))
        return logits


class Routed(nn.Module):
    """Rows are sorted, and each goes to one of two layers; in some batches one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.every, self.plus, self.minus = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        order = rows[:, 1].argsort()
        found = torch.zeros_like(rows).index_put((order,), self.every(rows[order]))
        for layer, chosen in ((self.plus, rows[:, 0] > 0), (self.minus, rows[:, 0] <= 0)):
            if bool(chosen.any()):
                found = found.index_put((chosen,), layer(rows[chosen]), accumulate=True)
        return found.view_as(x).tanh()


def classes(model: nn.Module, batch: Tensor) -> Tensor:
    logits: Tensor = model(batch)
    return logits.mean(1)


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader()


def sharded() -> nn.Module:
    """The reader as FSDP2 shards it; whole where there is one process."""
    model = reader()
    if world_size() > 1:
        for part in (model.layer.self_attn, model.layer, model):
            fully_shard(part)
    return model


def sharded_otherwise() -> nn.Module:
    """Over two dimensions of ranks, where they are even, some weights by columns, some not at all.

    The embeddings, the last norm and the head stay whole.
    """
    model = reader()
    if (size := world_size()) > 1:
        sizes = (2, size // 2) if size % 2 == 0 else (1, size)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards"))
        columns = mesh.size(1)

        def placement(param: nn.Parameter) -> Shard:
            return Shard(1 if param.ndim == 2 and param.shape[1] % columns == 0 else 0)

        fully_shard(model.layer.self_attn, mesh=mesh)
        fully_shard(model.layer, mesh=mesh, shard_placement_fn=placement)
    return model


def ids(sizes: tuple[int, ...] = (3, 1, 2, 4, 2, 3, 1)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (size, 6), generator=generator) for size in sizes]


def dead() -> nn.Module:
    """Half of the units get no gradient, so that most scores are 0 and tie."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    return model


def sharded_dead() -> nn.Module:
    """Of its last bias, three entries, the fourth rank has none."""
    model = dead()
    if world_size() > 1:
        for part in (model[0], model[2]):
            fully_shard(part)
    return model


def sharded_routed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Routed(), nn.Linear(4, 4), Routed(), nn.Linear(4, 3))
    if world_size() > 1:
        for part in (*model, model):
            fully_shard(part)
    return model


def routed_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    found = [torch.randn(size, 3, 4, generator=generator) for size in (3, 2, 1, 4)]
    return [found[0].abs(), found[1], found[2], -found[3].abs()]


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 4, generator=generator) for size in (4, 5, 3)]


calibrate = partial(talos.calibrate, density=0.2, rounds=2)
CASES: dict[str, Callable[[], talos.Mask]] = {
    "rounds": lambda: calibrate(reader(), ids(), logits_fn=classes, rounds=3),
    "draws": lambda: calibrate(reader(), ids(), logits_fn=classes, draws=3),
    "importance": lambda: calibrate(reader(), ids(), logits_fn=classes, labels="importance"),
    "exact": lambda: calibrate(reader(), ids(), logits_fn=classes, draws="exact", rounds=1),
    "sequences": lambda: calibrate(reader(), ids(), labels="importance", seed=3),
    "released": lambda: calibrate(reader(), ids(), logits_fn=classes, parity="released"),
    "check": lambda: calibrate(reader(), ids(), logits_fn=classes, check=True, rounds=1),
    "ties": lambda: calibrate(dead(), rows(), params=".*"),
    "one batch": lambda: calibrate(dead(), rows()[:1], params=".*"),
    "a stream": lambda: calibrate(dead(), iter(rows()), params=".*", rounds=1),
    "own batches": lambda: calibrate(
        reader(), ids()[rank() :: world_size()], logits_fn=classes, rounds=3
    ),
    "sharded": lambda: calibrate(sharded(), ids(), logits_fn=classes, rounds=3, density=0.1),
    "sharded, draws": lambda: calibrate(
        sharded(), ids()[rank() :: world_size()], labels="importance", draws=2, params="proj|norm"
    ),
    "sharded, ties": lambda: calibrate(sharded_dead(), rows(), params=".*"),
    "sharded, all ties": lambda: calibrate(sharded_dead(), rows(), parity="released"),
    "sharded, equal": lambda: calibrate(sharded_dead(), [torch.zeros(3, 4)], params="0.weight"),
    "sharded, routed": lambda: calibrate(
        sharded_routed(), routed_rows(), logits_fn=classes, draws=2
    ),
    "sharded, rows": lambda: calibrate(sharded(), ids(), logits_fn=classes, params="qk"),
    "sharded otherwise": lambda: calibrate(sharded_otherwise(), ids(), logits_fn=classes),
    "own batches, one round": lambda: calibrate(
        reader(), ids()[rank() :: world_size()], logits_fn=classes, rounds=1
    ),
}
FEW = ("rounds", "ties", "own batches", "sharded", "sharded, ties", "sharded otherwise")


def shard(dense: Tensor) -> Tensor:
    if world_size() == 1:
        return dense
    return distribute_tensor(dense, init_device_mesh("cpu", (world_size(),)), [Shard(0)])


def facts(mask: talos.Mask) -> tuple[str, dict[str, Any]]:
    return mask.fingerprint, mask.metadata


def run(cases: tuple[str, ...]) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # few samples, dead units
    found: dict[str, Any] = {name: facts(CASES[name]()) for name in cases}
    return found


def run_all() -> dict[str, Any]:
    found = run(tuple(CASES))
    found["scores"] = dict(talos.fisher_diag(reader(), ids(), logits_fn=classes))
    rows = {"w": torch.arange(15.0).view(5, 3) % 4, "b": torch.ones(2)}  # uneven, and ties
    found["from scores"] = facts(
        talos.Mask.from_scores({name: shard(each) for name, each in rows.items()}, density=0.5)
    )
    model = sharded()
    before = [whole(local(each), each).clone() for each in model.parameters()]
    scores = talos.fisher_diag(model, ids(), logits_fn=classes)
    found["fisher_diag of shards"] = {name: whole(local(s), s) for name, s in scores.items()}
    calibrate(model, ids(), logits_fn=classes)
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(local(param), param), value)
    if world_size() > 1:
        wrapped = DistributedDataParallel(reader())
        found["wrapped"] = facts(calibrate(wrapped, ids(), logits_fn=classes, rounds=3))
        alone = [dist.new_group([each]) for each in range(world_size())][rank()]
        found["alone"] = facts(calibrate(reader(), ids(), logits_fn=classes, rounds=3, group=alone))
    return found


def test_the_mask_is_the_same_on_any_number_of_ranks() -> None:
    (one,) = in_processes(1, run_all)
    assert one["rounds"][1]["stability"] is not None
    assert one["rounds"][1]["samples_of_rounds"] == [16, 16, 16]
    for size in (2, 4):
        for number, found in enumerate(in_processes(size, run, FEW)):
            for name in FEW:
                assert found[name] == one[name], f"{name}, rank {number} of {size}"
    for found in in_processes(3, run_all):
        for name in (*CASES, "from scores"):
            assert found[name] == one[name], name
        for name, score in one["scores"].items():
            assert torch.equal(found["scores"][name], score), name
            assert torch.equal(found["fisher_diag of shards"][name], score), name
        assert found["wrapped"] == one["rounds"], "DDP"
        assert found["alone"] == one["rounds"], "a group of one rank"


def memory_of_shards() -> tuple[int, list[list[str]]]:
    """Return the bytes of the largest float64 tensor between batches, and how sums came about."""
    added: list[list[str]] = []
    add, largest = ShardedSums.add, [0]

    def note(sums: ShardedSums, scores: Any) -> None:
        added.append(list(scores))
        add(sums, scores)

    def measure(progress: object) -> None:
        there = [each for each in gc.get_objects() if type(each) is Tensor]
        sizes = [each.untyped_storage().nbytes() for each in there if each.dtype == torch.float64]
        largest[0] = max(largest[0], *sizes)

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 2))
    for part in (model[0], model[2], model[4], model):
        fully_shard(part)
    batches = list(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3)))
    with mock.patch.object(ShardedSums, "add", note):
        talos.fisher_diag(model, batches, params=".*", on_progress=measure)
    return largest[0], [names for names in added if names]


def test_a_rank_keeps_its_rows_only_and_adds_them_up_module_by_module() -> None:
    for largest, added in in_processes(3, memory_of_shards):
        assert largest == 8 * 3 * 7  # three of the seven rows of a weight
        assert added == [[f"{layer}.weight", f"{layer}.bias"] for layer in (4, 2, 0)]


def refused(model: nn.Module, batches: Any, **options: Any) -> str:
    try:
        calibrate(model, batches, **{"logits_fn": classes, **options})
    except (TalosError, ValueError, OSError) as error:
        return str(error)
    return "none"


def other_weights(number: int) -> nn.Module:
    torch.manual_seed(number)
    return Reader()


def failing_in(batch: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """Fail in one batch of rank 1."""
    calls = iter(range(1000))

    def logits_fn(model: nn.Module, inputs: Tensor) -> Tensor:
        if next(calls) == batch and rank() == 1:
            raise ValueError("token 12 of 11")
        return classes(model, inputs)

    return logits_fn


def broken_loader() -> Any:
    yield ids()[0]
    if rank() == 1:
        raise OSError("file 7 is gone")
    yield from ids()


def late_nan(model: nn.Module, batch: Tensor) -> Tensor:
    return classes(model, batch) * (torch.nan if rank() == 1 and len(batch) == 1 else 1.0)


def overflow(model: nn.Module, batch: Tensor) -> Tensor:
    """The first class is always drawn, and its row of the head lies on the first of three ranks."""
    return classes(model, batch) * 1e11 + torch.tensor([1e13, 0.0, 0.0])


def all_refusals() -> dict[str, str]:
    warnings.simplefilter("ignore")
    first = ids()[:2] if rank() < 2 else ids((2, 2))
    alone = [dist.new_group([each]) for each in range(world_size())][rank()]
    within_itself: list[Any] = []
    within_itself.append(within_itself)
    return {
        "density": refused(reader(), ids(), density=0.1 + 0.1 * rank()),
        "out of range": refused(reader(), ids(), density=0.1 if rank() else 2.0),
        "params": refused(reader(), ids(), params="layer" if rank() else "head"),
        "weights": refused(other_weights(rank()), ids()),
        "batches": refused(reader(), first),
        "no batches": refused(reader(), []),
        "unreadable": refused(reader(), [within_itself]),
        "logits_fn": refused(reader(), ids(), logits_fn=failing_in(1)),
        "loader": refused(reader(), broken_loader(), rounds=1),
        "nan": refused(reader(), ids(), logits_fn=late_nan),
        "fisher_diag": refused(reader(), ids()) if rank() else scored(reader(), ids()),
        "check": refused(sharded(), ids(), check=True),
        "group": refused(sharded(), ids(), group=alone),
        "few batches": refused(sharded(), ids()[rank() : 2] if rank() else ids()[:1]),
        "nan of shards": refused(sharded(), ids(), logits_fn=late_nan),
        "overflow of shards": refused(
            sharded(), ids(), logits_fn=overflow, target="logit", params="head.weight"
        ),
        "none": refused(reader(), ids()),
    }


def scored(model: nn.Module, batches: list[Tensor]) -> str:
    try:
        talos.fisher_diag(model, batches, logits_fn=classes)
    except TalosValueError as error:
        return str(error)
    return "none"


def test_ranks_that_differ_or_fail_raise_on_all_of_them() -> None:
    everywhere = {
        "density": "density must be the same on all ranks, got 0.1 on rank 0 and 0.2 on rank 1",
        "params": "params must be the same on all ranks, got 'head' on rank 0 and 'layer' on",
        "weights": "the weights of the model must be the same on all ranks, got ",
        "batches": "the same first batch on ranks 0, 1 of 3 only; pass the same list on each, or",
        "no batches": "batches must hold at least one sample, got 0",
        "unreadable": "batches must hold dense tensors, arrays, numbers and texts, in lists and",
        "fisher_diag": "density must be the same on all ranks, got None on rank 0 and 0.2 on rank",
        "check": "check must be False for a model that is sharded, got True",
        "group": "group must hold the 3 ranks that the model is sharded over, got 1; leave it out",
        "few batches": "batches must hold at least one on each rank of a sharded model, got none",
        "none": "none",
    }
    own = {
        "out of range": (0, "density must lie in (0, 1], got 2.0", "TalosValueError: "),
        "logits_fn": (1, "token 12 of 11", "ValueError: "),
        "loader": (1, "file 7 is gone", "OSError: "),
        "nan of shards": (1, "logits must be finite, got NaN", "TalosValueError: "),
        "overflow of shards": (0, "scores of head.weight must be finite", "TalosValueError: "),
        "nan": (1, "logits must be finite, got NaN", "TalosValueError: "),
    }
    for number, found in enumerate(in_processes(3, all_refusals)):
        for case, message in everywhere.items():
            assert message in found[case], (case, number, found[case])
        for case, (failing, message, kind) in own.items():
            message = message if number == failing else f"rank {failing} raised {kind}{message}"
            assert message in found[case], (case, number, found[case])
