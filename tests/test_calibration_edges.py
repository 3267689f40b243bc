"""Uses of weights that are easily scored wrongly: each exact, or refused by name."""

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from talos.calibration import calibrate, fisher_diag
from talos.errors import TalosRuntimeError, TalosValueError
from talos.layouts import Layouts
from tests.test_calibration import (
    MODELS,
    Apply,
    C,
    E,
    N,
    assert_scores,
    batched,
    inputs,
    mlp,
    oracle,
    pooled,
)


class Calls(nn.Module):
    """A function of the input and of parameters that it is given by name."""

    def __init__(self, function: Callable[..., Tensor], **params: Tensor) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def by_keywords(x: Tensor, w: Tensor, b: Tensor, table: Tensor, gain: Tensor) -> Tensor:
    x = functional.linear(input=x, weight=w, bias=b)
    x = x + functional.embedding(input=x.argmax(-1), weight=table)
    return torch.layer_norm(x, normalized_shape=[E], weight=gain, eps=1e-3)


def changed_in_place(x: Tensor, table: Tensor) -> Tensor:
    return functional.embedding(x.argmax(-1), table).mul_(x).add_(1.0)


def two_paddings(x: Tensor, table: Tensor) -> Tensor:
    ids = x.argmax(-1)
    found = functional.embedding(ids, table, padding_idx=2)
    return found * x + functional.embedding(ids.flip(1), table, padding_idx=-1)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "torch's names": lambda: pooled(
        Calls(
            by_keywords,
            w=torch.randn(E, E),
            b=torch.randn(E),
            table=torch.randn(E, E),
            gain=torch.rand(E) + 0.5,
        )
    ),
    "embedding changed in place": lambda: pooled(
        Calls(changed_in_place, table=torch.randn(E, E)), nn.Tanh()
    ),
    "two paddings of a table": lambda: pooled(
        Calls(two_paddings, table=torch.randn(E, E)), nn.Tanh()
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_scores(name: str) -> None:
    model, x = EXACT[name]().double(), inputs()
    expected = oracle(model, x)
    for size in (1, 5, N):
        assert_scores(fisher_diag(model, batched(x, size), draws="exact", params="."), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_of_small_inputs_has_torchs_own_eps(dtype: torch.dtype) -> None:
    """Inputs of the size of the root of bfloat16's eps: there the wrong one would show."""
    model = nn.Sequential(nn.Linear(E, E, bias=False), nn.RMSNorm(E), nn.Linear(E, C)).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(0.05)
    x = inputs(40).mean(1).to(dtype)
    expected = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in
                model.named_parameters()}  # fmt: skip
    for row in x:
        log_probs = model(row[None])[0].float().log_softmax(0)
        for value in log_probs:
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for score, grad in zip(expected.values(), grads, strict=True):
                score += value.detach().exp() * grad.double().square()
    for name, score in fisher_diag(model, [x], draws="exact", params=".").items():
        error = (score.double() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.05), (name, error)


class SampleSecond(nn.Module):
    """Tokens first, samples second, as many as each other: only a probe tells them apart."""

    def __init__(self, mix: bool = False) -> None:
        super().__init__()
        self.inner, self.read, self.mix = nn.Linear(E, E), nn.Linear(E, C), mix

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x.transpose(0, 1).contiguous())).mean(0)
        return self.read(hidden + hidden.sum(0) if self.mix else hidden)


def without_class_0(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).index_fill(1, torch.tensor([0]), -math.inf)


def test_a_first_class_without_a_gradient_settles_no_layout() -> None:
    model, x = SampleSecond().double(), inputs(5)
    options: dict[str, Any] = {"logits_fn": without_class_0, "draws": "exact", "params": "."}
    together = fisher_diag(model, [x], **options)
    alone = fisher_diag(model, batched(x, 1), **options)
    assert_scores(together, {name: score.double() for name, score in alone.items()}, floor=1e-9)
    fisher_diag(model, [x], check=True, **options)
    with pytest.raises(TalosRuntimeError, match="must not influence one another"):
        fisher_diag(SampleSecond(mix=True).double(), [x], **options)


