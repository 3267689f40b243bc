"""Names without wrappers, and the one check that a model is a module."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import talos
from talos.errors import TalosTypeError, TalosValueError
from talos.methods import LinearizedModel
from talos.names import named_buffers, named_parameters
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
    importlib.import_module("torch.distributed.fsdp")  # whose modules some calls look for
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


def test_two_buffers_of_one_name_are_refused() -> None:
    class Own(Doubled):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__(inner)
            self.register_buffer("running_mean", torch.ones(3))

    with pytest.raises(TalosValueError, match="got two of running_mean; rename that of BatchNorm"):
        named_buffers(Own(nn.BatchNorm1d(3)))


@pytest.mark.parametrize("named", ["inne", ["inner"], "inner.0", "calls"])
def test_a_wrapper_that_names_none_of_its_modules_is_refused(named: object) -> None:
    model = type("Own", (Doubled,), {"talos_wraps": named})(nn.Linear(4, 3))
    with pytest.raises(TalosValueError, match=r"talos_wraps must name a module .* \(inner\), got"):
        named_parameters(model)


def test_a_wrapper_fits_its_own_state_dict() -> None:
    """As it fits what it wraps, on either side and on both."""
    base = Doubled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for param in tuned.parameters():
            param += 0.5
    wrapped = tuned.state_dict()
    others = (tuned, wrapped, tuned.inner, tuned.inner.state_dict())
    pairs: list[tuple[Any, Any]] = [(base, other) for other in others]
    pairs += [(base.state_dict(), tuned), (base.state_dict(), wrapped), (base.inner, tuned)]
    for one, other in pairs:
        vector = talos.TaskVector.from_models(one, other)
        edited = copy.deepcopy(base)
        vector.apply_(edited)
        for name, each in edited.state_dict().items():
            torch.testing.assert_close(each, wrapped[name])
        assert sum(map(len, talos.Patch.from_models(one, other).positions.values())) == 29
    for name in ("0.weight", "inner.0.weight"):
        talos.SparseAdam(base, talos.Mask.from_dense({name: torch.ones(3, 4) > 0})).release()


def test_a_moved_buffer_of_a_wrapper_is_named_once() -> None:
    base = Doubled(nn.BatchNorm1d(3))
    tuned = copy.deepcopy(base)
    tuned.inner.running_mean += 1
    with pytest.warns(UserWarning, match="running_mean") as caught:
        talos.TaskVector.from_models(base, tuned)
    assert str(caught[0].message).count("running_mean") == 1
