"""Masks equal the method of the paper, and say what made them."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from talos.calibration import calibrate, fisher_diag
from talos.calibration.fisher import CalibrationProgress
from talos.errors import TalosValueError
from talos.masks import Mask
from tests.calibration.models import MODELS, C, E, batched, inputs, mlp, oracle
from tests.cases import assert_bit_equal


def rounds_of_the_method(
    model: nn.Module, x: Tensor, density: float, rounds: int, soft: float, select: str
) -> list[dict[str, np.ndarray]]:
    """The kept entries after each round: the paper's algorithm in float64, with a full sort."""
    model = copy.deepcopy(model)
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    sizes = [param.numel() for param in base.values()]
    kept = np.ones(sum(sizes), dtype=bool)
    history = []
    for index in range(rounds):
        factors = np.where(kept, 1.0, soft)
        with torch.no_grad():
            parts = np.split(factors, np.cumsum(sizes)[:-1])
            for (name, param), part in zip(model.named_parameters(), parts, strict=True):
                param.copy_(base[name] * torch.from_numpy(part).view_as(param))
        scores = np.concatenate([s.flatten().numpy() for s in oracle(model, x).values()])
        scores = scores if select == "lowest" else -scores
        order = np.argsort(np.where(kept, scores, np.inf), kind="stable")
        kept = np.zeros_like(kept)
        kept[order[: round(density ** ((index + 1) / rounds) * len(kept))]] = True
        parts = np.split(kept, np.cumsum(sizes)[:-1])
        history.append(dict(zip(base, parts, strict=True)))
    return history


@pytest.mark.parametrize("select", ["lowest", "highest"])
@pytest.mark.parametrize(
    ("density", "rounds", "soft"), [(0.1, 4, 0.01), (0.3, 3, 0.1), (0.2, 1, 1.0)]
)
def test_masks_equal_the_method_of_the_paper(
    density: float, rounds: int, soft: float, select: Any
) -> None:
    model, x = MODELS["tokens"]().double(), inputs(10)
    expected = rounds_of_the_method(model, x, density, rounds, soft, select)
    options: dict[str, Any] = {"soft": soft, "select": select, "draws": "exact"}
    mask = calibrate(model, batched(x, 4), density, rounds, **options)
    entries = sum(param.numel() for param in model.parameters())
    assert mask.nnz == round(density * entries)
    assert list(mask.names) == list(expected[-1])
    for name in mask.names:
        assert np.array_equal(mask.to_dense(name).flatten().numpy(), expected[-1][name]), name
    for before, after in itertools.pairwise(expected):
        assert all((after[name] <= before[name]).all() for name in before)
    if rounds > 1:  # neither the rounds nor the damping may be idle
        assert mask != calibrate(model, batched(x, 4), density, 1, **options)
        assert mask != calibrate(model, batched(x, 4), density, rounds, **(options | {"soft": 1.0}))


def test_scores_too_small_for_float32_keep_their_order() -> None:
    model, x = MODELS["tokens"]().double(), inputs(10)
    with torch.no_grad():
        model[2].weight *= 1e-22
    scores = fisher_diag(model, [x], draws="exact", params=".")
    assert not scores["0.0.weight"].any()
    expected = rounds_of_the_method(model, x, 0.3, 2, 0.01, "lowest")[-1]
    mask = calibrate(model, [x], 0.3, 2, draws="exact")
    for name in mask.names:
        assert np.array_equal(mask.to_dense(name).flatten().numpy(), expected[name]), name


def test_a_mask_does_not_depend_on_the_batch_size_and_tells_what_made_it() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs(10)
    model[2].requires_grad_(False)
    mask = calibrate(model, batched(x, 10), 0.2, seed=5)
    assert mask == calibrate(model, batched(x, 3), 0.2, seed=5)
    assert mask != calibrate(model, batched(x, 3), 0.2, seed=6)
    assert mask.metadata == {
        "method": "talos",
        "params": "maskable",
        "passed_over": 2,
        "left_out": {"names": [], "share": 0.0},
        "density": 0.2,
        "rounds": 4,
        "samples": 10,
        "samples_of_rounds": [10, 10, 10, 10],
        "soft": 0.01,
        "select": "lowest",
        "target": "log_prob",
        "draws": 1,
        "labels": "sampled",
        "seed": 5,
        "parity": "paper",
        "torch": str(torch.__version__),
        "stability": None,
        "stability_by_chance": pytest.approx(0.2**0.25, rel=0.02),
    }


