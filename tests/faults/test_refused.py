"""What an optimizer or a vector refuses: the words, and that nothing was written before."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talos import Mask, SparseAdam, TaskVector
from talos.errors import TalosTypeError, TalosValueError
from tests.cases import assert_bit_equal

ONES = torch.ones(4, 3) > 0


class Attention(nn.Module):
    """Queries, keys and values in one weight or in three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        parts = ["qkv"] if fused else ["q_proj", "k_proj", "v_proj"]
        for part in parts:
            self.add_module(part, nn.Linear(4, 12 // len(parts), bias=False))


class Weight(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch lets it go
        return torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8)


SPLIT = {f"{part}_proj.weight": torch.ones(4, 4) > 0 for part in "qkv"}
LACKS_THREE = (
    r"must name parameters of the model, got 3 that it lacks: q_proj\.weight \(nearest: "
    r"qkv\.weight\); k_proj\.weight .*; v_proj\.weight .*; take a .* of this model, or call rename"
)
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], type[Exception], str]] = {
    "transposed": (
        lambda: nn.Linear(3, 4),
        {"weight": ONES.t()},
        TalosValueError,
        r"weight is \(3, 4\) in the mask, \(4, 3\) in the model",
    ),
    "of the same number": (
        lambda: nn.Linear(3, 4),
        {"weight": ONES.view(2, 6)},
        TalosValueError,
        r"weight is \(2, 6\) in the mask, \(4, 3\) in the model",
    ),
    "split names, fused weight": (
        lambda: Attention(fused=True),
        SPLIT,
        TalosValueError,
        LACKS_THREE,
    ),
    "fused name, split weights": (
        lambda: Attention(fused=False),
        {"qkv.weight": torch.ones(12, 4) > 0},
        TalosValueError,
        r"1 that it lacks: qkv\.weight \(nearest: \w_proj\.weight.*; take .*, or call rename",
    ),
    "integers": (
        lambda: Weight(torch.ones(4, 3).int()),
        {"weight": ONES},
        TalosTypeError,
        r"weight must be float32, bfloat16, float16 or float64, got torch\.int32",
    ),
    "eight bits": (
        lambda: Weight(torch.ones(4, 3).to(torch.float8_e4m3fn)),
        {"weight": ONES},
        TalosTypeError,
        r"weight must be .*, got torch\.float8_e4m3fn",
    ),
    "quantised": (
        lambda: Weight(quantised()),
        {"weight": ONES},
        TalosTypeError,
        r"weight must be .*, got torch\.qint8",
    ),
    "frozen": (
        lambda: Weight(torch.ones(4, 3)),
        {"weight": ONES},
        TalosValueError,
        r"weight.*requires_grad=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mask_that_does_not_fit_is_refused_and_the_model_stays(case: str) -> None:
    make, dense, error, match = REFUSED[case]
    model, mask = make(), Mask.from_dense(dense)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        SparseAdam(model, mask, weight_decay=0.5)
    for name, param in model.named_parameters():
        assert param.requires_grad == before[name][1]
        assert param.grad is None
        assert torch.equal(param.detach(), before[name][0]) or param.dtype == torch.float8_e4m3fn


def test_a_vector_of_split_weights_is_refused_by_a_fused_one_unless_it_is_renamed() -> None:
    model, vector = Attention(fused=True), TaskVector(Mask.from_dense(SPLIT), torch.ones(48))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TalosValueError, match=LACKS_THREE):
        vector.apply_(model)
    assert_bit_equal(model.qkv.weight, before["qkv.weight"])
    first = TaskVector(Mask.from_dense({"q": torch.ones(12, 4) > 0}), torch.ones(48))
    first.rename({"q": "qkv.weight"}).apply_(model)
    assert not torch.equal(model.qkv.weight, before["qkv.weight"])


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_rates_out_of_range_name_value_and_range(option: str, value: float) -> None:
    words = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}
    model = nn.Linear(3, 4)
    match = rf"Invalid {words[option]}: {value}; it must lie in \[0, inf\)"
    with pytest.raises(TalosValueError, match=match):
        SparseAdam(model, Mask.from_dense({"weight": ONES}), **{option: value})
    assert model.bias.requires_grad


def test_an_empty_tensor_of_a_mask_is_frozen_and_has_no_state() -> None:
    model = nn.Linear(3, 4)
    mask = Mask.from_dense({"weight": ONES, "bias": torch.zeros(4) > 0})
    optimizer = SparseAdam(model, mask, weight_decay=0.5)
    model.weight.grad = torch.ones(4, 3)
    before = model.bias.detach().clone()
    optimizer.step()
    assert list(optimizer.state) == [model.weight]
    assert not model.bias.requires_grad
    assert_bit_equal(model.bias, before)


def test_a_selected_weight_that_is_frozen_later_is_not_decayed() -> None:
    model = nn.Linear(3, 4)
    mask = Mask.from_dense({"weight": ONES, "bias": torch.ones(4) > 0})
    optimizer = SparseAdam(model, mask, weight_decay=0.5)
    model.bias.requires_grad_(False)
    before = model.bias.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert_bit_equal(model.bias, before)


def test_a_norm_that_is_not_finite_is_refused_before_a_gradient_is_scaled() -> None:
    model = nn.Linear(3, 4, bias=False)
    optimizer = SparseAdam(model, Mask.from_dense({"weight": ONES}))
    model.weight.grad = torch.ones(4, 3)
    model.weight.grad[1, 2] = torch.nan
    before, weight = model.weight.grad.clone(), model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="the gradient norm is nan"):
        optimizer.clip_grad_norm_(0.1, error_if_nonfinite=True)
    assert_bit_equal(model.weight.grad, before)
    assert_bit_equal(model.weight, weight)


def test_a_gradient_in_another_dtype_steps_as_its_cast_does() -> None:
    ends = []
    for cast in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 4, bias=False, dtype=torch.bfloat16)
        model.weight.grad_dtype = None  # torch lets any dtype in
        optimizer = SparseAdam(model, Mask.from_dense({"weight": ONES}), lr=0.1)
        grad = torch.randn(4, 3).bfloat16()
        model.weight.grad = grad.float() if cast else grad
        optimizer.step()
        ends.append(model.weight.detach())
    assert_bit_equal(*ends)


def test_both_fingerprints_of_another_base_are_named_and_force_edits_it() -> None:
    base, other = (nn.Linear(3, 4, bias=False) for _ in range(2))
    mask = Mask.from_dense({"weight": ONES})
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight.add_(1)
    vector = TaskVector.from_models(base, tuned, mask)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(TalosValueError, match="force=True") as caught:
        vector.apply_(other)
    assert vector.fingerprints["weight"] in str(caught.value)
    theirs: Any = TaskVector.from_models(other, tuned, mask)
    assert theirs.fingerprints["weight"] in str(caught.value)
    assert_bit_equal(other.weight, before["weight"])
    vector.apply_(other, force=True)
    assert not torch.equal(other.weight, before["weight"])
