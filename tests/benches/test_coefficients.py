"""The rules that choose a coefficient, on answers that are made up."""

import pytest
import torch
from torch import Tensor

from benches import bench_coefficients as bench


def answers(curve: list[float], examples: int, seed: int) -> dict[str, Tensor]:
    """Right answers of one task whose accuracy is a curve over the coefficients."""
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.rand(len(curve), examples, generator=draw) < torch.tensor(curve)[:, None]}


@pytest.fixture(autouse=True)
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SETS", 6)
    monkeypatch.setattr(bench, "RESAMPLES", 30)


def test_every_rule_finds_a_clear_best() -> None:
    curve = [0.2, 0.3, 0.9, 0.3, 0.2]
    coefs = [0.0, 0.25, 0.5, 0.75, 1.0]
    test = answers(curve, 500, 1)
    found = bench.compare(bench.Search("x", coefs, answers(curve, 300, 0), test))
    assert set(found) == set(bench.RULES)
    for name in ("highest", "smallest", "middle", "mean"):
        assert (found[name]["coefficient"], found[name]["deviation"]) == (0.5, 0.0)
        assert found[name]["test"] == pytest.approx(float(test["a"][2].double().mean()))
        assert found[name]["test"] == found[name]["best"]


def test_a_rule_stays_where_the_control_is_kept() -> None:
    target, control = [0.9, 0.6, 0.4, 0.2], [0.9, 0.9, 0.2, 0.1]
    search = bench.Search(
        "x",
        [0.0, 0.2, 0.4, 0.6],
        answers(target, 300, 0),
        answers(target, 300, 1),
        highest=False,
        control=({"b": answers(control, 300, 2)["a"]}, {"b": answers(control, 300, 3)["a"]}),
    )
    for record in bench.compare(search).values():
        assert float(str(record["coefficient"])) <= 0.2


def test_the_searches_hold_what_is_figured() -> None:
    coefs = [0.0, 0.5, 1.0]
    added = [{task: answers(coefs, 40, 0)["a"] for task in bench.TASKS}] * 2
    alone = {t: [{t: answers(coefs, 40, 1)["a"]}] * 2 for t in bench.TASKS}
    negated = {t: [{n: answers(coefs, 40, 2)["a"] for n in bench.PAIR}] * 2 for t in bench.PAIR}
    found = bench.searches_of(coefs, added, coefs, alone, negated)
    assert [search.name.rpartition(", ")[2] for search in found] == [
        "normalised",
        *2 * ["its own vector"],
        *2 * ["negated"],
    ]
    table = found[0].table(found[0].test, 0)
    first = bench.TASKS[0]
    assert table.shape == (31, 3)
    ratios = [
        added[0][t].double().mean(1) / alone[t][0][t][-1].double().mean() for t in bench.TASKS
    ]
    assert torch.allclose(table[0], torch.stack(ratios).mean(0))
    assert list(found[3].validation) == [first]
    assert found[3].control is not None
    assert list(found[3].control[0]) == [bench.PAIR[1]]
