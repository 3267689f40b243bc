"""Disjoint masks against a plain round robin, one entry at a time."""

from typing import Any

import pytest
import torch

from talos.calibration.fisher import FisherScores
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from tests.cases import dense_mask

SHAPES = {"a": (5,), "b": (40, 30), "c": (70, 20)}
Flat = list[float]


def scores_of(seed: int, mixed: float, names: tuple[str, ...] = tuple(SHAPES)) -> dict[str, Any]:
    """Scores on a grid, so that some are equal; `mixed` is the share of all that tasks share."""
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    return {
        name: (
            mixed * torch.rand(SHAPES[name], generator=common)
            + (1 - mixed) * torch.rand(SHAPES[name], generator=own)
        )
        .mul(200)
        .round()
        for name in names
    }


def drafted(scores: dict[str, dict[str, Any]], budget: int, turn: int) -> dict[str, set[Any]]:
    """A round robin in plain Python: each task takes `turn` lowest free entries at its turn."""
    order = {
        task: sorted(
            (v, list(SHAPES).index(name), i)
            for name, score in each.items()
            for i, v in enumerate(score.flatten().tolist())
        )
        for task, each in scores.items()
    }
    taken: dict[Any, str] = {}
    found: dict[str, set[Any]] = {task: set() for task in scores}
    while any(len(each) < budget for each in found.values()):
        for task, entries in order.items():
            for _ in range(min(turn, budget - len(found[task]))):
                entry = next(e[1:] for e in entries if e[1:] not in taken)
                taken[entry] = task
                found[task].add(entry)
    return found


def entries_of(mask: Mask) -> set[Any]:
    return {
        (list(SHAPES).index(name), int(i))
        for name in mask.names
        for i in mask.to_dense(name).flatten().nonzero()
    }


@pytest.mark.parametrize("mixed", [0.0, 0.8, 1.0], ids=["unlike", "alike", "equal"])
@pytest.mark.parametrize("turn", [1, 7])
def test_tasks_take_their_lowest_free_entries_by_turns(mixed: float, turn: int) -> None:
    scores = {task: scores_of(i, mixed) for i, task in enumerate(("x", "y", "z"))}
    numel = sum(s.numel() for s in scores["x"].values())
    masks = Mask.disjoint(scores, 0.1, turn=turn)
    wanted = drafted(scores, round(0.1 * numel), turn)
    assert {task: entries_of(mask) for task, mask in masks.items()} == wanted
    assert [mask.nnz for mask in masks.values()] == [round(0.1 * numel)] * 3
    assert masks["y"].metadata == {
        "disjoint": ["x", "y", "z"],
        "density": 0.1,
        "select": "lowest",
        "task": "y",
    }


def test_every_entry_can_be_given_away() -> None:
    scores = {str(i): scores_of(i, 0.5) for i in range(4)}
    masks = list(Mask.disjoint(scores, 0.25).values())
    union = masks[0] | masks[1] | masks[2] | masks[3]
    assert union.nnz == sum(mask.nnz for mask in masks) == 4 * round(0.25 * union.numel)
    assert union.numel - union.nnz == 1  # 2605 is no multiple of 4


def test_one_task_gets_what_from_scores_selects() -> None:
    scores = scores_of(0, 0.0)
    assert Mask.disjoint({"x": scores}, 0.2)["x"] == Mask.from_scores(scores, 0.2)


def test_tensors_of_some_tasks_and_rows_of_fused_weights() -> None:
    fused = FisherScores(scores_of(0, 0.0, ("c", "b")))
    fused.rows = {"b": (10, 30)}
    fused["b"][:10] = 0.0  # means nothing
    masks = Mask.disjoint({"x": fused, "y": scores_of(1, 0.0, ("a", "b"))}, 0.3)
    assert masks["x"].names == ("c", "b")
    assert not masks["x"].to_dense("b")[:10].any()
    assert masks["x"].nnz == round(0.3 * (20 * 30 + 1400))
    assert masks["y"].nnz == round(0.3 * 1205)
    assert (masks["x"] & masks["y"]).nnz == 0


def test_shared_entries_of_masks_are_dealt_by_turns() -> None:
    generator = torch.Generator().manual_seed(0)
    densities = {"x": (1.0, 0.6, 0.5), "y": (0.4, 0.6, 0.01), "z": (0.6, 1.0, 0.0)}
    before = {
        task: Mask.from_dense(
            {
                name: dense_mask(torch.Size(shape).numel(), d, generator).view(shape)
                for d, (name, shape) in zip(each, SHAPES.items(), strict=True)
            }
        )
        for task, each in densities.items()
    }
    after = Mask.disjoint(before)
    turns: dict[tuple[str, ...], int] = {}
    for name in SHAPES:  # one entry after the other
        own = {task: mask.to_dense(name).flatten().tolist() for task, mask in before.items()}
        dealt = {task: mask.to_dense(name).flatten().tolist() for task, mask in after.items()}
        for i in range(len(own["x"])):
            claim = tuple(task for task in own if own[task][i])
            turn = turns.get(claim, 0)
            turns[claim] = turn + 1
            owner = claim[turn % len(claim)] if claim else None
            assert {task for task in own if dealt[task][i]} == ({owner} if owner else set())
    assert Mask.disjoint(after) == after
    apart = Mask.disjoint({"x": before["x"], "y": Mask.from_dense({"d": torch.ones(3) > 0})})
    assert apart["x"] == before["x"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({},), TalosTypeError, "tasks must hold scores of each task, or a mask"),
        (({"x": scores_of(0, 0)}, 0.0), TalosValueError, "density must lie in"),
        (({"x": scores_of(0, 0)},), TalosValueError, "density must lie in .* got None"),
        (({"x": scores_of(0, 0), "y": scores_of(1, 0)}, 0.6), TalosValueError, "together at most"),
        (({"x": scores_of(0, 0)}, 1e-9), TalosValueError, "at least one entry each"),
        (({"x": {"a": torch.tensor([-1.0])}}, 0.5), TalosValueError, "must not be negative"),
        (({"x": torch.ones(3)}, 0.5), TalosTypeError, "scores must be a mapping"),
        (
            ({"x": {"a": torch.ones(4)}, "y": {"a": torch.ones(2, 2)}}, 0.5),
            TalosValueError,
            r"shape of a, got \(4,\) and \(2, 2\)",
        ),
    ],
)
def test_what_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Mask.disjoint(*arguments)


def test_masks_take_no_density_and_do_not_mix_with_scores() -> None:
    mask = Mask.from_dense({"a": torch.ones(5) > 0})
    with pytest.raises(TalosValueError, match="density and turn must be left out with masks"):
        Mask.disjoint({"x": mask}, 0.5)
    with pytest.raises(TalosTypeError, match="got 1 masks of 2 tasks"):
        Mask.disjoint({"x": mask, "y": scores_of(0, 0.0)}, 0.5)
    with pytest.raises(TalosValueError, match="turn must be an integer of at least 1"):
        Mask.disjoint({"x": scores_of(0, 0.0)}, 0.5, turn=0)
    other = Mask.from_dense({"a": torch.ones(6) > 0})
    with pytest.raises(TalosValueError, match="shape of a"):
        Mask.disjoint({"x": mask, "y": other})
    with pytest.raises(TalosValueError, match="tasks must be at most 62, got 63"):
        Mask.disjoint({str(i): mask for i in range(63)})


def test_tasks_without_names_are_refused() -> None:
    with pytest.raises(TalosTypeError, match="tasks must map names to scores or masks, got list"):
        Mask.disjoint([{"w": torch.rand(4)}], density=0.5)
