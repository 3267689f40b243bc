"""Frozen weights in autocast's dtype: the same bits, the same weights afterwards, less kept."""

import copy
import gc
import pickle
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from talos import Mask, SparseAdam, TaskVector, hold_frozen
from talos.errors import TalosRuntimeError, TalosTypeError
from talos.names import named_parameters
from talos.params import select_parameters
from tests.architecture.test_families import FAMILIES
from tests.cases import assert_bit_equal

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nobody_elses_gradients_are_compact() -> None:
    """Linear layers are routed, and mind their dtype, while some optimizer lives: none does."""
    gc.collect()


def results(model: nn.Module, forward: Callable[[], Any], seed: int = 0) -> list[Tensor]:
    """The outputs under autocast, and the gradients of what is trained."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", BF16):
        outputs = forward()
    outputs = outputs if isinstance(outputs, Tensor) else outputs.logits
    outputs.float().square().mean().backward()
    return [outputs.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bit_equal(ours, theirs)


def train_only(model: nn.Module, params: str) -> list[str]:
    """Freezes the rest."""
    chosen = list(select_parameters(model, params))
    for name, param in named_parameters(model).items():
        param.requires_grad_(name in chosen)
    return chosen


def matrices(model: nn.Module) -> set[str]:
    """The weights of layers that multiply matrices, by the types of the modules."""
    named = named_parameters(model, remove_duplicate=False)
    modules = dict(model.named_modules())
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, Conv1D)
    embedded = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    return {
        name
        for name, param in named.items()
        if isinstance(modules[name.rpartition(".")[0]], kinds)
        and id(param) not in embedded
        and not param.requires_grad
    }


MINDED = {"library.transformer.resblocks.0.mlp.c_fc.weight"}  # open_clip's texts are cast to it
BARE = {"visual.proj", "text_projection", "proj"}  # matrices that no layer holds
HELD = (
    *("open_clip ViT-B-32 visual", "open_clip CLIP", "CLIPModel", "timm VisionTransformer"),
    *("BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"),
    *("T5ForConditionalGeneration v1.0", "T5ForConditionalGeneration v1.1"),
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_outputs_and_gradients_keep_their_bits(name: str, training: bool) -> None:
    family = FAMILIES[name]
    model = family.model(family.attentions[-1]).train(training)
    train_only(model, "c_attn" if family.qk is None else "qk")
    batch = family.batch(3)
    before = copy.deepcopy(model.state_dict())
    expected = results(model, lambda: model(**batch))
    with hold_frozen(model, lambda: model(**batch)) as held:
        params = dict(model.named_parameters())
        assert all(params[each].dtype == BF16 for each in held.names)
        assert {p.dtype for n, p in params.items() if n not in held.names} == {torch.float32}
        names = {each for each in held.names if each.removeprefix("library.") not in BARE}
        assert names == matrices(model) - (MINDED if name == "open_clip CLIP" else set())
        assert names.isdisjoint(held.left)
        assert_same(results(model, lambda: model(**batch)), expected)
    for key, value in model.state_dict().items():
        assert_bit_equal(value, before[key])
    assert_same(results(model, lambda: model(**batch)), expected)


def test_a_frozen_part_of_torchs_own_layers() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).requires_grad_(False)
    model, x = nn.Sequential(layer, nn.Linear(16, 3)), torch.randn(2, 5, 16)
    for training in (True, False):
        model.train(training)  # in eval mode it may take fused kernels, which read the dtype
        expected = results(model, lambda: model(x))
        with hold_frozen(model, lambda: model(x)) as held:
            assert "0.linear1.weight" in held.names
            assert_same(results(model, lambda: model(x)), expected)


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_a_frozen_weight_at_each_use_and_a_held_one_never() -> None:
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)

    def casts() -> int:
        with torch.autocast("cpu", BF16), Casts((4, 4)) as seen:
            layer(layer(layer(x)))
        return seen.count

    assert casts() == 1  # its cache keeps the cast of what requires a gradient
    layer.requires_grad_(False)
    assert casts() == 3
    with hold_frozen(layer, lambda: layer(x)):
        assert casts() == 0


PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": ((3, 4), lambda w: F.linear(torch.randn(2, 4), w, w[:, 0].clone())),
    "matmul": ((4, 3), lambda w: torch.randn(2, 4) @ w),
    "rmatmul": ((4, 3), lambda w: w @ torch.randn(3, 2)),
    "mm": ((4, 3), lambda w: torch.mm(torch.randn(2, 4), w)),
    "bmm": ((2, 4, 3), lambda w: torch.randn(2, 5, 4).bmm(w)),
    "addmm": ((4, 3), lambda w: torch.addmm(torch.randn(3), torch.randn(2, 4), w)),
    "baddbmm": ((2, 4, 3), lambda w: torch.baddbmm(torch.randn(3), torch.randn(2, 5, 4), w)),
    "conv1d": ((3, 4, 2), lambda w: F.conv1d(torch.randn(2, 4, 5), w)),
    "conv2d": ((3, 4, 2, 2), lambda w: F.conv2d(torch.randn(2, 4, 5, 5), w)),
    "conv3d": ((3, 4, 2, 2, 2), lambda w: F.conv3d(torch.randn(2, 4, 5, 5, 5), w)),
    "conv_transpose2d": ((4, 3, 2, 2), lambda w: F.conv_transpose2d(torch.randn(2, 4, 5, 5), w)),
}


class Bare(nn.Module):
    """A frozen parameter and a function of it."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.use = use

    def forward(self) -> Any:
        torch.manual_seed(1)
        return self.use(self.w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(PRODUCTS) - {"linear"}))
