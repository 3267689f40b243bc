"""L-LoRA's gradient: that of the dense way, without a dense gradient."""

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from talos.architecture.attention import Projection
from talos.batches import default_logits
from talos.methods import LLora
from talos.methods.l_lora import first_factor
from talos.params import select_attention
from tests.architecture.test_families import FAMILIES, cast
from tests.cases import assert_bit_equal

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
METHOD = LLora(rank=3, lora_alpha=6.0, seed=2)
BY_LINEAR = (
    "open_clip ViT-B-32 visual",
    "timm VisionTransformer",
    "BertForSequenceClassification",
    "T5ForConditionalGeneration v1.0",
    "LlamaForCausalLM",
)
GPT2 = "GPT2ForSequenceClassification"


@contextmanager
def training(model: nn.Module) -> Iterator[Any]:
    """The method's phase between its beginning and its end."""
    phase = METHOD.start(model, HYPER, default_logits)
    try:
        phase.freeze()
        yield phase
    finally:
        phase.release()


def chosen(model: nn.Module) -> list[tuple[str, Projection, str]]:
    """Name, projection and role of each part that has an adapter, in their order."""
    return [
        (name, each, role)
        for name, each in select_attention(model).items()
        for role in ("query", "value")
        if each.param.dim() == 2 and role in each.roles
    ]


def expected(model: nn.Module) -> list[Tensor]:
    """Scale times the dense gradient times A0ᵀ, part by part, of what autograd has left."""
    found = []
    for name, each, role in chosen(model):
        grad = each.part(each.param.grad, role)
        a0 = first_factor(name, role, (3, grad.shape[1]), seed=2)
        found.append(2.0 * grad @ a0.to(grad).T)
    return found


def gradients(phase: Any) -> list[Tensor]:
    return [param.grad for group in phase.optimizer.param_groups for param in group["params"]]


def check(phase: Any, dense: nn.Module, rtol: float = 1e-10) -> None:
    wanted = expected(dense)
    assert len(wanted) == len(gradients(phase)) >= 2
    for found, grad in zip(gradients(phase), wanted, strict=True):
        assert (found - grad).norm() <= rtol * grad.norm()


def family(name: str) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    """A small model in float64, twice, and two batches."""
    torch.manual_seed(0)
    model = FAMILIES[name].model(FAMILIES[name].attentions[-1]).double().eval()
    batches = [cast(FAMILIES[name].batch(n), torch.float64) for n in (3, 2)]
    return model, copy.deepcopy(model), batches


def backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    logits = default_logits(model, batch)
    logits.log_softmax(-1)[..., 0].mean().backward()


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("name", [*BY_LINEAR, GPT2])
def test_accumulated_gradients_are_those_of_the_dense_way_and_none_is_dense(name: str) -> None:
    model, dense, batches = family(name)
    with training(model) as phase:
        for batch in batches:
            backward(model, batch)
            backward(dense, batch)
            assert all(param.grad is None for param in model.parameters())
        check(phase, dense)
        norm = phase.clip(math.inf)
        wanted = torch.cat([each.flatten() for each in expected(dense)]).norm()
        torch.testing.assert_close(norm, wanted)
        phase.clip(0.5 * float(norm))
        assert float(phase.clip(math.inf)) == pytest.approx(0.5 * float(wanted), rel=1e-5)
        phase.zero_grad()
        assert gradients(phase) == [None] * len(gradients(phase))


@pytest.mark.parametrize("name", BY_LINEAR)
def test_the_backward_multiplies_no_dense_gradient(name: str) -> None:
    model, dense, (batch, _) = family(name)
    shapes = {tuple(each.param.shape) for _, each, _ in chosen(model)}
    with training(model) as phase:
        with Products() as ours:
            backward(model, batch)
        with Products() as theirs:
            for key, param in dense.named_parameters():
                param.requires_grad_(key in phase.params)
            backward(dense, batch)
        assert shapes <= theirs.shapes
        assert not shapes & ours.shapes


class Layers(nn.Module):
    """Attention's layers without attention, reached in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.attn = nn.ModuleDict({each: nn.Linear(8, 8) for each in ("q", "k", "v", "o")})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, o = self.attn.values()
        if self.way == "checkpointed":
            return o(checkpoint(lambda x: q(x) * k(x) + v(x), x, use_reentrant=False))
        if self.way == "by hand":
            return o(x @ q.weight.T * k(x) + F.linear(x, v.weight.view(8, 8)))
        if self.way == "twice":
            return o(q(x) * k(x) + v(v(q(x)))) + x @ v.weight
        return o(q(x) * k(x) + v(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the compiler warns
@pytest.mark.parametrize(
    "way", ["once", "twice", "by hand", "checkpointed", "hooked", "frozen", "compiled"]
)
def test_whatever_way_a_weight_is_reached_in(way: str) -> None:
    torch.manual_seed(0)
    model = Layers(way).double()
    if way == "frozen":
        model.attn["q"].requires_grad_(False)
    dense, x = copy.deepcopy(model), torch.randn(5, 8, dtype=torch.float64)
    if way == "hooked":
        for each in (model, dense):
            each.attn["v"].weight.register_hook(lambda grad: 3 * grad)
    with training(model) as phase:
        for batch in (x, 2 * x):
            run = torch.compile(model, backend="eager") if way == "compiled" else model
            for each in (run, dense):
                each(batch).square().sum().backward()
        assert all(param.grad is None for param in model.parameters())
        wanted = expected(dense)
        for found, grad in zip(gradients(phase), wanted, strict=True):
            torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("inside", [False, True])
def test_the_gradient_of_bfloat16_products_is_multiplied_in_float32(inside: bool) -> None:
    torch.manual_seed(0)
    model, x = Layers("once"), torch.randn(64, 8)
    exact, dense = copy.deepcopy(model).double(), copy.deepcopy(model)
    with training(model) as phase:
        for each in (model, dense):
            with torch.autocast("cpu", torch.bfloat16):
                loss = each(x).float().square().sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
    exact(x.double()).square().sum().backward()
    for ours, theirs, grad in zip(gradients(phase), expected(dense), expected(exact), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - grad).norm() < 0.02 * grad.norm()
        assert (ours - grad).norm() < 1.1 * (theirs - grad).norm()


def test_what_is_not_training_is_as_ever_and_everything_is_given_back() -> None:
    torch.manual_seed(0)
    before = F.linear
    model = Layers("once")
    plain, x = copy.deepcopy(model), torch.randn(5, 8)
    with training(model) as phase:
        assert F.linear is not before
        with torch.no_grad():
            assert_bit_equal(model(x), plain(x))
        (grad,) = torch.autograd.grad(model(x).sum(), model.attn["v"].weight)
        (same,) = torch.autograd.grad(plain(x).sum(), plain.attn["v"].weight)
        assert_bit_equal(grad, same)
        assert gradients(phase) == [None, None]
        pending = model(x).sum()
    assert F.linear is before
    pending.backward()
    plain(x).sum().backward()
    assert_bit_equal(model.attn["v"].weight.grad, plain.attn["v"].weight.grad)
    assert gradients(phase) == [None, None]


def test_a_forgotten_phase_gives_everything_back() -> None:
    before = F.linear
    model = Layers("once")
    phase = METHOD.start(model, HYPER, default_logits)
    phase.freeze()
    assert F.linear is not before
    weight = weakref.ref(model.attn["q"].weight)
    del model, phase
    gc.collect()
    assert weight() is None
    assert F.linear is before
