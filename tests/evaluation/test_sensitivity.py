"""Sensitivity transfer against copies whose weights are set to 0."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from talos import Mask, fisher_diag
from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation import Outcomes, right_answers
from talos.evaluation.sensitivity import sensitivity_transfer
from tests.cases import DTYPES, assert_bit_equal

TASKS = ("a", "b")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


DATA = {
    task: [(torch.randn(60, 4, generator=draw), torch.randint(3, (60,), generator=draw))]
    for task, draw in ((task, torch.Generator().manual_seed(i)) for i, task in enumerate(TASKS))
}


def masks(density: float) -> dict[str, Mask]:
    draw = torch.Generator().manual_seed(2)
    shapes = {name: each.shape for name, each in small().named_parameters()}
    return {
        task: Mask.from_dense(
            {name: torch.rand(shape, generator=draw) < density for name, shape in shapes.items()}
        )
        for task in TASKS
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_are_those_of_copies_with_zeros(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = deepcopy(model)
    seen = []

    def judge(task: str, module: nn.Module) -> torch.Tensor:
        seen.append(deepcopy(module.state_dict()))
        inputs, labels = DATA[task][0]
        return module(inputs.to(dtype)).argmax(1) == labels

    judges = {task: lambda module, task=task: judge(task, module) for task in TASKS}
    chosen = masks(0.5)
    found = sensitivity_transfer(Outcomes(model, judges), chosen)
    pruned = {}
    for i, mask in chosen.items():
        pruned[i] = deepcopy(before)
        with torch.no_grad():
            for name, param in pruned[i].named_parameters():
                param[mask.to_dense(name)] = 0
        state = pruned[i].state_dict()
        assert sum(all(torch.equal(one[n], state[n]) for n in state) for one in seen) == len(TASKS)
        for j in TASKS:
            above, below = (judge(j, each).double().mean() for each in (pruned[i], before))
            assert found[i][j]["value"] == above / below
    for name, param in model.named_parameters():
        assert_bit_equal(param, before.get_parameter(name))


def test_scores_choose_the_lowest_tenth() -> None:
    model = small()
    outcomes = Outcomes(model, {task: right_answers(DATA[task]) for task in TASKS})
    scores = {task: fisher_diag(model, DATA[task], params=".") for task in TASKS}
    lowest = {}
    for task, own in scores.items():
        flat = torch.cat([each.reshape(-1) for each in own.values()])
        threshold = flat.sort().values[round(0.1 * len(flat)) - 1]
        lowest[task] = Mask.from_dense({name: each <= threshold for name, each in own.items()})
    assert sensitivity_transfer(outcomes, scores) == sensitivity_transfer(outcomes, lowest)


def test_the_weights_come_back_when_a_judge_fails() -> None:
    model = small()
    before = deepcopy(model)

    def judge(module: nn.Module) -> torch.Tensor:
        if not torch.equal(module[0].weight, before[0].weight):
            raise KeyError
        return torch.ones(3) > 0

    with pytest.raises(KeyError):
        sensitivity_transfer(Outcomes(model, {"a": judge}), masks(0.3))
    for name, param in model.named_parameters():
        assert_bit_equal(param, before.get_parameter(name))


def test_what_cannot_be_pruned_exactly_is_refused() -> None:
    outcomes = Outcomes(small().double(), {"a": lambda module: torch.ones(3) > 0})
    with pytest.raises(TalosTypeError, match="model must be float32, bfloat16 or float16"):
        sensitivity_transfer(outcomes, masks(0.3))
    with pytest.raises(TalosValueError, match="least must hold"):
        sensitivity_transfer(outcomes, {})