def test_products_that_take_a_bare_parameter(name: str, dtype: torch.dtype) -> None:
    model = Bare(*PRODUCTS[name])
    with torch.autocast("cpu", dtype):
        expected = model()
        with hold_frozen(model, model, dtype) as held:
            assert held.names == ("w",)
            assert model.w.dtype == dtype
            assert_bit_equal(model(), expected)


def unlike_autocast(w: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.randn(2, 4) @ w


def by_dtype(w: Tensor) -> Tensor:
    return (torch.randn(4, 4).to(w.dtype) + 0.1) @ w


LEFT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a penalty": (lambda w: torch.randn(2, 4) @ w + w.square().sum(), "used by square"),
    "a view": (PRODUCTS["linear"][1], "used by __getitem__"),
    "a list": (lambda w: torch.cat([w, w]), "used by cat"),
    "a data pointer": (lambda w: torch.ones(1) * float(w.data_ptr() > 0), "used by data_ptr"),
    "fp32 under autocast": (unlike_autocast, "used by matmul"),
    "a dtype that matters": (by_dtype, "by_dtype may mind its dtype"),
    "no use": (lambda w: torch.ones(1), "not used"),
}


@pytest.mark.parametrize("name", LEFT)
def test_weights_that_a_cast_would_change_something_for_are_left(name: str) -> None:
    use, reason = LEFT[name]
    model = Bare((4, 4), use)
    before = model.w.clone()
    with hold_frozen(model, model) as held:
        assert held.names == ()
        assert reason in held.left["w"]
        assert_bit_equal(model.w, before)


def test_a_dtype_that_does_not_matter_is_no_reason() -> None:
    model = Bare((4, 4), lambda w: torch.randn(2, 4).to(w.dtype) @ w)
    with hold_frozen(model, model) as held:
        assert held.names == ("w",)