@pytest.mark.parametrize("rounds", [1, 2])
def test_stability_is_what_two_half_sets_agree_on(rounds: int) -> None:
    model, x = MODELS["tokens"]().double(), inputs(24)
    options: dict[str, Any] = {"draws": "exact", "rounds": rounds, "soft": 1.0}
    mask = calibrate(model, batched(x, 4), 0.3, **options)
    # With soft=1 no weight is damped, so a half's choice is that of the half alone among the kept.
    kept = (
        calibrate(model, batched(x, 4), 0.3**0.5, draws="exact", rounds=1) if rounds == 2 else None
    )
    halves = []
    for part in (x[:12], x[12:]):
        scores = fisher_diag(model, [part], draws="exact")
        for name, score in scores.items():
            if kept is not None:
                score[~kept.to_dense(name)] = 1e6
        halves.append(Mask.from_scores(scores, 0.3))
    assert mask.metadata["stability"] == (halves[0] & halves[1]).nnz / mask.nnz
    assert mask.metadata["stability_by_chance"] == pytest.approx(0.3 ** (1 / rounds), rel=0.02)
    assert calibrate(model, [x], 0.3, **options).metadata["stability"] is None
    once = calibrate(model, iter(batched(x, 4)), 0.3, rounds=1)
    assert once.metadata["stability"] is None  # nobody knows how many will come


def test_a_mask_is_the_same_with_and_without_halves() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs(20)
    assert calibrate(model, [x], 0.2) == calibrate(model, batched(x, 5), 0.2)


