"""The options that keep fewer activations: what they compute, keep and cost."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from talos import checkpoint_frozen_mlps, few_bit_backward, hold_frozen
from talos.errors import TalosRuntimeError, TalosValueError
from tests.architecture.test_families import FAMILIES
from tests.cases import assert_bit_equal
from tests.methods.test_frozen import BF16, assert_same, results, saved, train_only

D, H, N = 32, 128, 10  # width, hidden layer and tokens of `block`


def block(dropout: float = 0.0) -> tuple[nn.Module, Tensor]:
    """A frozen block of timm's ViT and its input."""
    model = FAMILIES["timm VisionTransformer"].model("sdpa").blocks[0].requires_grad_(False)
    model.mlp.drop1.p = dropout
    return model.train(), torch.randn(2, N // 2, D, requires_grad=True)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output under autocast, and the gradient of the input."""
    torch.manual_seed(0)
    x.grad = None
    with torch.autocast("cpu", BF16):
        y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad.clone()]


def kept(model: nn.Module, x: Tensor) -> dict[tuple[tuple[int, ...], torch.dtype], int]:
    """How often a shape and dtype is kept for the backward, parameters left out."""
    counts: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
    for name, shape, dtype in saved(model, x):
        if not name:
            counts[shape, dtype] = counts.get((shape, dtype), 0) + 1
    return counts


