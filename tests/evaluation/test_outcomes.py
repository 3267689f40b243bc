"""Outcomes: every judge is called as often as it must, and the model is given back."""

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.evaluation import (
    Outcomes,
    addition,
    disentanglement,
    interference,
    negation,
    predictions,
    right_answers,
)
from talos.methods import LinearizedModel
from tests.cases import assert_bit_equal
from tests.evaluation.small import (
    TASKS,
    edited,
    judges,
    share,
    small_data,
    small_models,
    small_vectors,
)

MODELS = small_models()
VECTORS = small_vectors(MODELS)
VALIDATION, TEST = small_data(0), small_data(1)


def counted(calls: list[str]) -> Outcomes:
    return Outcomes(
        MODELS,
        judges(TEST, right_answers, calls, "test "),
        judges(VALIDATION, right_answers, calls, "validation "),
        judges(VALIDATION, right_answers, calls, "control "),
        resamples=10,
    )


def test_addition_asks_no_more_than_it_must() -> None:
    calls: list[str] = []
    outcomes = counted(calls)
    addition(outcomes, VECTORS, coefs=[0.0, 0.5, 1.0])
    # A task: zero-shot, its own vector and two merged models; then the test of its own vector, and
    # of the two merged models that resamples choose.
    chosen = 4 * ["validation left", "validation right"] + 3 * ["test left", "test right"]
    assert Counter(calls) == Counter(chosen)
    calls.clear()
    addition(outcomes, VECTORS, 2 * VECTORS["left"], coefs=[0.0, 0.5])
    assert Counter(calls) == Counter({f"{s} {t}": 1 for s in ("validation", "test") for t in TASKS})


def test_the_others_ask_only_for_what_is_not_known() -> None:
    calls: list[str] = []
    outcomes = counted(calls)
    interference(outcomes, VECTORS)
    assert Counter(calls) == {"test left": 3, "test right": 3}
    calls.clear()
    version = MODELS["left"][0][0].weight._version
    interference(outcomes, VECTORS)
    outcomes.of("test", VECTORS["left"])
    assert not calls
    assert MODELS["left"][0][0].weight._version == version  # nothing was put on
    negation(outcomes, VECTORS["left"], "left", coefs=[0.0, 0.5], control_share=0.01)
    assert Counter(calls) == {
        "control right": 2,
        "validation left": 2,
        "test left": 1,
        "test right": 1,
    }


def test_a_judge_of_two_splits_is_asked_once() -> None:
    calls: list[str] = []
    judged = judges(TEST, right_answers, calls)
    negation(Outcomes(MODELS, judged, judged), VECTORS["left"], "left", coefs=[0.5])
    assert Counter(calls) == dict.fromkeys(TASKS, 2)


def test_outer_ones_of_what_resamples_choose_are_evaluated() -> None:
    calls: list[str] = []
    outcomes = counted(calls)
    coefs = [0.0, 0.4, 0.5, 0.8]
    places = torch.tensor([2] + 98 * [1] + 2 * [3])
    picked = outcomes.picked(VECTORS["left"], coefs, places, ["left"])["left"]
    assert calls == 2 * ["test left"]  # 0.4 and 0.5, and 0.5 for 0.8
    assert picked.picks.tolist() == 98 * [0] + 2 * [1]
    for row, coef in zip(picked.tried, coefs[1:3], strict=True):
        assert torch.equal(row, outcomes.of("test", VECTORS["left"], coef)["left"])
    assert torch.equal(picked.taken, picked.tried[1])


def test_a_fine_grid_takes_three_evaluations_with_the_scatter_of_the_choices() -> None:
    calls: list[str] = []
    coefs = [i / 100 for i in range(101)]
    choices = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10 + 50
    places = torch.cat([torch.tensor([50]), choices.round().clamp(0, 100).long()])
    picked = counted(calls).picked(VECTORS["left"], coefs, places, ["left"])["left"]
    assert len(calls) == len(picked.tried) == 3
    ends = choices.quantile(torch.tensor([0.042, 0.958]))
    stand_ins = torch.tensor([float(ends[0]), 50, float(ends[1])])[picked.picks]
    assert 0.95 * choices.std() < stand_ins.std() < 1.15 * choices.std()


def test_another_vector_inside_of_a_search_is_refused() -> None:
    outcomes = counted([])
    with outcomes.resident(VECTORS["left"]):
        with pytest.raises(TalosRuntimeError, match="must be the one that is resident"):
            outcomes.of("test", VECTORS["right"])
        outcomes.of("test", VECTORS["left"])
    outcomes.of("test", VECTORS["right"])


@pytest.mark.parametrize("coefs", [[0.0, 0.4, 0.8], [0.4, 0.8]])
def test_the_grid_of_disentanglement_asks_no_more_than_it_must(coefs: list[float]) -> None:
    calls: list[str] = []
    outcomes = Outcomes(MODELS, judges(TEST, predictions, calls))
    points: list[Any] = []
    disentanglement(outcomes, VECTORS, coefs=coefs, on_point=lambda *point: points.append(point))
    n = len(coefs)
    # n^2 merged models on two tasks; the single ones are among them if the grid holds 0.
    singles = 0 if 0.0 in coefs else n
    assert Counter(calls) == dict.fromkeys(TASKS, n * n + singles)
    assert len(points) == n * n