class Own(torch.autograd.Function):
    """A linear layer whose backward takes the weight as it is, or cast to its gradient's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, cast: bool) -> Tensor:
        ctx.save_for_backward(w)
        ctx.cast = cast
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return grads[0] @ w.to(BF16) if ctx.cast else grads[0].float() @ w.float(), None, None


@pytest.mark.parametrize("cast", [True, False])
def test_a_backward_of_ones_own_decides_by_the_gradients(cast: bool) -> None:
    x = torch.randn(4, 16)
    trained = nn.Linear(16, 16)
    model = Bare((16, 16), lambda w: Own.apply(trained(x), w, cast))
    model.trained = trained
    expected = results(model, model)
    with hold_frozen(model, model) as held:
        assert held.names == (("w",) if cast else ())
        assert cast or "Own.forward may mind" in held.left["w"]
        assert_same(results(model, model), expected)


def test_a_backward_that_cannot_be_tried_leaves_what_is_doubtful() -> None:
    model, x = mlp()
    run = partial(checkpoint, model, x.requires_grad_(), use_reentrant=True)
    expected = results(model, run)
    with hold_frozen(model, run) as held:
        assert held.names == ()
        assert_same(results(model, run), expected)


def test_a_part_without_gradients_is_held() -> None:
    tower, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4)
    model = nn.ModuleDict({"tower": tower, "head": nn.Linear(4, 3)})

    def run() -> Tensor:
        with torch.no_grad():
            features = tower(x)
        return model["head"](features)

    with hold_frozen(model, run) as held:
        assert held.names == ("tower.weight", "tower.bias")


def test_memory_that_others_hold_too_is_left() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    both = torch.randn(8, 4)
    for layer, half in zip(model, both.chunk(2), strict=True):
        layer.weight = nn.Parameter(half, requires_grad=False)
    with hold_frozen(model, lambda: model(torch.randn(2, 4))) as held:
        assert held.left == dict.fromkeys(("0.weight", "1.weight"), "shares its memory")


def mlp(training: bool = True) -> tuple[nn.Module, Tensor]:
    """A trained layer, a frozen one with dropout and statistics, and data."""
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).train(training)
    model[4].requires_grad_(False)
    return model, torch.randn(6, 8)


def test_weights_come_back_where_they_were() -> None:
    model, x = mlp()
    weight, place = model[4].weight, model[4].weight.data_ptr()
    before = weight.clone()
    held = hold_frozen(model, lambda: model(x))
    assert held.names == ("4.weight", "4.bias")
    assert not model[4].weight.requires_grad
    held.release()
    held.release()
    assert model[4].weight is weight
    assert weight.data_ptr() == place
    assert_bit_equal(weight, before)


def test_weights_come_back_after_an_error() -> None:
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())

    def fail_when_held() -> Tensor:
        if model[4].weight.dtype == BF16:
            raise KeyError("held")
        return model(x)

    with pytest.raises(KeyError, match="held"):
        hold_frozen(model, fail_when_held)
    with pytest.raises(ZeroDivisionError), hold_frozen(model, lambda: model(x)):
        raise ZeroDivisionError
    for key, value in model.state_dict().items():
        assert_bit_equal(value, before[key])


def test_random_numbers_and_buffers_are_as_before() -> None:
    model, x = mlp()
    statistics, state = model[1].running_mean.clone(), torch.get_rng_state()
    with hold_frozen(model, lambda: model(x)):
        assert_bit_equal(model[1].running_mean, statistics)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(param.grad is None for param in model.parameters())


class Average(nn.Module):
    """A buffer that each forward replaces, and chance from Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)) * random.random()
        self.last = y.detach()
        self.mean = 0.9 * self.mean + 0.1 * self.last.float().mean(0)
        return y


def test_buffers_that_a_forward_replaces_are_as_before() -> None:
    model, state = Average(), random.getstate()
    mean = model.mean
    with hold_frozen(model, lambda: model(torch.ones(2, 8))) as held:
        assert held.names == ("second.weight", "second.bias")
        assert random.getstate() == state
        assert model.mean is mean
        assert model.last is None
    assert_bit_equal(mean, torch.zeros(8))


def test_values_written_while_held_are_told() -> None:
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(TalosRuntimeError, match=r"must not be written.*4\.weight"),
        hold_frozen(model, lambda: model(x)),
    ):
        model.load_state_dict(before)
    assert_bit_equal(model[4].weight, before["4.weight"])


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "data": lambda layer: layer.weight.data.add_(1),
    "other data": lambda layer: setattr(layer.weight, "data", torch.zeros(3, 16)),
    "bias": lambda layer: layer.bias.data.zero_(),
    "dtype": lambda layer: layer.double(),
    "unfrozen": lambda layer: layer.requires_grad_(True),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(3, 16))),
}


@pytest.mark.parametrize("name", WRITES)
def test_whatever_is_done_to_held_weights_is_told(name: str) -> None:
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    held = hold_frozen(model, lambda: model(x))
    WRITES[name](model[4])
    with pytest.raises(TalosRuntimeError, match=r"must not be written or unfrozen.*4\."):
        held.release()
    held.release()
    assert_same(list(model.state_dict().values()), list(before.values()))
    assert not model[4].weight.requires_grad


def test_the_error_that_ends_a_context_is_not_hidden() -> None:
    model, x = mlp()
    held = hold_frozen(model, lambda: model(x))
    model.load_state_dict(model.state_dict())
    with pytest.raises(ZeroDivisionError), held:
        raise ZeroDivisionError


def test_the_state_that_is_saved_while_held_is_fp32() -> None:
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    with hold_frozen(model, lambda: model(x)):
        states = [model.state_dict(), model[4].state_dict(prefix="4.")]
    assert set(states[0]) == set(before)
    for state in states:
        for key, value in state.items():
            assert_bit_equal(value, before[key])
    assert not model[4]._state_dict_hooks


