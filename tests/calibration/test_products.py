"""Linear layers that are written as products: each form exact, whatever else is used refused."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from talos import calibrate, fisher_diag
from talos.errors import TalosRuntimeError
from tests.calibration.models import E, N, assert_scores, batched, inputs, oracle, pooled
from tests.cases import assert_bit_equal

Form = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x [N, 5, E], w, b


class Product(nn.Module):
    """A layer [out, in] or [in, out] as a function writes it."""

    def __init__(self, form: Form, *shape: int, bias: int = E) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(bias))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight, self.bias)


def in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x @ w.T
    y += b
    return y


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# [out, in] = [6, E]
OUT_IN: dict[str, Form] = {
    "x @ w.T": lambda x, w, b: x @ w.T + b,
    "x @ w.t()": lambda x, w, b: x @ w.t() + b,
    "x @ w.mT": lambda x, w, b: b + x @ w.mT,
    "matmul": lambda x, w, b: torch.add(torch.matmul(x, w.T), b),
    "matmul, by names": lambda x, w, b: torch.add(torch.matmul(input=x, other=w.T), other=b),
    "x.matmul": lambda x, w, b: x.matmul(w.transpose(0, 1)).add(b),
    "+=": in_place,
    "add_": lambda x, w, b: (x @ w.T).add_(b),
    "mm": lambda x, w, b: (flat(x).mm(w.T) + b).view(*x.shape[:2], -1),
    "torch.mm, by names": lambda x, w, b: (torch.mm(flat(x), mat2=w.T) + b).view(*x.shape[:2], -1),
    "addmm": lambda x, w, b: torch.addmm(b, flat(x), w.T).view(*x.shape[:2], -1),
    "addmm, by names": lambda x, w, b: torch.addmm(input=b, mat1=flat(x), mat2=w.T).view(
        *x.shape[:2], -1
    ),
    "b.addmm": lambda x, w, b: b.addmm(flat(x), w.T).view(*x.shape[:2], -1),
    "w @ x": lambda x, w, b: (w @ x.mT).mT + b,
    "w @ x of one vector": lambda x, w, b: torch.stack([w @ row + b for row in x.mean(1)])[:, None],
    "parts": lambda x, w, b: torch.cat([x @ w[:2].T + b[:2], x @ w[2:].T + b[2:]], -1),
    "reshaped": lambda x, w, b: x @ w.view(2, 3, E).flatten(0, 1).T + b,
    "by heads": lambda x, w, b: torch.cat([x @ part.T for part in w.view(2, 3, E)], -1) + b,
    "twice": lambda x, w, b: torch.tanh(x @ w.T + b) * functional.linear(x, w, b),
}
# [in, out] = [E, 6]
IN_OUT: dict[str, Form] = {
    "x @ w": lambda x, w, b: x @ w + b,
    "matmul, [in, out]": lambda x, w, b: x.matmul(w) + b,
    "linear of the transpose": lambda x, w, b: functional.linear(x, w.T, b),
    "addmm, [in, out]": lambda x, w, b: torch.addmm(b, flat(x), w).view(*x.shape[:2], -1),
    "w.T @ x": lambda x, w, b: (w.T @ x.mT).mT + b,
}
MODELS = {name: (form, (6, E)) for name, form in OUT_IN.items()}
MODELS |= {name: (form, (E, 6)) for name, form in IN_OUT.items()}


def model_of(form: Form, shape: tuple[int, ...], bias: int = 6) -> nn.Module:
    return pooled(Product(form, *shape, bias=bias), nn.Tanh(), nn.Linear(6, E)).double()


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_write_a_linear_layer_is_scored(name: str) -> None:
    model, x = model_of(*MODELS[name]), inputs()
    expected = oracle(model, x)
    for size in (1, 5, N):
        assert_scores(fisher_diag(model, batched(x, size), draws="exact", params="."), expected)
    fisher_diag(model, [x], params=".", check=True)


@pytest.mark.parametrize("name", ["x @ w.T", "x @ w", "w @ x"])
def test_products_under_autocast_and_in_bfloat16_are_those_of_linear_layers(name: str) -> None:
    form, shape = MODELS[name]
    layer = nn.Linear(E, 6)
    weight = layer.weight if shape == (6, E) else layer.weight.T
    model, same = model_of(form, shape).float(), pooled(layer, nn.Tanh(), nn.Linear(6, E))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.copy_(layer.bias)
        model[2].load_state_dict(same[2].state_dict())
        model[4].load_state_dict(same[4].state_dict())
    x = inputs(12).float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (fisher_diag(each, [x], params=".") for each in (model, same))
    score = ours["0.weight"] if shape == (6, E) else ours["0.weight"].T
    torch.testing.assert_close(score, theirs["0.weight"], rtol=0.05, atol=1e-4)
    model.bfloat16(), same.bfloat16()
    ours, theirs = (fisher_diag(each, [x.bfloat16()], params=".") for each in (model, same))
    score = ours["0.weight"] if shape == (6, E) else ours["0.weight"].T
    torch.testing.assert_close(score, theirs["0.weight"], rtol=0.05, atol=1e-4)


REFUSED: dict[str, tuple[Form, tuple[int, ...], int]] = {
    "einsum": (lambda x, w, b: torch.einsum("btf,of->bto", x, w) + b, (6, E), 6),
    "a weight that is scaled": (lambda x, w, b: x @ (w * 2).T + b, (6, E), 6),
    "a weight that is normed": (lambda x, w, b: x @ functional.normalize(w).T + b, (6, E), 6),
    "a weight that is indexed": (lambda x, w, b: x @ w[torch.arange(6)].T + b, (6, E), 6),
    "a weight that is cast": (lambda x, w, b: (x.float() @ w.float().T).double() + b, (6, E), 6),
    "baddbmm": (
        lambda x, w, b: torch.baddbmm(b.expand(len(x), 5, 6), x, w.T.expand(len(x), E, 6)),
        *((6, E), 6),
    ),
    "a gain": (lambda x, w, b: (x @ w.T) * b, (6, E), 6),
    "one bias for all": (lambda x, w, b: x @ w.T + b, (6, E), 1),
    "a difference": (lambda x, w, b: x @ w.T - b, (6, E), 6),
    "a factor of a bias": (lambda x, w, b: torch.add(x @ w.T, b, alpha=2), (6, E), 6),
    "a factor of a product": (
        lambda x, w, b: torch.addmm(b, flat(x), w.T, alpha=2).view(*x.shape[:2], -1),
        *((6, E), 6),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused_by_name_with_a_remedy_that_leaves_layers(name: str) -> None:
    form, shape, bias = REFUSED[name]
    model = model_of(form, shape, bias)
    with pytest.raises(TalosRuntimeError, match=r"^0\.(weight|bias) must be used only by.*params="):
        fisher_diag(model, [inputs()], params=".")
    model[0].requires_grad_(False)
    assert set(fisher_diag(model, [inputs()], params=".")) == {
        *("2.weight", "2.bias", "4.weight", "4.bias")
    }


def test_activations_in_place_behind_a_layer() -> None:
    def model(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(E, E), nn.ReLU(inplace), nn.Linear(E, E), nn.SiLU(inplace)
        return pooled(*layers).double()

    x = inputs()
    assert_scores(fisher_diag(model(True), [x], draws="exact"), oracle(model(False), x))
    for name, score in fisher_diag(model(True), [x]).items():
        assert_bit_equal(score, fisher_diag(model(False), [x])[name])


@pytest.mark.parametrize("biased", [False, True])
def test_falcon_whose_layers_are_products(biased: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(vocab_size=37, bias=biased, **sizes)
    model = transformers.FalconForCausalLM(config).eval()
    ids = [{"input_ids": torch.randint(3, 37, (6, 7))} for _ in range(2)]
    for params in ("maskable", "attention", "dense_h_to_4h"):
        assert calibrate(model, ids, rounds=1, params=params, check=True).nnz > 0
