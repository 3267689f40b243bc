"""The samples of a batch are told apart, however their rows lie."""

import math
from collections.abc import Callable
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from talos.calibration import fisher_diag
from talos.calibration.layouts import Rows, blocks
from talos.errors import TalosRuntimeError, TalosValueError
from tests.calibration.models import (
    MODELS,
    Apply,
    Around,
    C,
    E,
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


@pytest.mark.parametrize(
    ("name", "probes"),
    [
        ("encoder layer", 1),
        ("weights [in, out]", 1),  # views: what they flattened is known
        ("windows", 1),
        ("attention with weights", 1),
        ("sorted batch", 1 + 2 * 3),
        ("tokens in any order", 2 * 3),
        ("tokens flattened", 3),  # the inner layer's might be packed
    ],
)
def test_layouts_are_probed_once_where_they_can_be_known(name: str, probes: int) -> None:
    model, x = MODELS[name]().double(), inputs(12)
    backwards: list[int] = []

    def counting(model: nn.Module, batch: Tensor) -> Tensor:
        logits = cast(Tensor, model(batch))
        logits.register_hook(lambda _: backwards.append(1))
        return logits

    fisher_diag(model, [part.clone() for part in batched(x, 4)], logits_fn=counting, params=".")
    assert len(backwards) == 3 + probes


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
@pytest.mark.parametrize("ordered", [True, False])
def test_weak_influence_of_samples_is_noticed_at_every_batch_size(
    count: int, ordered: bool
) -> None:
    x = inputs(count)

    def mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
        if ordered:
            return nn.Sequential(mlp(), Apply(lambda x: mix(x.mean(1))), nn.Linear(E, C)).double()
        return pooled(Around(mlp(), route, lambda y, x: mix(gather(y, x))), nn.Tanh()).double()

    for mix in (lambda h: h + 0.03 * h.mean(0), lambda h: h + 0.1 * h.roll(count // 2, 0)):
        with pytest.raises(TalosRuntimeError, match="must not influence one another"):
            fisher_diag(mixing(mix), [x], params="." if ordered else r"0\.layer")


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
    rows = Rows(torch.randn(len(owners), 3), None, owners)
    sizes, sums = 0, torch.zeros(64, 3)
    for dy, _ in blocks([rows], 64):
        sizes += dy.numel()
        sums[: dy.shape[1]] += dy.sum((0, 2)).abs().sort(0, descending=True).values
    assert sizes <= 2 * rows.dy.numel()
    wanted = torch.zeros(64, 3).index_add(0, owners[owners >= 0], rows.dy[owners >= 0])
    torch.testing.assert_close(sums.sum(), wanted.abs().sum())
