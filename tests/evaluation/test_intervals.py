"""Bootstrap intervals: against the binomial, paired, and where every answer is the same."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.evaluation import Bootstrap, Metric
from talos.evaluation import intervals as module
from talos.evaluation.intervals import Picked


def test_intervals_agree_with_the_binomial() -> None:
    correct = torch.arange(500) < 400
    entry = Bootstrap({"a": 500}, resamples=4000).mean({"a": correct})
    spread = 1.96 * (0.8 * 0.2 / 500) ** 0.5
    assert (entry["value"], entry["n"]) == (0.8, 500)
    assert entry["low"] == pytest.approx(0.8 - spread, abs=0.006)
    assert entry["high"] == pytest.approx(0.8 + spread, abs=0.006)


@pytest.mark.parametrize("chunk", [1, 100])
def test_the_size_of_a_part_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    row = torch.randn(30)
    whole = Bootstrap({"a": 30}, resamples=50).mean({"a": row})
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert Bootstrap({"a": 30}, resamples=50).mean({"a": row}) == whole


@pytest.mark.parametrize("n", [1, 30, 400])
def test_all_right_and_all_wrong_have_the_interval_of_clopper_and_pearson(n: int) -> None:
    bootstrap = Bootstrap({"a": n}, resamples=2000)
    right = bootstrap.mean({"a": torch.ones(n, dtype=torch.bool)})
    wrong = bootstrap.mean({"a": torch.zeros(n, dtype=torch.bool)})
    # All of n right answers have the probability p^n, which is 2.5 % at the lower limit.
    limit = math.exp(math.log(0.025) / n)
    assert (right["value"], right["high"]) == (1, 1)
    assert right["low"] == pytest.approx(limit, abs=2e-3)
    assert (wrong["value"], wrong["low"]) == (0, 0)
    assert wrong["high"] == pytest.approx(1 - limit, abs=2e-3)


def test_an_interval_of_means_and_ratios_has_a_width_at_the_ends() -> None:
    right = {task: torch.ones(40, dtype=torch.bool) for task in ("a", "b")}
    bootstrap = Bootstrap(dict.fromkeys(right, 40), resamples=500)
    mean = bootstrap.mean(right)
    alone = bootstrap.mean({"a": right["a"]})
    assert alone["low"] < mean["low"] < mean["high"] == 1
    part = {task: torch.arange(40) < 30 for task in right}
    ratio = bootstrap.normalised(right, part)
    assert ratio["value"] == pytest.approx(4 / 3)
    assert ratio["low"] < ratio["value"] < ratio["high"]


@pytest.mark.parametrize("chunk", [1 << 18, 100])
def test_a_resample_picks_its_own_model(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    tried = torch.rand(3, 30)
    bootstrap = Bootstrap({"a": 30}, resamples=60)
    picks = torch.arange(60) % 3
    seen = {}

    def kept(name: str) -> Callable[[Any], Tensor]:
        def statistic(figures: Any) -> Tensor:
            seen[name] = figures["a"]
            return figures["a"].mean(-1)

        return statistic

    bootstrap({"a": list(tried)}, kept("each"))
    picked = bootstrap({"a": [Picked(tried[1], tried, picks)]}, kept("picked"))
    assert torch.equal(seen["picked"][:, 0], seen["each"][torch.arange(60), picks])
    assert picked["value"] == pytest.approx(float(tried[1].mean()))
    assert picked["low"] <= picked["value"] <= picked["high"]
    once = Picked(tried[1], tried[1:2], torch.zeros(60, dtype=torch.int64))
    assert bootstrap.mean({"a": once}) == bootstrap.mean({"a": tried[1]})


def test_picked_answers_that_are_all_right_have_a_width() -> None:
    tried = torch.stack([torch.ones(30), torch.arange(30) < 20]) > 0
    picks = torch.arange(2000) % 2
    found = Bootstrap({"a": 30}).mean({"a": Picked(tried[0], tried, picks)})
    right, part = (Bootstrap({"a": 30}).mean({"a": each}) for each in tried)
    assert (found["value"], found["high"]) == (1, 1)
    assert part["low"] - 0.02 < found["low"] < right["low"]


def test_numbers_that_are_no_answers_are_resampled_as_they_are() -> None:
    entry = Bootstrap({"a": 30}, resamples=50).mean({"a": torch.ones(30)})
    assert (entry["low"], entry["value"], entry["high"]) == (1, 1, 1)


def test_differences_are_paired() -> None:
    merged = {t: torch.rand(300) < 0.7 for t in ("a", "b")}
    single = {t: torch.rand(300) < 0.8 for t in ("a", "b")}
    bootstrap = Bootstrap({"a": 300, "b": 300}, resamples=500)
    same = bootstrap.normalised_gain((merged, single), (merged, single))
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    apart = bootstrap.normalised_gain((merged, single), (single, single))
    relative = bootstrap.normalised(merged, single)
    assert apart["value"] == pytest.approx(relative["value"] - 1)
    assert apart["high"] < 0
    # One example of 300 changes: unpaired, the interval would be about 6 points wide.
    after = {"a": merged["a"].clone()}
    after["a"][int(merged["a"].int().argmin())] = True
    gain = bootstrap.gain(after, {"a": merged["a"]})
    assert gain["value"] == pytest.approx(1 / 300)
    assert 0 <= gain["low"] < gain["high"] < 4 / 300


def test_an_interval_over_seeds_holds_their_spread_and_that_of_the_examples() -> None:
    bootstrap = Bootstrap({"a": 50})
    right = torch.arange(50) < 30
    same = {"a": [right, right, right]}
    table = bootstrap.resampled(same, lambda figures: figures["a"])
    assert bootstrap.over_seeds(table) == pytest.approx(bootstrap.mean({"a": right}))
    # Seeds that differ by 0.2, examples that do not vary: of two draws a half is one of each.
    apart = torch.tensor([0.4, 0.6], dtype=torch.float64).expand(2001, 2)
    found = bootstrap.over_seeds(apart)
    assert found == pytest.approx({"value": 0.5, "low": 0.4, "high": 0.6, "n": 50})
    for other in (apart[:, :0], apart[1:], apart[:, 0]):
        with pytest.raises(TalosValueError, match=r"table must be \[2001, seeds\], .* got \["):
            bootstrap.over_seeds(other)


def test_another_metric_is_reduced_in_every_resample() -> None:
    resamples: list[Tensor] = []

    def median(outcomes: Tensor) -> Tensor:
        resamples.append(outcomes)
        return outcomes.median(-1).values

    row = torch.randn(31)
    entry = Bootstrap({"a": 31}, resamples=200, metric=Metric(median)).mean({"a": row})
    (drawn,) = (each for each in resamples if len(each) == 200)
    medians = torch.stack([each.sort().values[15] for each in drawn])
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    assert [entry["low"], entry["high"]] == medians.quantile(ends).tolist()
    assert entry["value"] == row.double().sort().values[15]


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ({"b": torch.ones(3)}, "outcomes must be of the tasks a, got b"),
        ({"a": torch.ones(4)}, r"outcomes of a must be \[3\].*got \[4\]"),
    ],
)
def test_outcomes_of_other_examples_are_refused(outcomes: Any, message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        Bootstrap({"a": 3}, resamples=2).mean(outcomes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resamples": 0}, "resamples must be"),
        ({"seed": -1}, "seed must be"),
        ({"examples": {"a": 0}}, "examples of a must be"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        Bootstrap(**{"examples": {"a": 3}, **settings})


@pytest.mark.parametrize(
    ("reduce", "match"),
    [
        (lambda outcomes: outcomes.mean(), r"return \[1\], one number of 3 outcomes, got \[\]"),
        (lambda outcomes: 0.5, "got float"),
        # undefined in the resamples that draw the first example only
        (lambda outcomes: outcomes.sum(-1) / outcomes.sum(-1), "got NaN"),
    ],
)
def test_a_metric_that_the_resamples_do_not_fit_is_refused(
    reduce: Callable[[Tensor], Any], match: str
) -> None:
    with pytest.raises(TalosValueError, match=match):
        Bootstrap({"a": 3}, metric=Metric(reduce)).mean({"a": torch.tensor([0.0, 0.0, 1.0])})


def test_no_task_is_refused() -> None:
    with pytest.raises(TalosValueError, match="at least one task, got none"):
        Bootstrap({"a": 3}).mean({})


def test_the_interval_of_a_task_depends_on_no_other_task() -> None:
    outcomes = torch.randn(40)
    alone = Bootstrap({"a": 40}).mean({"a": outcomes})
    assert Bootstrap({"b": 7, "a": 40}).mean({"a": outcomes}) == alone
    assert Bootstrap({"a": 40}, seed=1).mean({"a": outcomes}) != alone
    assert Bootstrap({"b": 40}).mean({"b": outcomes}) != alone
