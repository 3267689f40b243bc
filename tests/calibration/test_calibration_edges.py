"""Uses of weights that are easily scored wrongly: each exact, or refused by name."""

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional

from talos.calibration import calibrate, fisher_diag
from talos.calibration.layouts import Layouts, Use
from talos.calibration.listeners import Sink
from talos.calibration.pieces import Piece, blocks
from talos.errors import TalosRuntimeError, TalosValueError
from tests.calibration.test_calibration import (
    MODELS,
    Apply,
    Around,
    C,
    E,
    N,
    assert_scores,
    batched,
    gather,
    inputs,
    mlp,
    oracle,
    pooled,
    route,
    sort,
    unsort,
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


@pytest.mark.parametrize("count", [2, 3, 31, 32, 62])
def test_weak_influence_is_noticed_where_rows_have_no_layout(count: int) -> None:
    x = inputs(count)

    def mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
        return pooled(Around(mlp(), route, lambda y, x: mix(gather(y, x))), nn.Tanh()).double()

    for mix in (lambda h: h + 0.03 * h.mean(0), lambda h: h + 0.1 * h.roll(count // 2, 0)):
        with pytest.raises(TalosRuntimeError, match="must not influence one another"):
            fisher_diag(mixing(mix), [x], params=r"0\.layer")


@pytest.mark.parametrize("name", ["tokens in any order", "packed sequences, layer used twice"])
@pytest.mark.parametrize("count", [40, 70])
def test_more_samples_than_codes_where_rows_have_no_layout(name: str, count: int) -> None:
    model, x = MODELS[name]().double(), inputs(count)
    alone, together = (
        fisher_diag(model, batched(x, size), draws=3, params=".") for size in (1, count)
    )
    assert_scores(together, {key: score.double() for key, score in alone.items()}, floor=1e-9)


def test_only_some_batches_are_put_in_another_order() -> None:
    """The first one is not, and what it shows of the layout is kept: whole samples may change."""
    model = pooled(Around(mlp(), sort, unsort)).double()
    x = inputs(8)
    x[:, 0, 0] = torch.tensor([0, 1, 2, 3, 5, 4, 9, 7])
    assert_scores(fisher_diag(model, batched(x, 2), draws="exact"), oracle(model, x))


def test_rows_that_the_first_class_does_not_reach_are_named_by_the_next() -> None:
    model, x = MODELS["tokens in any order"]().double(), inputs(5)
    options: dict[str, Any] = {"logits_fn": without_class_0, "draws": "exact", "params": "."}
    together, alone = (fisher_diag(model, batched(x, size), **options) for size in (5, 1))
    assert_scores(together, {name: score.double() for name, score in alone.items()}, floor=1e-9)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 5, 3], [1, 5, 6], [6, 6]])
def test_later_batches_may_be_packed_in_other_ways(sizes: list[int]) -> None:
    """Equal lengths come first: they have a layout, which packed sequences do not keep."""
    model, x = MODELS["packed sequences"]().double(), inputs(12)
    x[: sizes[0], 0, 0] = 0.6
    batches = list(x.split([*sizes, 12 - sum(sizes)] if sum(sizes) < 12 else sizes))
    assert_scores(fisher_diag(model, batches, draws="exact", params="."), oracle(model, x))