@pytest.mark.parametrize("count", [2, 3, 31, 32, 62])
def test_weak_influence_of_samples_is_noticed_at_every_batch_size(count: int) -> None:
    x = inputs(count)

    def mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
        return nn.Sequential(mlp(), Apply(lambda x: mix(x.mean(1))), nn.Linear(E, C)).double()

    for mix in (lambda h: h + 0.03 * h.mean(0), lambda h: h + h.roll(count // 2, 0)):
        with pytest.raises(TalosRuntimeError, match="must not influence one another"):
            fisher_diag(mixing(mix), [x], params=".")


def test_codes_of_the_probe_are_far_apart_where_samples_are_few() -> None:
    layouts = Layouts()
    for count, least in ((2, 2.0**30), (4, 2.0**10), (31, 2.0)):
        scales = layouts.probe_scales(torch.zeros(count).double(), half=False).sort().values
        assert (scales[1:] / scales[:-1]).min() >= least


class ScaleRMSNorm(nn.Module):
    """A norm with one gain for all features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).rsqrt()


def grads_inside(x: Tensor, w: Tensor) -> Tensor:
    y = functional.linear(x, w)
    (saliency,) = torch.autograd.grad(y.sum(), w, create_graph=True, allow_unused=True)
    return y + saliency.sum()


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "one gain for all features": (pooled(ScaleRMSNorm()), "weight must be as wide as the rows"),
    "one bias for all features": (
        pooled(Calls(functional.linear, w=torch.randn(E, E), b=torch.randn(1))),
        "b must be as wide as the rows",
    ),
    "gradients in the forward": (
        pooled(Calls(grads_inside, w=torch.randn(E, E))),
        "must leave gradients to the calibration, got a backward through 0.w",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name: str) -> None:
    model, message = REFUSED[name]
    if name == "one bias for all features":
        model[0].function = lambda x, w, b: functional.linear(x, w, b)
    with pytest.raises(TalosRuntimeError, match=message):
        fisher_diag(model.double(), [inputs()], params=".")


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


def test_two_threads_wait_for_each_other() -> None:
    original, started, errors = functional.linear, threading.Event(), []

    def slowly(model: nn.Module, batch: Tensor) -> Tensor:
        started.set()
        threading.Event().wait(0.02)
        return model(batch)

    def work() -> None:
        try:
            model = MODELS["tokens"]().double()
            fisher_diag(model, batched(inputs(), 2), logits_fn=slowly, params=".")
        except Exception as error:  # told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(10)
    for thread in threads:
        thread.join()
    assert not errors
    assert functional.linear is original


def test_scores_go_when_nobody_holds_them() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs(8)
    alive: list[weakref.ref[Tensor]] = []

    def logits_fn(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch)
        alive.append(weakref.ref(logits))
        return logits

    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        mask = calibrate(model, batched(x, 2), logits_fn=logits_fn)
        assert all(each() is None for each in alive)
        left = sum(issubclass(type(each), Tensor) for each in gc.get_objects()) - before
    finally:
        gc.enable()
    # words, positions and starts of each tensor of the mask, and nothing of the calibration
    assert left <= 3 * len(mask.names) + 2


@pytest.mark.parametrize(
    ("density", "rounds", "least"), [(0.1, 40, 1), (1.0, 1, 0.99), (0.02, 4, 1)]
)
def test_parity_at_the_ends_of_its_range(density: float, rounds: int, least: float) -> None:
    model, x = MODELS["vectors"]().double(), inputs(8)
    entries = C * (E + 1)
    if int(density * entries) == 0:
        with pytest.raises(TalosValueError, match="no weight selected"):
            calibrate(model, [x], density, rounds, params=".", parity="released")
        return
    mask = calibrate(model, [x], density, rounds, params=".", parity="released")
    assert mask.nnz >= (least if least >= 1 else int(density * entries) - 1)


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """A data set without a length; the first passes yield what `counts` says, others the last."""

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)

    def __iter__(self) -> Iterator[Tensor]:
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return iter(inputs(count).unbind())


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_loader_whose_length_cannot_be_asked_is_calibrated(rounds: int) -> None:
    model = nn.Linear(inputs(1).shape[-1], 3).double()
    loader = torch.utils.data.DataLoader(Stream(16), batch_size=4)
    with pytest.raises(TypeError):
        len(loader)
    metadata = calibrate(model, loader, 0.5, rounds).metadata
    assert metadata["samples"] == 16
    assert (metadata["stability"] is None) == (rounds == 1)


def test_rounds_of_unequal_numbers_of_samples_are_told() -> None:
    model = nn.Linear(inputs(1).shape[-1], 3).double()
    loader = torch.utils.data.DataLoader(Stream(16, 12, 9), batch_size=4)
    with pytest.warns(UserWarning, match="rounds scored 16, 12, 9 samples"):
        mask = calibrate(model, loader, 0.5, 3)
    assert mask.metadata["samples"] == 9
    assert mask.metadata["samples_of_rounds"] == [16, 12, 9]


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
