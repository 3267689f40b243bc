"""Linearity against an expansion that is differentiated by hand."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from talos import Mask, TaskVector
from talos.batches import default_logits
from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation import Judge, Outcomes, losses, predictions, right_answers
from talos.evaluation.linearity import linearity
from tests.cases import assert_bit_equal

Batches = list[tuple[Tensor, Tensor]]


class Headed(nn.Module):
    """A head of its own around a shared body."""

    def __init__(self, body: nn.Module, seed: int) -> None:
        super().__init__()
        self.body = body
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("head", torch.randn(6, 3, generator=draw), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x) @ self.head
        return logits


def tasks() -> tuple[dict[str, nn.Module], dict[str, Batches], dict[str, TaskVector]]:
    """Two tasks of random inputs and labels, with large edits of different weights."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 6))
    draw = torch.Generator().manual_seed(1)
    models: dict[str, nn.Module] = {}
    data: dict[str, Batches] = {}
    vectors = {}
    for seed, (task, name) in enumerate((("a", "body.0.weight"), ("b", "body.3.bias"))):
        models[task] = Headed(body, seed)
        labels = [torch.randint(3, (n,), generator=draw) for n in (40, 20)]
        data[task] = [(torch.randn(len(y), 4, generator=draw), y) for y in labels]
        shape = models[task].get_parameter(name).shape
        mask = Mask.from_dense({name: torch.rand(shape, generator=draw) < 0.7})
        vectors[task] = TaskVector(mask, 2 * torch.randn(mask.nnz, generator=draw))
    return models, data, vectors


def expanded(model: nn.Module, vector: TaskVector, coef: float, x: Tensor) -> Tensor:
    """f(x; theta_0) + coef * J tau, with one gradient for each logit, in float64."""
    model = deepcopy(model).double().eval()
    (name,) = vector.mask.names
    tau = coef * vector.to_dense(name).double()
    logits = model(x.double())
    changes = [
        (torch.autograd.grad(each, model.get_parameter(name), retain_graph=True)[0] * tau).sum()
        for each in logits.flatten()
    ]
    return (logits + torch.stack(changes).view_as(logits)).detach()


def test_both_figures_are_those_of_copies() -> None:
    models, data, vectors = tasks()
    before = {name: each.clone() for name, each in models["a"].state_dict().items()}
    judges = {task: right_answers(data[task]) for task in data}
    found = linearity(Outcomes(models, judges), vectors, coef=0.5)
    unequal = 0
    for task, result in found.items():
        x, labels = (torch.cat(each) for each in zip(*data[task], strict=True))
        edited = deepcopy(models[task]).eval()
        vectors[task].apply_(edited, 0.5, force=True)
        tuned = edited(x).argmax(1) == labels
        linear = expanded(models[task], vectors[task], 0.5, x).argmax(1) == labels
        assert torch.equal(result.outcomes[0], tuned)
        assert torch.equal(result.outcomes[1], linear)
        assert result.tuned["value"] == tuned.double().mean()
        assert result.expansion["value"] == linear.double().mean()
        assert result.gain["value"] == pytest.approx(
            result.expansion["value"] - result.tuned["value"]
        )
        assert result.equal == (tuned == linear).double().mean()
        unequal += int((tuned != linear).sum())
    assert unequal  # of a model that is not linear in its first weights
    for name, each in models["a"].state_dict().items():
        assert_bit_equal(each, before[name])
    assert all(module.training for module in models["a"].modules())


def test_a_model_is_linear_in_its_last_weights() -> None:
    models, data, vectors = tasks()
    outcomes = Outcomes(models, {"b": predictions(data["b"])})
    assert linearity(outcomes, {"b": vectors["b"]})["b"].equal == 1.0


def test_an_edit_of_a_frozen_weight_is_refused() -> None:
    models, data, vectors = tasks()
    models["a"].get_parameter("body.0.weight").requires_grad_(False)
    outcomes = Outcomes(models, {task: predictions(data[task]) for task in data})
    with pytest.raises(TalosValueError, match="must have requires_grad=True where it is edited"):
        linearity(outcomes, vectors)


def test_outcomes_that_are_floats_are_not_counted_as_equal() -> None:
    models, data, vectors = tasks()
    found = linearity(Outcomes(models, {"b": losses(data["b"])}), {"b": vectors["b"]})["b"]
    assert found.equal is None
    assert "tensor" not in repr(found)


class Wrapped(nn.Module):
    """Returns its logits in an object, as a model of transformers does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(x))


def test_a_judge_that_fails_on_the_expansion_is_refused_with_the_call_that_works() -> None:
    models, data, vectors = tasks()
    model, x = Wrapped(models["b"]), data["b"][0][0]
    vector = {"b": vectors["b"].rename({"^": "model."})}
    judges: tuple[Judge, ...] = (
        lambda module: module(x).logits.argmax(1),
        lambda module: module(x=x).logits.argmax(1),
    )
    for judge in judges:
        with pytest.raises(TalosTypeError, match=r"judge of b must work .*default_logits"):
            linearity(Outcomes(model, {"b": judge}), vector)
    both = Outcomes(model, {"b": lambda module: default_logits(module, x).argmax(1)})
    plain = Outcomes(models, {"b": lambda module: module(x).argmax(1)})
    found, wanted = linearity(both, vector)["b"], linearity(plain, {"b": vectors["b"]})["b"]
    assert all(map(torch.equal, found.outcomes, wanted.outcomes))