def test_what_a_gated_mlp_keeps() -> None:
    model = FAMILIES["LlamaForCausalLM"].model("sdpa").model.layers[0].mlp.requires_grad_(False)
    x = torch.randn(2, N // 2, D, requires_grad=True)
    hidden = ((2, N // 2, model.gate_proj.out_features), BF16)
    with hold_frozen(model, lambda: model(x)):
        assert kept(model, x) == {hidden: 3}  # of SiLU, and of its product with the other layer
        with few_bit_backward(model):
            assert kept(model, x) == {hidden: 2, (hidden[0], torch.uint8): 1}


MLPS = {
    "open_clip ViT-B-32 visual": "library.transformer.resblocks.{}.mlp",
    "open_clip ViT-B-32-quickgelu visual": "library.transformer.resblocks.{}.mlp",
    "ViTForImageClassification": "vit.layers.{}.mlp",
    "BertForSequenceClassification": "bert.encoder.layer.{}.intermediate",
    "GPT2LMHeadModel": "transformer.h.{}.mlp",
    "LlamaForCausalLM": "model.layers.{}.mlp",
    "T5ForConditionalGeneration v1.1": "encoder.block.{}.layer.1.DenseReluDense",
    "timm VisionTransformer": "blocks.{}.mlp",
}


@pytest.mark.parametrize("name", MLPS)
def test_checkpointed_mlps_compute_the_same(name: str) -> None:
    family = FAMILIES[name]
    model = family.model(family.attentions[-1]).train()
    train_only(model, "c_attn" if family.qk is None else "qk")
    batch = family.batch(3)
    expected = results(model, lambda: model(**batch))
    with checkpoint_frozen_mlps(model) as names:
        assert {MLPS[name].format(i) for i in range(2)} <= set(names)
        assert_same(results(model, lambda: model(**batch)), expected)


def test_dropout_of_a_checkpointed_mlp_draws_the_same_numbers() -> None:
    model, x = block(dropout=0.5)
    expected = gradient(model, x)
    with checkpoint_frozen_mlps(model):
        assert_same(gradient(model, x), expected)


def test_a_checkpointed_mlp_keeps_its_input_only() -> None:
    model, x = block()
    before = kept(model, x)
    assert before[(2, N // 2, H), BF16] == 1
    with checkpoint_frozen_mlps(model):
        after = kept(model, x)
    assert after == {
        **{key: count for key, count in before.items() if H not in key[0]},
        ((2, N // 2, D), torch.float32): before[(2, N // 2, D), torch.float32] + 1,
        ((0,), torch.float32): 1,  # a mark of torch's
    }


@pytest.mark.parametrize(
    ("name", "products"), [("timm VisionTransformer", 1), ("LlamaForCausalLM", 2)]
)
def test_a_checkpointed_mlp_costs_the_products_into_its_hidden_layer(
    name: str, products: int
) -> None:
    model = FAMILIES[name].model("sdpa").requires_grad_(False)
    layer = model.get_submodule(MLPS[name].format(0))
    x = torch.randn(1, N, D, requires_grad=True)
    hidden = next(layer.parameters()).shape[0]

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            gradient(layer, x)
        return int(counter.get_total_flops())

    plain = flops()
    with checkpoint_frozen_mlps(model):
        assert flops() - plain == products * 2 * N * D * hidden


def test_an_mlp_with_a_trained_weight_is_not_taken() -> None:
    model = FAMILIES["timm VisionTransformer"].model("sdpa").requires_grad_(False)
    model.blocks[1].mlp.fc2.bias.requires_grad_(True)
    with checkpoint_frozen_mlps(model) as names:
        assert names == ("blocks.0.mlp",)
    model.requires_grad_(True)
    with (
        pytest.raises(TalosValueError, match=r"must have an MLP whose weights are all frozen"),
        checkpoint_frozen_mlps(model),
    ):
        pass


ACTIVATIONS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "gelu": (nn.GELU(), nn.GELU()),
    "tanh": (nn.GELU(approximate="tanh"), nn.GELU(approximate="tanh")),
    "silu": (nn.SiLU(), nn.SiLU()),
    "quick": (open_clip.model.QuickGELU(), lambda x: x * torch.sigmoid(1.702 * x)),
    "hf gelu": (ACT2FN["gelu"], nn.GELU()),
    "hf gelu_new": (ACT2FN["gelu_new"], nn.GELU(approximate="tanh")),
    "hf quick_gelu": (ACT2FN["quick_gelu"], lambda x: x * torch.sigmoid(1.702 * x)),
    "hf silu": (ACT2FN["silu"], nn.SiLU()),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_derivative_in_a_byte_is_as_near_as_stated(name: str, dtype: torch.dtype) -> None:
    module, definition = ACTIVATIONS[name]
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.linspace(-3, 3, 20001)]).to(dtype)
    x, dy = x.requires_grad_(), torch.randn(40002).to(dtype)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(definition(exact), exact, dy.double())
    y = module(x)
    with few_bit_backward(nn.Sequential(module)):
        ours = module(x)
        (found,) = torch.autograd.grad(ours, x, dy)
    assert_bit_equal(ours, y)
    rounding = torch.finfo(dtype).eps * expected.abs()
    wrong = (found.double() - expected).abs()
    assert bool((wrong <= 0.0025 * dy.double().abs() + rounding + 1e-6).all())
    assert float((wrong / dy.double().abs()).max()) > 0.002  # the bound is no looser than needed


def test_far_from_zero_a_derivative_in_a_byte_is_exact() -> None:
    for name in ("gelu", "tanh", "silu"):
        module = ACTIVATIONS[name][0]
        x = torch.tensor([-40.0, 40.0], requires_grad=True)
        with few_bit_backward(nn.Sequential(module)):
            module(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1]


def test_relu_in_a_byte_is_exact() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 2.0, torch.inf, torch.nan], requires_grad=True)
    model, dy = nn.Sequential(nn.ReLU()), torch.randn(7)
    expected = [model(x), *torch.autograd.grad(model(x), x, dy)]
    with few_bit_backward(model):
        assert_same([model(x), *torch.autograd.grad(model(x), x, dy)], expected)
        assert saved(model, x) == [("", (7,), torch.bool)]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU])
def test_activations_in_place_are_left_alone(kind: Callable[..., nn.Module]) -> None:
    layer, after, late = nn.Linear(8, 8), kind(inplace=True), kind()
    model, x = nn.ModuleList([layer, after, late]), torch.randn(4, 8)

    def run() -> list[Tensor]:
        hidden = layer(x)
        y = after(hidden).sin() + hidden  # the sum is of what is there now
        other = layer(x)
        late(other)
        total = y.sum() + other.square().sum()
        return [total.detach(), *torch.autograd.grad(total, list(layer.parameters()))]

    expected = run()
    with few_bit_backward(model) as names:
        assert names == ("2",)
        assert_same(run(), expected)
        late.inplace = True
        found = run()
    assert_same(found, run())
    with (
        pytest.raises(TalosValueError, match=r"and not in place, got none"),
        few_bit_backward(nn.Sequential(after)),
    ):
        pass


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    module = ACTIVATIONS[name][0]
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    with few_bit_backward(nn.Sequential(module)):
        (found,) = torch.autograd.grad(module(x).sum(), x)
    assert expected.isnan().tolist() == [True, True, True, False]
    assert found.isnan().tolist() == expected.isnan().tolist()


def test_a_rounded_gradient_is_not_differentiated_again() -> None:
    model, x = nn.Sequential(nn.GELU()), torch.randn(4, requires_grad=True)
    with few_bit_backward(model):
        total = model(x).sum()
        with pytest.raises(TalosRuntimeError, match=r"must not be differentiated"):
            torch.autograd.grad(total, x, create_graph=True)


def test_an_activation_may_be_called_by_keyword() -> None:
    module, x = nn.GELU(), torch.randn(4, requires_grad=True)
    with few_bit_backward(nn.Sequential(module)):
        y = module(input=x)
        assert saved(module, x) == [("", (4,), torch.uint8)]
    assert_bit_equal(y, module(x))


def test_an_mlp_that_counts_in_buffers_is_not_taken() -> None:
    model, x = block()
    model.mlp.norm = nn.BatchNorm1d(N // 2, affine=False)
    with (
        pytest.raises(TalosValueError, match=r"must have an MLP whose weights are all frozen"),
        checkpoint_frozen_mlps(model),
    ):
        gradient(model, x)


def test_an_activation_keeps_a_byte_an_entry() -> None:
    model, x = block()
    before = kept(model, x)
    with few_bit_backward(model) as names:
        assert names == ("mlp.act",)
        after = kept(model, x)
        model.eval()
        with torch.no_grad():
            assert not kept(model, x)
    hidden = (2, N // 2, H)
    assert before.pop((hidden, BF16)) == after.pop((hidden, torch.uint8)) == 1
    assert before == after


def test_few_bits_leave_outputs_and_move_gradients_little() -> None:
    for name in MLPS:
        family = FAMILIES[name]
        model = family.model(family.attentions[-1]).eval()
        train_only(model, "c_attn" if family.qk is None else "qk")
        batch = family.batch(3)
        expected = results(model, lambda m=model, b=batch: m(**b))
        with few_bit_backward(model):
            found = results(model, lambda m=model, b=batch: m(**b))
        assert_bit_equal(found[0], expected[0])
        ours, theirs = (torch.cat([g.flatten() for g in each[1:]]) for each in (found, expected))
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02, name


def test_a_model_without_activation_modules_is_refused() -> None:
    with (
        pytest.raises(TalosValueError, match=r"must have an activation function that is a module"),
        few_bit_backward(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("option", [checkpoint_frozen_mlps, few_bit_backward])
def test_forwards_come_back_after_an_error(
    option: Callable[[nn.Module], AbstractContextManager[Any]],
) -> None:
    model, x = block()
    own = model.mlp.act.__dict__["forward"] = partial(nn.GELU.forward, model.mlp.act)
    expected = gradient(model, x)
    with pytest.raises(ZeroDivisionError), option(model):
        raise ZeroDivisionError
    assert model.mlp.act.__dict__["forward"] is own
    assert "forward" not in model.mlp.__dict__
    assert_same(gradient(model, x), expected)


# Where an autograd.Function is compiled, torch warns of what it does itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("around", ["compile", "checkpoint", "nothing"])
def test_options_compose(around: str) -> None:
    model, x = block(dropout=0.5)
    run: nn.Module | Callable[[Tensor], Tensor] = model
    if around == "compile":
        run = torch.compile(model, backend="aot_eager")
        model.mlp.drop1.p = 0.0  # compiled code draws other numbers
    elif around == "checkpoint":
        run = partial(checkpoint, model, use_reentrant=False)
    with few_bit_backward(model):
        expected = gradient(model, x)
    with ExitStack() as stack:
        held = stack.enter_context(hold_frozen(model, lambda: model(x)))
        assert "mlp.fc1.weight" in held.names
        stack.enter_context(few_bit_backward(model))
        stack.enter_context(checkpoint_frozen_mlps(model))
        assert_same(gradient(run, x), expected)
