"""What cannot be scored exactly is refused by name, before a mask is made of it."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from talos.calibration import calibrate, fisher_diag
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from tests.calibration.models import (
    MODELS,
    Apply,
    Around,
    C,
    Calls,
    E,
    assert_scores,
    inputs,
    mlp,
    oracle,
    pack,
    pooled,
    unpack,
)


class Parts(nn.Module):
    """A layer and its first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(E, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)[:, :C] + functional.linear(x, self.layer.weight[:C]).mean(1)


class Tied(nn.Module):
    """Logits by the table that the tokens were looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.table(x.argmax(-1)).mean(1), self.table.weight)


class Reentrant(nn.Module):
    """A block whose activations are computed again in a backward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(E, E), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.block, self.before(x), use_reentrant=True))


class Outside(nn.Module):
    """Uses a weight in a product that is no linear layer, and in one that is."""

    def __init__(self, also_inside: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(E, E)
        self.also_inside = also_inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) if self.also_inside else x
        return torch.einsum("bte,fe->bf", y, self.layer.weight) + self.layer.bias


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(E, C)
        self.pooler = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean(1))


def mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(mlp(), Apply(lambda x: mix(x.mean(1))), nn.Linear(E, C))


class ScaleRMSNorm(nn.Module):
    """A norm with one gain for all features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).rsqrt()


def one_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.linear(x, w, b)


def grads_inside(x: Tensor, w: Tensor) -> Tensor:
    y = functional.linear(x, w)
    (saliency,) = torch.autograd.grad(y.sum(), w, create_graph=True, allow_unused=True)
    return y + saliency.sum()


REFUSALS: dict[str, tuple[nn.Module, type[Exception], str]] = {
    "batch norm without statistics": (
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(5 * E, track_running_stats=False)),
        *(TalosValueError, "must not mix samples, got 1, a BatchNorm1d"),
    ),
    "used whole and in part": (
        Parts(),
        *(TalosRuntimeError, r"layer\.weight must be used whole or in parts that do not overlap"),
    ),
    "tied to an embedding": (
        Tied(),
        *(
            TalosRuntimeError,
            r"table\.weight must be used in one way.*an embedding that is a linear",
        ),
    ),
    "reentrant checkpoint": (
        pooled(Reentrant()),
        *(TalosRuntimeError, r"must be the non-reentrant kind.*use_reentrant=False"),
    ),
    "used outside": (
        Outside(False),
        TalosRuntimeError,
        r"layer\.weight must be used only by linear",
    ),
    "used outside too": (Outside(True), TalosRuntimeError, r"layer\.weight must be used only by"),
    "never used": (
        Unused(),
        TalosRuntimeError,
        r"pooler\.weight must influence the logits.*params=",
    ),
    "centred over the batch": (
        mixing(lambda x: x - x.mean(0)),
        *(TalosRuntimeError, r"samples of a batch must not influence one another, got rows of"),
    ),
    "looks at the sample before": (
        mixing(lambda x: x + x.roll(1, 0)),
        *(TalosRuntimeError, r"must not influence one another"),
    ),
    "packed sequences that mix": (
        Around(
            nn.Linear(E, E),
            pack,
            lambda y, x: unpack(y + y.roll(2, 0), x),
        ),
        *(TalosRuntimeError, "must not influence one another"),
    ),
    "logits without a gradient": (
        nn.Sequential(mlp(), Apply(lambda x: x.detach().mean(1))),
        *(TalosRuntimeError, "depend on the selected parameters"),
    ),
    "logits [B]": (
        nn.Sequential(nn.Linear(E, 1), Apply(lambda x: x.mean((1, 2)))),
        *(TalosTypeError, r"must return logits \[B, C\]"),
    ),
    "logits of four dimensions": (
        nn.Sequential(nn.Linear(E, E), Apply(lambda x: x[None])),
        *(TalosValueError, r"logits \[B, C\] or \[B, T, V\], got \[1, 6, 5, 8\]"),
    ),
    "integers": (
        nn.Sequential(nn.Linear(E, E), Apply(lambda x: x.mean(1).long())),
        *(TalosTypeError, "pass logits_fn="),
    ),
    "infinite logits": (
        nn.Sequential(mlp(), Apply(lambda x: x.mean(1) / 0)),
        *(TalosValueError, "logits must be finite"),
    ),
    "infinite gradients": (
        nn.Sequential(mlp(), Apply(lambda x: (x.mean(1) * 0).sqrt())),
        *(TalosValueError, r"scores of 0\.[02]\.(weight|bias) must be finite"),
    ),
    "one gain for all features": (
        pooled(ScaleRMSNorm()),
        *(TalosRuntimeError, "weight must be as wide as the rows"),
    ),
    "one bias for all features": (
        pooled(Calls(one_bias, w=torch.randn(E, E), b=torch.randn(1))),
        *(TalosRuntimeError, "b must be as wide as the rows"),
    ),
    "gradients in the forward": (
        pooled(Calls(grads_inside, w=torch.randn(E, E))),
        *(
            TalosRuntimeError,
            r"must leave gradients to the calibration, got a backward through 0\.w",
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_scored_exactly_is_refused_by_name(name: str) -> None:
    model, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        fisher_diag(model.double(), [inputs()], params=".")


def test_scores_that_overflow_are_refused_by_name() -> None:
    model, x = MODELS["vectors"](), inputs().float() * 1e25
    with pytest.raises(TalosValueError, match=r"scores of 1\.weight must be finite"):
        fisher_diag(model, [x], target="logit", params=".")


def test_a_view_without_history_is_not_scored() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(E, E))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                rows = self.w[: E // 2]
            return functional.linear(x, self.w)[..., : E // 2] * functional.linear(x, rows)

    model = nn.Sequential(Frozen(), Apply(lambda x: x.mean(1))).double()
    expected = oracle(model, inputs())
    assert_scores(fisher_diag(model, [inputs()], draws="exact", params="."), expected)


def test_batches_made_in_inference_mode_are_refused() -> None:
    model = MODELS["tokens"]()
    with torch.inference_mode():
        x = inputs(8).float()
    for run in (fisher_diag, calibrate):
        with pytest.raises(TalosRuntimeError, match=r"under torch\.inference_mode; clone\(\)"):
            run(model, [x])


def test_exact_expectations_over_label_sequences_are_refused() -> None:
    with pytest.raises(TalosValueError, match=r"draws must be a number for logits \[B, T, V\]"):
        fisher_diag(nn.Linear(E, C).double(), [inputs()], draws="exact")


def test_a_single_class_is_refused() -> None:
    model = nn.Linear(E, 1).double()
    with pytest.raises(TalosValueError, match=r"at least two classes, got \[8, 1\]"):
        calibrate(model, [inputs(8).mean(1)])
    assert calibrate(model, [inputs(8).mean(1)], density=0.5, target="logit").nnz == 4


class Odd(nn.Linear):
    """A frozen weight that no gradient could reach."""

    def __init__(self, kind: torch.dtype | str) -> None:
        super().__init__(4, 4)
        self.real = torch.eye(4)
        weight = (
            torch.zeros(4, 4).to(kind)
            if isinstance(kind, torch.dtype)
            else torch.empty(4, 4, device=kind)
        )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.real, self.bias)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bool, "meta"])
def test_what_is_left_out_is_not_checked(kind: torch.dtype | str) -> None:
    model = nn.Sequential(Odd(kind), nn.Linear(4, 3))
    batch = torch.randn(16, 4)
    assert set(calibrate(model, [batch], 0.5, 2).names) <= {"1.weight", "1.bias"}
    assert set(fisher_diag(model, [batch])) == {"1.weight", "1.bias"}
