"""Gradient drift against autograd on copies of the model, kept while it trains."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talos import Mask, fine_tune
from talos.batches import default_logits
from talos.errors import TalosValueError
from talos.evaluation.drift import GradientDrift
from talos.training import FineTuneStep
from tests.cases import assert_bit_equal, assert_close

Batch = tuple[Tensor, Tensor]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def some_batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=draw), torch.randint(3, (n,), generator=draw)) for n in (1, 5)
    ]


def dense_gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradient of the labels' mean logit, one example after another, in float64."""
    model = deepcopy(model).double().eval().requires_grad_()
    model.zero_grad()
    for x, label in zip(*batch, strict=True):
        (model(x.double())[label] / len(batch[1])).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def expected_drift(
    before: nn.Module, now: nn.Module, batches: list[Batch], chosen: dict[str, Tensor]
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        old, new = dense_gradient(before, batch), dense_gradient(now, batch)
        total += sum((new[name] - old[name])[chosen[name]].square().sum() for name in chosen)
    return total / len(batches)


@pytest.mark.parametrize("masked", [True, False])
def test_drift_is_that_of_copies(masked: bool) -> None:
    model = small()
    draw = torch.Generator().manual_seed(2)
    chosen = {n: torch.rand(p.shape, generator=draw) < 0.5 for n, p in model.named_parameters()}
    chosen["0.weight"].zero_()  # the optimizer freezes this one
    mask = Mask.from_dense(chosen) if masked else None
    if not masked:
        chosen = {name: torch.ones_like(each) for name, each in chosen.items()}
    before, copies = deepcopy(model), []
    drift = GradientDrift(model, some_batches(), mask, every=2)

    def on_step(step: FineTuneStep) -> None:
        drift(step)
        if step.step in (2, 4, 5):
            copies.append(deepcopy(model))

    fine_tune(model, some_batches(), mask, steps=5, lr=0.05, on_step=on_step)
    assert [point.step for point in drift.points] == [2, 4, 5]
    for point, copy in zip(drift.points, copies, strict=True):
        expected = expected_drift(before, copy, some_batches(), chosen)
        assert expected > 0
        assert_close(torch.tensor(point.squared), expected.float(), reduction=True)
    initial = sum(
        dense_gradient(before, batch)[name][chosen[name]].square().sum()
        for batch in some_batches()
        for name in chosen
    )
    assert_close(torch.tensor(drift.initial), (initial / 2).float(), reduction=True)


def test_measuring_does_not_change_the_training() -> None:
    vectors = []
    for measured in (True, False):
        model = small()
        mask = Mask.from_dense({"3.weight": torch.ones(3, 6) > 0})
        drift: Any = GradientDrift(model, some_batches(), mask) if measured else None
        torch.manual_seed(3)  # dropout
        vectors.append(fine_tune(model, some_batches(), mask, steps=3, on_step=drift))
    assert_bit_equal(vectors[0].values, vectors[1].values)


def test_a_linear_model_does_not_drift() -> None:
    model = nn.Linear(4, 3)
    drift = GradientDrift(model, some_batches())
    fine_tune(model, some_batches(), steps=3, lr=0.1, on_step=drift)
    assert [point.squared for point in drift.points] == [0.0, 0.0, 0.0]


def test_what_cannot_be_measured_is_refused() -> None:
    model = small()
    with pytest.raises(TalosValueError, match="batches must hold at least one batch"):
        GradientDrift(model, [])
    with pytest.raises(TalosValueError, match="every must be"):
        GradientDrift(model, some_batches(), every=0)
    with pytest.raises(TalosValueError, match="batch must be a mapping with 'labels'"):
        GradientDrift(model, [torch.ones(2, 4)])
    tokens, labels = torch.randn(2, 2, 4), torch.zeros(2).long()
    with pytest.raises(
        TalosValueError, match=r"got \[2, 2, 3\] and \[2\].* logits_fn=lambda .*-1]"
    ):
        GradientDrift(model, [(tokens, labels)])
    last = GradientDrift(
        model, [(tokens, labels)], logits_fn=lambda m, batch: default_logits(m, batch)[:, -1]
    )
    alone = GradientDrift(model, [(tokens[:, -1], labels)])
    assert_close(torch.tensor(last.initial), torch.tensor(alone.initial), reduction=True)
    empty = Mask.from_dense({"0.bias": torch.zeros(6) > 0})
    with pytest.raises(TalosValueError, match="mask must select at least one entry"):
        GradientDrift(model, some_batches(), empty)
