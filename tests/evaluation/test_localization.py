"""The localization bound against log-probabilities differentiated one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talos import Mask, TaskVector, fisher_diag
from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation.localization import Localization, localization
from tests.cases import assert_close


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def some_batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=draw) for n in (5, 3)]


def some_vector(model: nn.Module, picked: Callable[[Tensor], Tensor]) -> TaskVector:
    """Random values at the entries that a function of a random tensor picks, one value 0."""
    draw = torch.Generator().manual_seed(2)
    chosen = {
        name: picked(torch.rand(param.shape, generator=draw))
        for name, param in model.named_parameters()
    }
    mask = Mask.from_dense(chosen)
    values = torch.randn(mask.nnz, generator=draw)
    if mask.nnz > 1:
        values[0] = 0
    return TaskVector(mask, values)


def by_hand(model: nn.Module, vector: TaskVector) -> Localization:
    """Everything from the gradient of log p(y|x), sample by sample and class by class."""
    model = model.double().eval()
    tau = torch.cat([vector.to_dense(name).reshape(-1) for name in vector.mask.names]).double()
    changes, squares = [], []
    samples = torch.cat(some_batches()).double()
    for x in samples:
        log_probs = model(x).log_softmax(0)
        for log_prob in log_probs:
            parts = torch.autograd.grad(log_prob, list(model.parameters()), retain_graph=True)
            g = torch.cat([part.reshape(-1) for part in parts])
            weight = log_prob.detach().exp() / len(samples)
            changes.append(weight * (tau @ g) ** 2)
            squares.append(weight * g**2)
    fisher = torch.stack(squares).sum(0)
    k, t = int((tau != 0).sum()), float(fisher[tau != 0].max())
    return Localization(
        change=float(torch.stack(changes).sum().sqrt()),
        bound=float((tau.abs() * fisher.sqrt()).sum()),
        uniform=float(tau.norm()) * (k * t) ** 0.5,
        paper=k * k * float(tau.abs().max()) * t**0.5,
        entries=k,
        threshold=t,
    )


def numbers(found: Localization) -> Tensor:
    return torch.tensor(
        [found.change, found.bound, found.uniform, found.paper, found.entries, found.threshold]
    )


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_change_and_bounds_are_those_computed_by_hand(density: float) -> None:
    model = small()
    vector = some_vector(model, lambda uniform: uniform < density)
    scores = fisher_diag(model, some_batches(), params=".", draws="exact")
    found = localization(model, vector, some_batches(), scores)
    twice = localization(model, vector, some_batches(), scores, scale=-2.0)
    assert model.training
    expected = by_hand(model, vector)
    assert_close(numbers(found), numbers(expected), reduction=True)
    assert 0 < found.change <= found.bound <= found.uniform <= found.paper
    assert twice.change == 2 * found.change
    assert twice.bound == 2 * found.bound


def test_the_bound_is_reached_by_one_entry() -> None:
    model = small()
    vector = some_vector(
        model, lambda uniform: (uniform == uniform.max()) & (uniform.numel() == 24)
    )
    scores = fisher_diag(model, some_batches(), params=".", draws="exact")
    found = localization(model, vector, some_batches(), scores)
    for bound in (found.bound, found.uniform, found.paper):
        assert_close(torch.tensor(bound), torch.tensor(found.change), reduction=True)


def test_what_has_no_scores_or_another_base_is_refused() -> None:
    model = small()
    vector = some_vector(model, lambda uniform: uniform < 0.3)
    scores = fisher_diag(model, some_batches(), params="weight")
    with pytest.raises(TalosValueError, match="vector must name parameters"):
        localization(model, vector, some_batches(), scores)
    plain: Any = dict(scores)
    with pytest.raises(TalosTypeError, match=r"scores must come from talos\.fisher_diag"):
        localization(model, vector, some_batches(), plain)
    scores = fisher_diag(model, some_batches(), params=".")
    with pytest.raises(TalosValueError, match="batches must hold at least one sample"):
        localization(model, vector, [], scores)
    with pytest.raises(TalosValueError, match=r"got \[2, 2, 3\]; .* logits_fn=lambda .*-1]"):
        localization(model, vector, [torch.ones(2, 2, 4)], scores)
    scores.rows = {"3.weight": (0, 1)}
    with pytest.raises(TalosValueError, match=r"got 3\.weight scored only in the rows \[0, 1\)"):
        localization(model, vector, some_batches(), scores)
    stranger = TaskVector(vector.mask, vector.values, {"0.bias": "0" * 16})
    with pytest.raises(TalosValueError, match="model must be the base"):
        localization(
            model, stranger, some_batches(), fisher_diag(model, some_batches(), params=".")
        )