class Clip(nn.Module):
    """A tower as open_clip holds it: embeddings and the projection are parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(E))
        self.blocks = nn.Sequential(mlp(), mlp())
        self.proj = nn.Parameter(torch.randn(E, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x + self.class_embedding).mean(1) @ self.proj


def test_parity_with_the_released_code() -> None:
    model, x = Clip().double(), inputs(10)
    mask = calibrate(model, [x], 0.3, 1, draws="exact", parity="released")
    assert mask.metadata["target"] == "logit"
    assert mask.metadata["soft"] == 0.1
    assert mask.to_dense("class_embedding").all()
    assert mask.to_dense("proj").all()
    ours = calibrate(model, [x], 0.3, 1, draws="exact", target="logit", soft=0.1)
    entries = ours.numel
    assert int(0.3 * entries) != round(0.3 * entries)
    assert mask.nnz - E - E * C == int(0.3 * entries)
    assert ours.nnz == round(0.3 * entries)
    assert (mask & ours).nnz == min(ours.nnz, mask.nnz - E - E * C)
    assert set(ours.names) == set(mask.names) - {"class_embedding", "proj"}


def test_parity_keeps_every_tie() -> None:
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(5 * E, 4), nn.ReLU(), nn.Linear(4, C)),
        inputs(10),
    )
    with torch.no_grad():
        model[1].bias[:2] = -1e4  # dead units: their scores are all 0
    model.double()
    with pytest.warns(UserWarning, match="selected weights have a score of 0"):
        mask = calibrate(model, [x], 0.1, 1, parity="released")
    assert mask.to_dense("1.weight")[:2].all()
    scores = fisher_diag(model, [x], target="logit", params=".")
    assert mask.nnz == sum(int((score == 0).sum()) for score in scores.values()) > 0.1 * mask.numel


def test_parity_at_the_ends_of_its_range() -> None:
    model, x = MODELS["vectors"]().double(), inputs(8)
    options: dict[str, Any] = {"params": ".", "parity": "released"}
    assert calibrate(model, [x], 0.1, 40, **options).nnz >= 1
    assert calibrate(model, [x], 1.0, 1, **options).nnz >= C * (E + 1) - 1


def test_every_round_draws_labels_of_its_own() -> None:
    model, x = MODELS["tokens"]().double(), inputs(10)
    once = calibrate(model, [x], 0.3, rounds=1, soft=1.0)
    assert calibrate(model, [x], 0.3, rounds=1, soft=0.5) == once  # one round damps nothing
    assert calibrate(model, [x], 0.3, rounds=2, soft=1.0) != once


def test_progress_comes_after_every_batch() -> None:
    seen: list[CalibrationProgress] = []
    calibrate(
        MODELS["vectors"]().double(), batched(inputs(8), 5), rounds=2, on_progress=seen.append
    )
    assert seen == [
        CalibrationProgress(1, 2, 5, None),
        CalibrationProgress(1, 2, 8, None),
        CalibrationProgress(2, 2, 5, 8),
        CalibrationProgress(2, 2, 8, 8),
    ]


@pytest.mark.parametrize("how", ["returns", "raises", "interrupted"])
def test_nothing_is_left_behind(how: str) -> None:
    model = nn.Sequential(MODELS["encoder layer"](), nn.Dropout(0.5), nn.Linear(C, C))
    model[0][0].self_attn.train(False)
    model[2].weight.requires_grad_(False)
    with torch.no_grad():
        model[2].bias[0] = -0.0
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    values = [param.detach().clone() for param in model.parameters()]
    grads = [param.grad for param in model.parameters()]
    needs = [param.requires_grad for param in model.parameters()]
    flags = [module.training for module in model.modules()]
    calls = 0

    def logits_fn(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6 and how != "returns":  # in the second round, when weights are damped
            assert not torch.equal(model[0][0].linear1.weight, values[4])
            raise KeyboardInterrupt if how == "interrupted" else RuntimeError("no more")
        return model(batch)

    batches = batched(inputs(8).float(), 2)
    if how == "returns":
        calibrate(model, batches, logits_fn=logits_fn)
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            calibrate(model, batches, logits_fn=logits_fn)
    for param, value, grad in zip(model.parameters(), values, grads, strict=True):
        assert_bit_equal(param, value)
        assert param.grad is grad
        assert bool((grad == 1).all())
    assert [param.requires_grad for param in model.parameters()] == needs
    assert [module.training for module in model.modules()] == flags


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """A data set without a length; the first passes yield what `counts` says, others the last."""

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)

    def __iter__(self) -> Iterator[Tensor]:
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return iter(inputs(count).unbind())


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_loader_whose_length_cannot_be_asked_is_calibrated(rounds: int) -> None:
    model = nn.Linear(inputs(1).shape[-1], 3).double()
    loader = torch.utils.data.DataLoader(Stream(16), batch_size=4)
    with pytest.raises(TypeError):
        len(loader)
    metadata = calibrate(model, loader, 0.5, rounds).metadata
    assert metadata["samples"] == 16
    assert (metadata["stability"] is None) == (rounds == 1)


def test_rounds_of_unequal_numbers_of_samples_are_told() -> None:
    model = nn.Linear(inputs(1).shape[-1], 3).double()
    loader = torch.utils.data.DataLoader(Stream(16, 12, 9), batch_size=4)
    with pytest.warns(UserWarning, match="rounds scored 16, 12, 9 samples"):
        mask = calibrate(model, loader, 0.5, 3)
    assert mask.metadata["samples"] == 9
    assert mask.metadata["samples_of_rounds"] == [16, 12, 9]


def exhausted() -> Iterator[Tensor]:
    yield inputs()


class OnceOnly:
    """Iterable, but empty from the second time on."""

    def __init__(self) -> None:
        self.batches = exhausted()

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "density 0": ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
    "density 2": ({"density": 2.0}, "density must lie in"),
    "density NaN": ({"density": math.nan}, "density must lie in"),
    "density of nothing": ({"density": 1e-6}, "no weight selected"),
    "rounds": ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
    "soft": ({"soft": 0.0}, r"soft must lie in \(0, 1\], got 0.0"),
    "rounds float": ({"rounds": 2.0}, "rounds must be an integer of at least 1, got 2.0"),
    "rounds bool": ({"rounds": True}, "rounds must be an integer of at least 1, got True"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "draws": ({"draws": 0}, "draws must be a number of labels a sample or 'exact', got 0"),
    "draws word": ({"draws": "all"}, "got 'all'"),
    "target": ({"target": "loss"}, "target must be 'log_prob' or 'logit', got 'loss'"),
    "select": ({"select": "top"}, "select must be 'lowest' or 'highest', got 'top'"),
    "params": ({"params": "nothing"}, "params must match a parameter"),
    "no batches": ({"batches": []}, "at least one sample, got 0"),
    "a generator": ({"batches": exhausted()}, "batches must be re-iterable, got an iterator"),
    "once only": ({"batches": OnceOnly()}, "none in round 2 after 6 samples"),
    "parity": ({"parity": "code"}, "parity must be 'paper' or 'released', got 'code'"),
    "target of the paper": (
        {"parity": "released", "target": "log_prob"},
        "must be 'logit' and 0.1 with parity='released', got target='log_prob'",
    ),
    "soft of the paper": ({"parity": "released", "soft": 0.01}, "and soft=0.01; leave them out"),
    "nothing of the released": (
        {"parity": "released", "density": 0.02, "params": "."},
        "no weight selected",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name: str) -> None:
    options, message = BAD_ARGUMENTS[name]
    with pytest.raises(TalosValueError, match=message):
        calibrate(MODELS["vectors"]().double(), **({"batches": [inputs()]} | options))


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_integers_of_any_type(integer: Callable[[int], Any], tmp_path: Path) -> None:
    model, x = MODELS["vectors"](), inputs(8).float()
    mask = calibrate(model, [x], np.float64(0.5), integer(2), draws=integer(3), seed=integer(4))
    assert mask == calibrate(model, [x], 0.5, 2, draws=3, seed=4)
    mask.save(tmp_path / "mask.safetensors")
    assert Mask.load(tmp_path / "mask.safetensors").metadata["draws"] == 3


def test_few_samples_and_equal_scores_warn() -> None:
    model = MODELS["vectors"]().double()
    with pytest.warns(UserWarning, match="a mask from 6 samples is mostly noise"):
        calibrate(model, [inputs()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [inputs(8)])
    ones = torch.ones(8, E).double()
    with pytest.warns(UserWarning, match="all scores are equal: the first weights are selected"):
        mask = calibrate(nn.Linear(E, 1).double(), [ones], density=0.5, target="logit")
    assert mask.to_dense("weight").tolist() == [[True] * 4 + [False] * 4]


def test_damping_that_wakes_dead_units_does_not_hide_them() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-3.0)  # a hundredth of it lets inputs through
    x = torch.randn(16, 4).double() / 4
    assert int((fisher_diag(model, [x])["0.weight"] == 0).sum()) == 32
    with pytest.warns(UserWarning, match=r"\d+ of the \d+ selected weights have a score of 0"):
        calibrate(model, [x], density=0.1)