@settings(max_examples=25)
@given(data=st.data())
def test_rows_of_any_samples_in_any_order_are_scored(data: st.DataObject) -> None:
    """Each sample's rows go to the layer in any number and order, mixed with those of others."""
    count = data.draw(st.integers(2, 40), label="samples")
    counts = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count), label="rows")
    tokens = [(sample, row) for sample, rows in enumerate(counts) for row in range(rows)]
    order = data.draw(st.permutations(range(len(tokens))), label="order")
    torch.manual_seed(count)
    layer, read = nn.Linear(E, E).double(), nn.Linear(E, C).double()
    x = inputs(count)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.read = layer, read

        def forward(self, x: Tensor) -> Tensor:
            chosen = [tokens[i] for i in order]
            if len(x) == 1:  # a sample by itself, in the order of its tokens
                chosen = [(0, row) for row in range(counts[int(x[0, 0, 0])])]
            places = torch.tensor([5 * sample + row for sample, row in chosen], dtype=torch.int64)
            rows = self.layer(x.flatten(0, 1)[places])
            y = torch.zeros_like(x.flatten(0, 1)).index_copy(0, places, rows).view_as(x)
            return self.read(torch.tanh(y + x).mean(1))

    x[:, 0, 0] = torch.arange(count)
    if not tokens:
        return
    alone, together = (
        fisher_diag(Model(), batched(x, size), draws=2, params=".") for size in (1, count)
    )
    assert_scores(together, {name: score.double() for name, score in alone.items()}, floor=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_float16_names_rows_or_refuses_what_is_too_small(scale: float) -> None:
    """Half precision has fewer codes, and less room for them."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.read = mlp(), nn.Linear(E, C)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                y = gather(self.inner(route(x)).to(x.dtype), x)
            return self.read(scale * torch.tanh(y).mean(1))

    model, x = Half(), inputs(12).float()
    if scale < 1:
        with pytest.raises(TalosValueError, match="too small for float16; calibrate in bfloat16"):
            fisher_diag(model, [x], params=".")
        return
    alone, together = (fisher_diag(model, batched(x, size), params=".") for size in (1, 12))
    for name, score in alone.items():
        assert (score - together[name]).norm() <= 0.02 * score.norm(), name


def test_samples_of_very_unequal_lengths_are_padded_with_bounds() -> None:
    owners = torch.cat([torch.arange(64), torch.zeros(5000, dtype=torch.int64)])
    owners = owners[torch.randperm(len(owners))]
    owners[7] = -1
    use = Use("w", (len(owners),), "layer")
    piece = Piece(Sink(use, lambda *_: None), torch.randn(len(owners), 3), None, owners)
    sizes, sums = 0, torch.zeros(64, 3)
    for dy, _ in blocks([piece], 64):
        sizes += dy.numel()
        sums[: dy.shape[1]] += dy.sum((0, 2)).abs().sort(0, descending=True).values
    assert sizes <= 2 * piece.dy.numel()
    wanted = torch.zeros(64, 3).index_add(0, owners[owners >= 0], piece.dy[owners >= 0])
    torch.testing.assert_close(sums.sum(), wanted.abs().sum())


def test_codes_of_the_probe_are_far_apart_where_samples_are_few() -> None:
    layouts = Layouts()
    for count, least in ((2, 2.0**30), (4, 2.0**10), (31, 2.0)):
        layouts.probes([], count, half=False)
        scales = layouts.scales(torch.zeros(count).double(), 0).sort().values
        assert (scales[1:] / scales[:-1]).min() >= least


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("count", [2, 7, 8, 31, 32, 49, 50, 962])
def test_codes_of_all_probes_name_a_sample_and_one_probe_is_to_spare(
    count: int, half: bool
) -> None:
    layouts = Layouts()
    layouts.probes([], count, half=half)
    losses = torch.zeros(count).double()
    scales = torch.stack([layouts.scales(losses, probe) for probe in range(layouts.most)])
    for left_out in {0, layouts.most - 1} if count <= 31 - 24 * half else {0}:
        rest = scales[[probe for probe in range(layouts.most) if probe != left_out]]
        assert len({tuple(column) for column in rest.T.tolist()}) == count
    assert scales.max() / scales.min() <= 2.0 ** (6 if half else 30)


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


class Kept:
    """What a backward keeps."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("name", ["tokens", "tokens in any order"])
def test_a_batch_is_gone_when_the_next_one_begins(name: str) -> None:
    """The last backward of a batch frees its activations, or the round does."""
    kept: list[weakref.ref[Kept]] = []

    def keep(x: Tensor) -> Kept:
        box = Kept(x.detach())  # with its history it would keep itself
        kept.append(weakref.ref(box))
        return box

    def spy(x: Tensor) -> Tensor:
        assert not [each for each in kept if each() is not None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.x):
            return x.exp()

    layers = MODELS[name]()
    model = nn.Sequential(nn.Linear(E, E), Apply(spy), *layers).double()
    fisher_diag(model, batched(inputs(), 2), draws=2, params=".")
    assert len(kept) == 3


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
