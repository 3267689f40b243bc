"""Judges from batches, their errors, and metrics."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.evaluation import ACCURACY, Metric, ask, losses, predictions, right_answers
from tests.cases import assert_close
from tests.evaluation.small import batches, logits_of, small_data, small_models

MODELS, DATA = small_models(), small_data(0)
MODEL, (INPUTS, LABELS) = MODELS["left"], DATA["left"]
BATCHES = batches(DATA, "left")


def test_judges_agree_with_a_loop_over_examples() -> None:
    rows = logits_of(MODEL, INPUTS)
    chosen = [int(row.argmax()) for row in rows]
    assert predictions(BATCHES)(MODEL).tolist() == chosen
    right = [a == int(b) for a, b in zip(chosen, LABELS, strict=True)]
    assert right_answers(BATCHES)(MODEL).tolist() == right
    assert 0 < sum(right) < len(right)
    logs = [float(row.logsumexp(0) - row[label]) for row, label in zip(rows, LABELS, strict=True)]
    assert_close(losses(BATCHES)(MODEL), torch.tensor(logs), reduction=True)


def test_a_judge_gives_modes_and_gradients_back() -> None:
    model = small_models()["left"]
    model[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    outcomes = losses(BATCHES)(model)
    assert [module.training for module in model.modules()] == modes
    assert not outcomes.requires_grad
    assert torch.is_grad_enabled()


def test_a_judge_takes_mappings_and_a_function_of_logits() -> None:
    mapped = [{"labels": y, "x": x} for x, y in BATCHES]
    judge = right_answers(mapped, lambda model, batch: -model(batch["x"]))
    expected = (-logits_of(MODEL, INPUTS)).argmax(1) == LABELS
    assert judge(MODEL).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(BATCHES), "batches must be re-iterable, got an iterator"),
        ([], "at least one example, got none"),
        ([(INPUTS, LABELS[:3])], r"labels must be \[B\].*got \[3\] for logits \[48, 4\]"),
        ([(INPUTS[:, None], LABELS)], r"logits must be \[B, C\], got \[48, 1, 4\].*logits_fn"),
        ([INPUTS], "batch must be a mapping with 'labels' or a pair"),
    ],
)
def test_batches_that_cannot_be_judged_are_refused(data: object, message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        right_answers(data)(MODEL)


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        (0.5, TalosTypeError, "judge of a must return a tensor of real numbers, got float"),
        (torch.ones(2, dtype=torch.complex64), TalosTypeError, "real numbers, got torch.complex64"),
        (torch.tensor(0.5), TalosValueError, r"judge of a must return one number.*got shape \[\]"),
        (torch.ones(2, 1), TalosValueError, r"got shape \[2, 1\]"),
        (torch.ones(0), TalosValueError, r"at least one example.*got shape \[0\]"),
        (torch.tensor([1.0, math.nan]), TalosValueError, "got NaN for example 1"),
    ],
)
def test_outcomes_are_checked(outcome: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask(lambda model: outcome, MODEL, "judge of a")


def test_a_users_judge_runs_in_evaluation_mode_without_gradients() -> None:
    model = small_models()["left"]
    found = ask(lambda module: module(INPUTS).argmax(1), model, "judge")
    assert found.tolist() == logits_of(model, INPUTS).argmax(1).tolist()
    assert all(module.training for module in model.modules())


def test_a_judge_that_writes_a_weight_is_refused() -> None:
    model = small_models()["left"]

    def judge(module: nn.Module) -> torch.Tensor:
        next(module.parameters()).mul_(1.5)
        return torch.zeros(3)

    with pytest.raises(TalosRuntimeError, match="judge of left must only read the model"):
        ask(judge, model, "judge of left")


def test_what_a_judge_keeps_is_copied() -> None:
    kept = torch.zeros(2)
    found = ask(lambda module: kept, MODEL, "judge")
    kept.fill_(1)
    assert found.tolist() == [0, 0]


def test_a_metric_reduces_and_divides() -> None:
    perplexity = Metric(lambda each: each.mean(-1).exp(), better="lower")
    values = torch.tensor([0.5, 1.0, 3.0])
    assert perplexity.figure(values) == pytest.approx(math.exp(1.5))
    assert ACCURACY.figure(torch.tensor([True, False, False])) == 1 / 3
    above, below = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.0])
    assert ACCURACY.ratio(above, below).tolist() == [2.0, pytest.approx(500)]
    assert Metric(floor=0.5).ratio(above, below).tolist() == [1, 1]


def test_metrics_are_checked() -> None:
    with pytest.raises(TalosValueError, match="better must be higher or lower, got 'more'"):
        Metric(better="more")
    with pytest.raises(TalosValueError, match="floor must be positive"):
        Metric(floor=0.0)
    with pytest.raises(TalosValueError, match=re.escape("number of 2 outcomes, got [2]")):
        Metric(lambda each: each).figure(torch.ones(2))
    with pytest.raises(TalosValueError, match="got NaN"):
        Metric(lambda each: each.mean(-1).log()).figure(torch.tensor([-1.0]))
    with pytest.raises(TalosValueError, match="at least 0 where they are divided, got -1"):
        ACCURACY.ratio(torch.tensor([1.0]), torch.tensor([-1.0]))


def test_cross_entropy_of_half_precision_is_computed_in_float32() -> None:
    model = nn.Linear(6, 4).to(torch.bfloat16)
    half = [(INPUTS.to(torch.bfloat16), LABELS)]
    found = losses(half)(model)
    assert found.dtype == torch.float32
    expected = F.cross_entropy(model(half[0][0]).detach().double(), LABELS, reduction="none")
    assert_close(found, expected.float(), reduction=True)


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        # argmax takes NaN for the largest, so that class 0 would be right
        (torch.full((3, 2), math.nan), [0, 1, 0], "logits must be numbers, got NaN"),
        (None, [0, 1, 0], r"logits must be \[B, C\], got NoneType"),
        (torch.zeros(3, 0), [0, 1, 0], r"logits must be \[B, C\], got \[3, 0\]"),
        (torch.zeros(3, 2), [0, 1, 2], r"classes from 0 to 1, got \[0, 1, 2\]"),
        (torch.zeros(3, 2), [0, -100, 1], r"classes from 0 to 1, got \[-100, 0, 1\]"),
        (torch.zeros(3, 2), [0.0, 0.5, 1.0], r"classes from 0 to 1, got torch\.float32"),
        (torch.zeros(0, 2), [], "at least one example, got none"),
    ],
)
def test_what_cannot_be_judged_is_refused(logits: object, labels: list[float], match: str) -> None:
    batch = torch.zeros(len(labels), 1), torch.tensor(labels, dtype=None if labels else torch.int64)
    for make in (right_answers, losses):
        with pytest.raises(TalosValueError, match=match):
            make([batch], lambda model, batch: logits)(MODEL)


def test_labels_of_any_integers_are_taken() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for dtype in (torch.bool, torch.uint8, torch.int32):
        batch = torch.zeros(2, 1), torch.tensor([1, 1], dtype=dtype)
        assert right_answers([batch], lambda model, batch: logits)(MODEL).tolist() == [True, False]
        assert losses([batch], lambda model, batch: logits)(MODEL).tolist() == pytest.approx(
            [0.3133, 1.3133], abs=1e-4
        )
