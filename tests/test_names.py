"""Names without wrappers, and the one check that a model is a module."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import talos
from talos.errors import TalosTypeError, TalosValueError
from talos.methods import LinearizedModel
from talos.names import named_parameters
from talos.params import select_parameters

MASK = talos.Mask.from_dense({"weight": torch.ones(3, 4) > 0})
VECTOR = talos.TaskVector(MASK, torch.ones(12))
CALLS: dict[str, Callable[[Any], object]] = {
    "calibrate": lambda model: talos.calibrate(model, []),
    "fisher_diag": lambda model: talos.fisher_diag(model, []),
    "SparseAdam": lambda model: talos.SparseAdam(model, MASK),
    "fine_tune": lambda model: talos.fine_tune(model, [], steps=1),
    "choice_logits": lambda model: talos.choice_logits(model, {}),
    "apply_": VECTOR.apply_,
    "applied": lambda model: VECTOR.applied(model).__enter__(),
    "ResidentVectors": lambda model: talos.ResidentVectors(model, {"a": VECTOR}),
    "LinearizedModel": LinearizedModel,
    "select_parameters": select_parameters,
    "from_models, base": lambda model: talos.TaskVector.from_models(model, nn.Linear(4, 3)),
    "from_models, tuned": lambda model: talos.TaskVector.from_models(nn.Linear(4, 3), model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", [3, None, nn.Linear], ids=repr)
def test_what_is_no_module_is_refused_by_every_public_call(call: str, model: object) -> None:
    kind = type(model).__name__
    with pytest.raises(TalosTypeError, match=rf"must be a .*[mM]odule.*, got {kind}"):
        CALLS[call](model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the compiler warns
def test_names_are_free_of_wrappers() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)  # really called so
            self.block = checkpoint_wrapper(nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.module(x))

    plain = {"module.weight", "module.bias", "block.weight", "block.bias"}
    holder = Holder()
    for model in (holder, nn.DataParallel(holder), torch.compile(holder)):
        assert set(named_parameters(model)) == plain
        assert set(select_parameters(model)) == plain
    nested = nn.Sequential(torch.compile(nn.DataParallel(holder)))
    assert set(named_parameters(nested)) == {f"0.{name}" for name in plain}


class Doubled(nn.Module):
    """A wrapper of a user's own, which is still what is called."""

    talos_wraps = "inner"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * self.inner(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the compiler warns
def test_a_class_may_say_that_it_only_wraps() -> None:
    alone = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    wrapped = Doubled(alone)
    assert list(named_parameters(wrapped)) == ["0.weight", "0.bias"]
    assert list(named_parameters(torch.compile(nn.Sequential(wrapped)))) == [
        "0.0.weight",
        "0.0.bias",
    ]
    x = torch.randn(200, 4)
    mask = talos.calibrate(wrapped, [x], density=0.5, rounds=1)
    assert wrapped.calls
    tuned = Doubled(copy.deepcopy(alone))
    vector = talos.fine_tune(tuned, [(x, torch.zeros(200).long())], mask, steps=2, lr=0.1)
    assert tuned.calls
    talos.SparseAdam(alone, mask).release()
    with vector.applied(alone):
        pass


def test_two_parameters_of_one_name_are_refused() -> None:
    class Own(Doubled):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__(inner)
            self.weight = nn.Parameter(torch.ones(3))

    with pytest.raises(TalosValueError, match="got two of weight; rename that of Linear, or drop"):
        named_parameters(Own(nn.Linear(4, 3)))
