"""Numbers from configuration files, NumPy and torch are taken wherever a number is asked for."""

from collections import UserList
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import talos
from talos.errors import TalosTypeError, TalosValueError
from talos.options import as_real
from talos.training import fine_tune_steps

NUMBERS: tuple[Any, ...] = (
    0.25,
    np.float32(0.25),
    np.float64(0.25),
    np.float16(0.25),
    np.array(0.25),
    Fraction(1, 4),
    torch.tensor(0.25),
    torch.tensor([0.25]),
    torch.tensor(0.25, dtype=torch.float64),
    torch.tensor([[0.25]]),
)
NO_NUMBERS: tuple[Any, ...] = (True, "0.25", None, [0.25], torch.tensor([0.25, 0.5]), 1j)


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_a_number_of_any_kind_is_that_number(number: Any) -> None:
    assert as_real(number) == 0.25
    batch = torch.randn(16, 4)
    wanted = talos.calibrate(model(), [batch], 0.25, 1)
    assert talos.calibrate(model(), [batch], number, 1, soft=number) == wanted
    scores = {"a": torch.rand(16)}
    assert talos.Mask.from_scores(scores, number).nnz == 4
    vector = talos.TaskVector(wanted, torch.ones(wanted.nnz))
    assert torch.equal((number * vector).values, (0.25 * vector).values)
    assert torch.equal((vector * number).values, (0.25 * vector).values)
    assert torch.equal((vector / number).values, (4 * vector).values)
    edited, other = model(), model()
    vector.apply_(edited, number)
    vector.apply_(other, 0.25)
    assert torch.equal(edited.weight, other.weight)


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_the_optimizer_takes_what_torchs_takes(number: Any) -> None:
    mask = talos.Mask.from_dense({"weight": torch.ones(3, 4) > 0})
    results = []
    for rate, betas in ((number, UserList([number, number])), (0.25, (0.25, 0.25))):
        trained = model()
        optimizer = talos.SparseAdam(
            trained, mask, lr=rate, betas=betas, eps=rate, weight_decay=rate
        )
        for _ in range(2):
            trained(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        results.append(trained.weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(value: Any) -> None:
    assert as_real(value) is None
    mask = talos.Mask.from_dense({"weight": torch.ones(3, 4) > 0})
    vector = talos.TaskVector(mask, torch.ones(12))
    with pytest.raises(TalosTypeError, match="scale must be a real number"):
        vector.apply_(model(), value)
    with pytest.raises(TypeError):
        _ = value * vector
    with pytest.raises(TalosValueError, match="density must lie in"):
        talos.Mask.from_scores({"a": torch.rand(16)}, value)
    with pytest.raises((TalosTypeError, TalosValueError), match="epsilon"):
        talos.SparseAdam(model(), mask, eps=value)


@pytest.mark.parametrize(
    "kind", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"]
)
def test_an_integer_of_any_kind_is_that_integer(kind: Any) -> None:
    batches = [(torch.ones(2, 4), torch.tensor([0, 2]))]
    results = []
    for of in (int, kind):
        tuned = model()
        steps = [
            step.steps
            for step in fine_tune_steps(
                tuned, batches, steps=of(3), warmup=of(1), accumulate=of(2), method="nonlinear"
            )
        ]
        assert steps == [3] * 3
        mask = talos.Mask.from_dense({"weight": torch.ones(3, 4) > 0})
        optimizer = talos.SparseAdam(tuned, mask, seed=of(7), moment_dtype=torch.bfloat16)
        tuned(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        results.append(tuned.weight.detach())
    assert torch.equal(*results)
    with pytest.raises(TalosValueError, match="steps must be an integer of at least 1"):
        talos.fine_tune(model(), batches, steps=kind(0))


@pytest.mark.parametrize("number", [10**400, -(10**400), Fraction(10**400)], ids=["+", "-", "/"])
def test_a_number_that_no_float_holds_is_refused_as_infinity_is(number: Any) -> None:
    mask = talos.Mask.from_dense({"w": torch.ones(2) > 0})
    vector = talos.TaskVector(mask, torch.ones(2))
    with pytest.raises(TalosValueError, match="scale must be finite"):
        _ = vector * number
    with pytest.raises(TalosValueError, match="scaling_coef must be a finite number"):
        talos.merge([vector], scaling_coef=number)
    with pytest.raises(TalosValueError, match=r"density must lie in \(0, 1\]"):
        vector.trim(number)