@pytest.mark.parametrize("name", ["timm VisionTransformer", "T5ForConditionalGeneration v1.0"])
def test_training_takes_the_same_steps(name: str) -> None:
    family = FAMILIES[name]
    base = family.model("sdpa").train()
    batches = [family.batch(3) for _ in range(2)]
    mask = Mask.from_dense(
        {n: torch.rand_like(each.param) < 0.3 for n, each in select_parameters(base, "qk").items()}
    )

    def train(hold: bool) -> TaskVector:
        model = copy.deepcopy(base)
        optimizer = SparseAdam(model, mask, lr=1e-2)
        torch.manual_seed(2)
        with ExitStack() as stack:
            if hold:
                held = hold_frozen(model, lambda: model(**batches[0]))
                assert stack.enter_context(held).names
            for _ in range(3):
                for batch in batches:
                    with torch.autocast("cpu", BF16):
                        loss = model(**batch)
                        loss = (loss if isinstance(loss, Tensor) else loss.logits).square().mean()
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            inside = optimizer.task_vector()
        optimizer.release()
        task_vector = optimizer.task_vector()
        assert_bit_equal(task_vector.values, inside.values)
        task_vector.apply_(copy.deepcopy(base))  # is held to the weights that it was made from
        for key, param in model.named_parameters():
            assert param.requires_grad
            if key not in mask.names:
                assert_bit_equal(param, base.get_parameter(key))
        return task_vector

    ours, theirs = train(hold=True), train(hold=False)
    assert float(theirs.values.abs().max()) > 0
    assert_bit_equal(ours.values, theirs.values)


@pytest.mark.parametrize("around", ["compile", "checkpoint"])
def test_it_composes_with(around: str) -> None:
    model = FAMILIES["timm VisionTransformer"].model("sdpa").blocks[0]
    train_only(model, "qk")
    x = torch.randn(2, 5, 32, requires_grad=True)
    expected = results(model, lambda: model(x))
    if around == "compile":  # an assumption about the weights' dtype would fail later
        run: Callable[[], Tensor] = partial(torch.compile(model, backend="aot_eager"), x)
    else:
        run = partial(checkpoint, model, x, use_reentrant=False)
    assert_same(results(model, run), expected)
    with hold_frozen(model, run) as held:
        assert set(held.names) == matrices(model)
        assert_same(results(model, run), expected)
    assert_same(results(model, run), expected)


def saved(module: nn.Module, x: Tensor) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """What the backward keeps under autocast: the parameter that it is, or "", shape and dtype."""
    names = {param.data_ptr(): name for name, param in module.named_parameters()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((names.get(tensor.data_ptr(), ""), tuple(tensor.shape), tensor.dtype))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each)
    with hooks, torch.autocast("cpu", BF16):
        module(x)
    return kept


def test_a_frozen_linear_keeps_no_input_and_a_held_one_no_cast() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4, requires_grad=True)
    assert ("", (10, 4), BF16) in saved(layer, x)
    layer.requires_grad_(False)
    assert saved(layer, x) == [("", (4, 3), BF16)]  # a copy of the weight, for each use
    with hold_frozen(layer, lambda: layer(x)):
        assert saved(layer, x) == [("weight", (4, 3), BF16)]


def test_what_a_frozen_block_of_a_vit_keeps() -> None:
    block = FAMILIES["timm VisionTransformer"].model("sdpa").blocks[0].requires_grad_(False)
    x = torch.randn(2, 5, 32, requires_grad=True)
    with hold_frozen(block, lambda: block(x)):
        kept = saved(block, x)
    fp32 = torch.float32
    norm = [("", (2, 5, 32), fp32), ("", (2, 5, 1), fp32), ("", (2, 5, 1), fp32)]
    attention = [("", (2, 2, 5, 16), BF16)] * 4 + [("", (2, 2, 5), fp32)]
    activation = [("", (2, 5, 128), BF16)]
    assert sorted(each[1:] for each in kept if not each[0]) == sorted(
        each[1:] for each in norm + norm + attention + activation
    )


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
def test_dtype_is_checked(dtype: Any) -> None:
    model, x = mlp()
    with pytest.raises(TalosTypeError, match=r"dtype must be torch\.bfloat16 or torch\.float16"):
        hold_frozen(model, lambda: model(x), dtype)


def test_a_forward_that_returns_nothing_is_refused() -> None:
    model, _ = mlp()
    with pytest.raises(TalosTypeError, match=r"forward must return tensors.*return the loss"):
        hold_frozen(model, lambda: None)


def test_a_model_without_frozen_weights_needs_no_forward() -> None:
    model, _ = mlp()
    with pytest.warns(UserWarning, match="no float32 parameter is frozen, so none is held"):
        assert hold_frozen(model.requires_grad_(), lambda: None).names == ()


def test_a_copy_made_while_held_lives_on_its_own() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    held = hold_frozen(model, lambda: model(torch.randn(2, 4)))
    twin, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    held.release()
    for each in (twin, stored):
        assert_bit_equal(each.state_dict()["weight"], model.weight.detach())
        each.float().load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(3)})
        assert_bit_equal(each.state_dict()["weight"], torch.ones(3, 4))
