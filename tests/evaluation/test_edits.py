"""Addition, negation, interference and disentanglement against copied, edited models."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation import (
    Estimate,
    Judge,
    Metric,
    Outcomes,
    addition,
    disentanglement,
    interference,
    losses,
    negation,
    predictions,
    right_answers,
    scaling_coefs,
)
from talos.evaluation.coefficients import choose
from talos.masks import Mask
from talos.names import named_parameters
from talos.task_vectors import TaskVector
from tests.evaluation.small import (
    TASKS,
    edited,
    judges,
    logits_of,
    share,
    small_data,
    small_models,
    small_vectors,
)

MODELS = small_models()
VECTORS = small_vectors(MODELS)
VALIDATION, TEST = small_data(0), small_data(1)
COEFS = [0.0, 0.3, 0.8]
PERPLEXITY = Metric(lambda each: each.mean(-1).exp(), better="lower")


def outcomes(**settings: Any) -> Outcomes:
    return Outcomes(
        MODELS, judges(TEST, right_answers), judges(VALIDATION, right_answers), **settings
    )


def accuracies(terms: list[tuple[float, TaskVector]], data: Any) -> dict[str, float]:
    copies = edited(MODELS, terms)
    return {task: share(copies[task], data[task]) for task in TASKS}


def single(data: Any) -> dict[str, float]:
    return {task: accuracies([(1.0, VECTORS[task])], data)[task] for task in TASKS}


def test_addition_is_what_edited_copies_give() -> None:
    seen: list[Any] = []
    added = addition(outcomes(), VECTORS, coefs=COEFS, on_point=seen.append)
    assert seen == added.grid
    own = single(VALIDATION)
    normalised = []
    for coef, point in zip(COEFS, added.grid, strict=True):
        found = accuracies([(coef, each) for each in VECTORS.values()], VALIDATION)
        assert point.tasks == found
        assert point.absolute == pytest.approx(sum(found.values()) / 2)
        normalised.append(sum(found[t] / own[t] for t in TASKS) / 2)
        assert point.normalised == pytest.approx(normalised[-1])
    best = COEFS[normalised.index(max(normalised))]
    assert added.scaling_coef == best
    found = accuracies([(best, each) for each in VECTORS.values()], TEST)
    assert {task: entry["value"] for task, entry in added.tasks.items()} == found
    assert added.absolute["value"] == pytest.approx(sum(found.values()) / 2)
    own = single(TEST)
    assert added.normalised["value"] == pytest.approx(sum(found[t] / own[t] for t in TASKS) / 2)
    assert all(added.outcomes[t].double().mean() == found[t] for t in TASKS)


def test_any_merge_can_be_added() -> None:
    merged = 2 * VECTORS["left"]
    added = addition(outcomes(), VECTORS, merged, coefs=[0.5])
    assert "grid" not in repr(added)
    assert "picked" not in repr(added)
    assert added.grid[0].tasks == accuracies([(1.0, VECTORS["left"])], VALIDATION)


def test_negation_is_what_edited_copies_give() -> None:
    # Of the pretrained control 80 % must be kept, so that a coefficient breaks it.
    seen: list[Any] = []
    coefs = [0.5, 1.0, 2.0]
    forgot = negation(
        outcomes(), VECTORS["left"], "left", coefs=coefs, control_share=0.8, on_point=seen.append
    )
    assert seen == forgot.grid
    assert [point.scaling_coef for point in forgot.grid] == [0.0, *coefs]
    kept = {}
    for point in forgot.grid:
        found = accuracies([(-point.scaling_coef, VECTORS["left"])], VALIDATION)
        assert point.control == found["right"]
        keeps = found["right"] >= 0.8 * forgot.grid[0].control
        assert point.target == (found["left"] if keeps else None)
        if keeps:
            kept[point.scaling_coef] = found["left"]
    assert 1 < len(kept) < len(forgot.grid)
    assert forgot.scaling_coef == min(kept, key=lambda coef: (kept[coef], coef)) > 0
    after = accuracies([(-forgot.scaling_coef, VECTORS["left"])], TEST)
    before = accuracies([], TEST)
    assert (forgot.target["value"], forgot.control["value"]) == (after["left"], after["right"])
    assert forgot.target_zero_shot["value"] == before["left"]
    assert forgot.control_zero_shot["value"] == before["right"]


def test_interference_is_what_edited_copies_give() -> None:
    matrix = interference(outcomes(), VECTORS)
    before = accuracies([], TEST)
    for i, vector in VECTORS.items():
        after = accuracies([(1.0, vector)], TEST)
        for j in TASKS:
            assert matrix[i][j]["value"] == pytest.approx(after[j] / before[j])
            assert matrix[i][j]["low"] <= matrix[i][j]["value"] <= matrix[i][j]["high"]


def test_disentanglement_is_what_edited_copies_give() -> None:
    found = disentanglement(Outcomes(MODELS, judges(TEST, predictions)), VECTORS, coefs=COEFS)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for i, j in product(range(3), repeat=2):
        terms = [(COEFS[i], VECTORS["left"]), (COEFS[j], VECTORS["right"])]
        merged = edited(MODELS, terms)
        for term, task in zip(terms, TASKS, strict=True):
            alone, (inputs, _) = edited(MODELS, [term])[task], TEST[task]
            pair = [logits_of(each, inputs).argmax(1) for each in (alone, merged[task])]
            expected[i, j] += (pair[0] != pair[1]).double().mean()
    assert found.tolist() == expected.tolist()
    assert found[0, 0] == 0 < found[2, 2]


def test_three_tasks_have_three_axes() -> None:
    model = MODELS["left"]
    vectors = {**VECTORS, "third": VECTORS["left"]}
    judge = judges(TEST, predictions)["left"]
    found = disentanglement(
        Outcomes(model, dict.fromkeys(vectors, judge)), vectors, coefs=[0.0, 0.8]
    )
    assert found.shape == (2, 2, 2)
    assert found[1, 0, 0] == 2 * found[0, 0, 1] / 2 > 0  # one vector under two names
    assert found[0, 0, 0] == 0


def test_perplexity_is_a_metric_too() -> None:
    """A lower figure is better: the lowest ratio is chosen, and the control must not rise."""

    def figures(terms: list[tuple[float, TaskVector]], data: Any) -> dict[str, float]:
        copies = edited(MODELS, terms)
        return {
            task: math.exp(
                nn.functional.cross_entropy(logits_of(copies[task], data[task][0]), data[task][1])
            )
            for task in TASKS
        }

    measured = Outcomes(MODELS, judges(TEST, losses), judges(VALIDATION, losses), metric=PERPLEXITY)
    added = addition(measured, VECTORS, coefs=COEFS)
    sums = {c: figures([(c, each) for each in VECTORS.values()], VALIDATION) for c in COEFS}
    own = {t: figures([(1.0, VECTORS[t])], VALIDATION)[t] for t in TASKS}
    ratios = {c: sum(each[t] / own[t] for t in TASKS) / 2 for c, each in sums.items()}
    assert [p.normalised for p in added.grid] == pytest.approx(list(ratios.values()), rel=1e-5)
    assert added.scaling_coef == min(ratios, key=lambda coef: ratios[coef])
    forgot = negation(measured, VECTORS["right"], "right", coefs=COEFS, control_share=0.7)
    before = figures([], VALIDATION)["left"]
    for point in forgot.grid:
        after = figures([(-point.scaling_coef, VECTORS["right"])], VALIDATION)
        assert point.control == pytest.approx(after["left"], rel=1e-5)
        assert (point.target is not None) == (after["left"] <= before / 0.7)
    assert forgot.target["value"] >= forgot.target_zero_shot["value"]


class Dial:
    """A model of one weight, whose accuracies are functions of what an edit makes of it."""

    def __init__(self, **curves: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        mask = Mask.from_dense({"weight": torch.ones(1, 1) > 0})
        self.vector = TaskVector(mask, torch.ones(1))
        self.curves = curves
        self.asked: list[tuple[float, str, str]] = []

    def outcomes(self) -> Outcomes:
        def judge(split: str, task: str) -> Any:
            def right(model: nn.Module) -> torch.Tensor:
                scale = round(float(model.weight), 4)
                self.asked.append((scale, task, split))
                return torch.arange(100) < 100 * self.curves[task](scale)

            return right

        test, validation = (
            {task: judge(split, task) for task in self.curves} for split in ("test", "validation")
        )
        return Outcomes(self.model, test, validation, resamples=10)


def test_negation_takes_the_lowest_target_that_keeps_the_control() -> None:
    dial = Dial(target=lambda scale: 0.8 + 0.5 * scale, other=lambda scale: 0.8 + 0.101 * scale)
    forgot = negation(dial.outcomes(), dial.vector, "target")
    assert forgot.scaling_coef == 0.4  # 0.45 is the largest that keeps it, but not in resamples
    assert forgot.target["value"] == pytest.approx(0.6)
    assert forgot.control["value"] >= 0.95 * 0.8
    # Resamples choose others: each is tested once, and few are.
    tested = [(scale, task) for scale, task, split in dial.asked if scale and split == "test"]
    scales = {scale for scale, _ in tested}
    assert sorted(tested) == sorted((scale, task) for scale in scales for task in dial.curves)
    assert -0.4 in scales
    assert 1 < len(scales) < 10
    least = min(point.control for point in forgot.grid if point.target is not None)
    assert least >= 0.95 * 0.8 > forgot.grid[-1].control


COEFS_OF_CURVE = [i / 10 for i in range(11)]


def curve(scale: float) -> float:
    return 0.9 - 0.9 * (scale - 0.5) ** 2


def chosen_by_chance(seed: int) -> tuple[float, Estimate, Estimate]:
    """Choose on 40 rows; return the true figure, its estimate, and one that ignores the choice."""
    draw = torch.Generator().manual_seed(seed)
    answers = {}
    for split, rows in (("validation", 40), ("test", 1500)):
        shared = torch.rand(rows, 1, generator=draw).expand(rows, 11)
        own = torch.rand(rows, 11, generator=draw)
        level = torch.where(torch.rand(rows, 1, generator=draw) < 0.5, shared, own)
        answers[split] = level < torch.tensor([curve(scale) for scale in COEFS_OF_CURVE])
    dial = Dial()

    def judge(split: str) -> Any:
        return lambda model: answers[split][:, round(10 * float(model.weight))]

    outcomes = Outcomes(
        dial.model, {"task": judge("test")}, {"task": judge("validation")}, resamples=200
    )
    added = addition(outcomes, {"task": dial.vector}, coefs=COEFS_OF_CURVE)
    return curve(added.scaling_coef), added.absolute, outcomes.bootstrap.mean(added.outcomes)


def test_an_interval_holds_the_choice_of_the_coefficient() -> None:
    found = [chosen_by_chance(seed) for seed in range(100)]
    expected = sum(true for true, _, _ in found) / len(found)

    def coverage(which: int) -> float:
        return sum(each[which]["low"] <= expected <= each[which]["high"] for each in found) / 100

    assert coverage(1) >= 0.95 > 0.9 > coverage(2)
    assert sum(each["low"] <= true <= each["high"] for true, each, _ in found) >= 95
    assert all(each["value"] == plain["value"] for _, each, plain in found)


def test_negation_gives_up_past_a_broken_control() -> None:
    dial = Dial(target=lambda scale: 0.8 + scale, other=lambda scale: 0.8 if scale > -0.2 else 0.1)
    forgot = negation(dial.outcomes(), dial.vector, "target")
    assert forgot.scaling_coef == 0.15
    assert [p.scaling_coef for p in forgot.grid if p.target is None] == [0.2, 0.25, 0.3, 0.35]
    assert min(scale for scale, _, _ in dial.asked) == -0.35


def test_negation_may_leave_the_model_alone() -> None:
    dial = Dial(target=lambda scale: 0.8 - scale / 10, other=lambda scale: 0.8)
    forgot = negation(dial.outcomes(), dial.vector, "target", coefs=[0.5, 1.0])
    assert forgot.scaling_coef == 0
    assert forgot.why_zero == (
        "no coefficient lowers the target's figure: 0.5 comes nearest, with 0.85 beside 0.8"
    )
    dial = Dial(target=lambda scale: 0.8 + scale, other=lambda scale: 0.8 if scale == 0 else 0.1)
    forgot = negation(dial.outcomes(), dial.vector, "target", coefs=[0.5, 1.0])
    assert (forgot.scaling_coef, forgot.target["value"]) == (0, 0.8)
    assert forgot.why_zero == (
        "no coefficient but 0 keeps 95 % of the control: 0.5 comes nearest, with 0.1 beside 0.8"
    )
    dial = Dial(target=lambda scale: 0.8 - scale / 10, other=lambda scale: 0.8 + 0.1 * scale)
    forgot = negation(dial.outcomes(), dial.vector, "target", coefs=[0.1, 0.5, 1.0])
    assert forgot.why_zero == (
        "no coefficient that keeps 95 % of the control lowers the target's figure: 0.1 comes "
        "nearest, with 0.81 beside 0.8; of the others 0.5 keeps most of the control, with 0.75 "
        "beside 0.8"
    )
    dial = Dial(target=lambda scale: 0.8 + scale, other=lambda scale: 0.8)
    assert negation(dial.outcomes(), dial.vector, "target", coefs=[0.5]).why_zero is None


def test_an_addition_that_leaves_the_model_alone_says_so() -> None:
    dial = Dial(task=lambda scale: 0.8 - 0.1 * scale)
    added = addition(dial.outcomes(), {"task": dial.vector}, coefs=[0.0, 0.5, 1.0])
    assert added.scaling_coef == 0
    assert added.why_zero == (
        "no coefficient beats the pretrained model's normalised figure on validation examples: "
        "0.5 comes nearest, with 1.071 beside 1.143"
    )
    assert addition(dial.outcomes(), {"task": dial.vector}, coefs=[0.0]).why_zero is None


def test_the_middle_of_equal_coefficients_is_chosen() -> None:
    dial = Dial(task=lambda scale: 0.5 + min(scale, 0.3))
    added = addition(dial.outcomes(), {"task": dial.vector}, coefs=[1.0, 0.3, 0.6, 0.0])
    assert added.scaling_coef == 0.6
    # Merged at the one coefficient that all resamples choose, and the task's own.
    assert sum(split == "test" for _, _, split in dial.asked) == 2


@pytest.mark.parametrize(
    ("whole", "resamples", "place"),
    [
        ((5, 6, 7, 8), (1, 1, 3, 3), 2),  # between the best of the resamples
        ((5, 6, 7, 8), (1, 1, 1, 1), 1),
        ((5, 6, 7, 8), (0, 0, 0, 1), 1),  # 0 is beaten on all examples, so it is not taken
        ((8, 6, 7, 5), (1, 1, 3, 3), 0),  # nothing beats 0
        ((8 - 1e-12, 8, 7, 5), (1, 1, 1, 1), 0),  # but for rounding
        ((8 - 1e-6, 8, 7, 5), (1, 1, 1, 1), 1),
        ((5, 6, math.inf, 8), (1, 1, 1, 3), 1),  # what overflows is not taken
    ],
)
def test_the_mean_of_the_best_of_resamples_is_chosen(
    whole: tuple[float, ...], resamples: tuple[int, ...], place: int
) -> None:
    coefs = [0.0, 0.2, 0.4, 0.6]
    table = torch.zeros(1 + len(resamples), 4, dtype=torch.float64)
    table[0] = torch.tensor(whole)
    table[range(1, 5), list(resamples)] = 1
    assert choose(coefs, table, highest=True).tolist() == [place, *resamples]
    if math.isfinite(max(whole)):
        assert choose(coefs, -table, highest=False).tolist() == [place, *resamples]
        back = choose(coefs[::-1], table.flip(1), highest=True)
        assert back.tolist() == [3 - each for each in (place, *resamples)]


def test_of_equal_coefficients_the_middle_one_counts() -> None:
    table = torch.tensor([[5, 8, 8, 8, 7], [1, 1, 1, 1, 1], [0, 0, 3, 3, 0]], dtype=torch.float64)
    assert choose([0.0, 0.2, 0.4, 0.6, 0.8], table, highest=True).tolist() == [2, 2, 2]
    table[2] = torch.tensor([0, 0, 0, 3, 3])
    assert choose([0.0, 0.2, 0.4, 0.6, 0.9], table, highest=True).tolist() == [2, 2, 3]


def test_no_coefficient_between_two_good_ones_is_chosen() -> None:
    table = torch.tensor([[0.7, 0.8, 0.4, 0.8, 0.2]] * 3, dtype=torch.float64)
    table[1, 1] = table[2, 3] = 1  # the mean of the best ones is 0.5, which is worse than 0
    for each, highest in ((table, True), (-table, False)):
        assert choose([0.0, 0.25, 0.5, 0.75, 1.0], each, highest=highest)[0] in (1, 3)


def test_only_what_keeps_the_control_is_chosen() -> None:
    table = torch.tensor([[0.5, 0.6, 0.7, 0.8]] * 5, dtype=torch.float64)
    kept = torch.ones_like(table, dtype=torch.bool)
    kept[0, 3] = kept[1, 2:] = kept[2, 1:] = False
    places = choose([0.0, 0.2, 0.4, 0.6], table, highest=True, kept=kept)
    assert places.tolist() == [2, 1, 0, 3, 3]
    kept[3:, 2:] = False
    assert choose([0.0, 0.2, 0.4, 0.6], table, highest=True, kept=kept).tolist()[0] == 1
    with pytest.raises(TalosValueError, match="figures must be finite at one coefficient at least"):
        choose([0.0, 0.2], torch.full((3, 2), math.inf), highest=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefs": []}, "coefs must hold at least one"),
        ({"coefs": [0.5, math.nan]}, "coefs must be finite real numbers, got nan"),
        ({"vectors": {}}, "vectors must hold the vector of at least one task"),
        ({"vectors": {"none": VECTORS["left"]}}, "validation judges' left, right, got none"),
    ],
)
def test_an_addition_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        addition(outcomes(), **{"vectors": VECTORS, "coefs": COEFS, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefs": [-0.5]}, "coefs must be at least 0, got -0.5"),
        ({"control_share": 0.0}, "control_share must lie in"),
        ({"target": "none"}, "target must be one of the judged tasks left, right, got none"),
        ({"control": ["left"]}, "control must name at least one task other than the target left"),
        ({"control": []}, "got none"),
    ],
)
def test_a_negation_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        negation(outcomes(), VECTORS["left"], **{"target": "left", **settings})


def test_a_disentanglement_is_checked() -> None:
    with pytest.raises(TalosTypeError, match=r"predictions, integers, got torch\.bool"):
        disentanglement(outcomes(), VECTORS)
    with pytest.raises(TalosValueError, match="at least two tasks, got left"):
        disentanglement(outcomes(), {"left": VECTORS["left"]})


def test_coefficients_end_at_0_and_1() -> None:
    assert scaling_coefs(21)[::10] == [0.0, 0.5, 1.0]
    with pytest.raises(TalosValueError, match="count must be an integer of at least 2, got 1"):
        scaling_coefs(1)


def test_a_model_that_overflows_is_never_the_worst_of_a_negation() -> None:
    model = small_models()["left"]
    vector = small_vectors(small_models())["left"]
    name = vector.mask.names[0]
    first = named_parameters(model)[name].detach().clone()

    def diverging(module: nn.Module) -> Tensor:
        moved = float((named_parameters(module)[name].detach() - first).abs().sum())
        return torch.full((4,), math.inf if moved > 3 else 1.0 + moved, dtype=torch.float64)

    asked = {"target": diverging, "other": lambda module: torch.ones(4)}
    perplexity = Metric(better="lower")
    found = negation(Outcomes(model, asked, asked, metric=perplexity), vector, "target")
    finite = [p for p in found.grid if p.target is not None and math.isfinite(p.target)]
    assert len(finite) < len(found.grid)
    assert found.scaling_coef == max(finite, key=lambda point: point.target or 0).scaling_coef > 0


def test_no_share_of_a_negative_control_is_kept() -> None:
    model, vector = small_models()["left"], small_vectors(small_models())["left"]
    asked: dict[str, Judge] = {task: lambda module: -torch.ones(4) for task in TASKS}
    with pytest.raises(TalosValueError, match="control's figure must be at least 0, got -1"):
        negation(Outcomes(model, asked, asked), vector, "left")


def test_what_cannot_be_listed_is_refused() -> None:
    model, vector = small_models()["left"], small_vectors(small_models())["left"]
    asked: dict[str, Judge] = {task: lambda module: torch.ones(4) for task in TASKS}
    outcomes = Outcomes(model, asked, asked)
    with pytest.raises(TalosTypeError, match="coefs must be a list of numbers"):
        addition(outcomes, {"left": vector}, coefs=0.5)
    with pytest.raises(TalosTypeError, match="control must be a list of tasks, got 'right'"):
        negation(outcomes, vector, "left", control="right")