def test_the_model_is_given_back_bit_for_bit() -> None:
    before = {task: deepcopy(model.state_dict()) for task, model in MODELS.items()}
    outcomes = counted([])
    addition(outcomes, VECTORS, coefs=[0.3, 0.9])
    negation(outcomes, VECTORS["left"], "left")
    disentanglement(Outcomes(MODELS, judges(TEST, predictions)), VECTORS, coefs=[0.4, 0.8])

    def broken(model: nn.Module) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Outcomes(MODELS, dict.fromkeys(TASKS, broken)).of("test", VECTORS["left"])
    later = Outcomes(MODELS, dict.fromkeys(TASKS, broken))
    with later.resident(VECTORS["left"]), pytest.raises(RuntimeError, match="broken"):
        later.of("test", VECTORS["left"], 0.3)
    for task, model in MODELS.items():
        assert all(module.training for module in model.modules())
        for name, value in model.state_dict().items():
            assert_bit_equal(value, before[task][name])


def test_what_a_dead_vector_gave_is_forgotten() -> None:
    calls: list[str] = []
    outcomes = counted(calls)
    for factor in (1.0, 3.0, 9.0):  # a new vector may have the address of the last one
        vector = factor * VECTORS["left"]
        found = outcomes.of("validation", vector)
        copies = edited(MODELS, [(1.0, vector)])
        for task in TASKS:
            assert outcomes.metric.figure(found[task]) == share(copies[task], VALIDATION[task])
        del vector, found
    assert len(calls) == 6


def test_modules_that_do_not_share_the_weights_are_refused() -> None:
    apart = {task: deepcopy(model) for task, model in MODELS.items()}
    outcomes = Outcomes(apart, judges(TEST, right_answers))
    with pytest.raises(
        TalosValueError, match=r"among its modules, got another 0\.0\.\w+ for right"
    ):
        outcomes.of("test", VECTORS["left"])


def test_expansions_share_what_is_known_of_the_pretrained_model() -> None:
    calls: list[str] = []
    outcomes = counted(calls)
    before = outcomes.of("test")
    expanded = {task: LinearizedModel(model) for task, model in MODELS.items()}
    other = outcomes.through(expanded)
    calls.clear()
    assert torch.equal(other.of("test")["left"], before["left"])
    assert not calls
    small, large = (other.of("test", VECTORS["left"], coef)["left"] for coef in (1e-6, 5.0))
    assert torch.equal(small, before["left"])
    with VECTORS["left"].applied(MODELS["left"], 5.0):
        inputs, labels = TEST["left"]
        expanded["left"].eval()
        with torch.no_grad():
            expected = expanded["left"](inputs).argmax(1) == labels
        expanded["left"].train()
    assert torch.equal(large, expected)
    assert not torch.equal(large, outcomes.of("test", VECTORS["left"], 5.0)["left"])


def test_a_judge_that_changes_its_examples_is_refused() -> None:
    lengths = iter([3, 3, 2])
    outcomes = Outcomes(MODELS["left"], {"left": lambda model: torch.ones(next(lengths))})
    outcomes.of("test")
    outcomes.of("test", VECTORS["left"])
    with pytest.raises(TalosValueError, match=r"test judge of left must .* got 3, then 2"):
        outcomes.of("test", VECTORS["left"], 0.5)


def test_a_judge_that_writes_the_edited_weights_is_refused() -> None:
    model = small_models()["left"]

    def writes(module: nn.Module) -> torch.Tensor:
        module[0][0].weight.mul_(2)
        return torch.ones(3)

    outcomes = Outcomes(model, {"left": writes})
    with pytest.raises(TalosRuntimeError, match="another version, so other code wrote it"):
        outcomes.of("test", VECTORS["left"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Outcomes("m", {"a": len}), TalosTypeError, "model must be a torch.nn.Module"),
        (lambda: Outcomes({}, {"a": len}), TalosValueError, "at least one module, got none"),
        (lambda: Outcomes({"a": 1}, {"a": len}), TalosTypeError, "model of a must be a torch"),
        (lambda: Outcomes(MODELS, {"a": len}), TalosValueError, "each judged task, got none for a"),
        (lambda: Outcomes(nn.Tanh(), {}), TalosValueError, "test must hold a judge"),
        (lambda: Outcomes(nn.Tanh(), {"a": 1}), TalosTypeError, "test must map tasks to judges"),
        (
            lambda: Outcomes(nn.Tanh(), {"a": len}).of("validation"),
            TalosValueError,
            "validation must be given, .* pass validation= to Outcomes",
        ),
        (
            lambda: Outcomes(nn.Tanh(), {"a": len}).of("test", coef="1"),
            TalosTypeError,
            "coef must be a real number, got '1'",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
