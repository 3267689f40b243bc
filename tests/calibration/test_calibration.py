"""Scores against a loop of single samples in float64, masks against the algorithm in numpy."""

import copy
import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from talos.calibration import calibrate, fisher_diag
from talos.calibration.fisher import CalibrationProgress
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.names import named_parameters
from tests.cases import REDUCTION_TOLERANCES, assert_bit_equal

E, C = 8, 3  # width and classes of the models below
N = 6  # samples
Scores = dict[str, Tensor]


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Around(nn.Module):
    """A layer between two reshapes that depend on the batch."""

    def __init__(
        self, layer: nn.Module, before: Callable[..., Tensor], after: Callable[..., Tensor]
    ):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)), x)


class Attend(nn.Module):
    """Attention with keys and values made of the input: "same", "key", "other" or "wide"."""

    def __init__(self, kind: str, batch_first: bool, need_weights: bool = False) -> None:
        super().__init__()
        sizes = {"kdim": 5, "vdim": 4} if kind == "wide" else {}
        self.attention = nn.MultiheadAttention(E, 2, batch_first=batch_first, **sizes)
        nn.init.normal_(self.attention.in_proj_bias, std=0.1)
        self.kind, self.batch_first, self.need_weights = kind, batch_first, need_weights

    def forward(self, x: Tensor) -> Tensor:
        query = x if self.batch_first else x.transpose(0, 1)
        key = value = query
        if self.kind == "key":
            key = value = query.flip(-1)[:, 1:] if self.batch_first else query.flip(-1)[1:]
        if self.kind == "other":
            key, value = query.flip(-1), query.square()
        if self.kind == "wide":
            key, value = query[..., :5], query[..., 2:6]
        output, _ = self.attention(query, key, value, need_weights=self.need_weights)
        return output if self.batch_first else output.transpose(0, 1)


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.block, x, use_reentrant=False))


class T5LayerNorm(nn.Module):
    """As transformers writes it, without `torch.nn.functional`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(E) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Conv1D(nn.Module):
    """As transformers writes it: the weight is [in, out], tokens are flattened."""

    def __init__(self, outputs: int, inputs: int = E) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Frozen(nn.BatchNorm2d):
    """A batch norm whose statistics are those of some training."""

    def __init__(self, features: int) -> None:
        super().__init__(features, affine=False)
        nn.init.normal_(self.running_mean)
        nn.init.uniform_(self.running_var, 0.5, 2.0)


class Twice(nn.Module):
    """A layer after itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Both(nn.Module):
    """A layer of every token and of the sample's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).mean(1) + self.layer(x.mean(1))


class Again(nn.Module):
    """A layer of a batch as it comes and of the batch before it was sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        back = x[x[:, 1, 0].argsort()]
        return torch.cat([self.layer(x), self.layer(back)[x[:, 1, 0].argsort().argsort()]], -1)


class SharedBias(nn.Module):
    """Two layers with one bias, the one of a batch as it comes, the other before it was sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(E, E), nn.Linear(E, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        back = x[x[:, 1, 0].argsort()]
        other = functional.linear(back, self.other.weight, self.one.bias)
        return torch.cat([self.one(x), other[x[:, 1, 0].argsort().argsort()]], -1)


class OnlyBias(nn.Module):
    """Layer norm of which only the bias is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(E))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (E,), None, self.bias)


class Lookup(nn.Module):
    """Word embeddings; the ids are where the input is largest."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(E, E, padding_idx)
        nn.init.normal_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.argmax(-1)) * x


class RelativeBias(nn.Module):
    """Attention with the position bias of T5: looked up once for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.values = nn.Linear(E, E)

    def compute_bias(self, queries: int, keys: int) -> Tensor:
        distance = torch.arange(keys)[None] - torch.arange(queries)[:, None]
        return self.relative_attention_bias(distance.clamp(-1, 2) + 1).permute(2, 0, 1)[None]

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)  # [B, H, T, E / H]
        scores = heads @ heads.transpose(2, 3) + self.compute_bias(x.shape[1], x.shape[1])
        mixed = scores.softmax(-1) @ self.values(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return mixed.transpose(1, 2).flatten(2)


class ReadLast(nn.Module):
    """Logits of the last token, so that all other rows of the last layer have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(E, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x[:, -1])


def pooled(*layers: nn.Module) -> nn.Module:
    """Token layers, mean over tokens, logits; everything is scored."""
    return nn.Sequential(*layers, Apply(lambda x: x.mean(1)), nn.Linear(E, C))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(E, 10), nn.Tanh(), nn.Linear(10, E))


def again(layer: nn.Module) -> nn.Module:
    """A layer, something between, and the layer again."""
    return nn.Sequential(layer, nn.Tanh(), layer)


def swap(x: Tensor, *_: Tensor) -> Tensor:
    return x.transpose(0, 1)


def rejoin(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(*like.shape[:2], -1)


def rejoin_swapped(x: Tensor, like: Tensor) -> Tensor:
    return x.view(like.shape[1], like.shape[0], -1).transpose(0, 1)


def halves(x: Tensor) -> Tensor:
    """Two windows of each sample, the sample first: [B, T, E] to [2 B, T, E]."""
    return x.reshape(len(x) * 2, x.shape[1], -1).repeat(1, 1, 2)


def sort(x: Tensor) -> Tensor:
    return x[x[:, 0, 0].argsort()]


def unsort(y: Tensor, x: Tensor) -> Tensor:
    return y[x[:, 0, 0].argsort().argsort()]


def unsort_both(y: Tensor, x: Tensor) -> Tensor:
    one, other = unsort(y, x).chunk(2, -1)
    return one * other


def lengths(x: Tensor) -> list[int]:
    """Of the sequences that `pack` makes of samples: 1 to 5 tokens."""
    return (x[:, 0, 0].abs() * 4).long().clamp(0, 4).add(1).tolist()


def pack(x: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(x, lengths(x), strict=True)])


def unpack(y: Tensor, x: Tensor) -> Tensor:
    rows = [functional.pad(each, (0, 0, 0, 5 - len(each))) for each in y.split(lengths(x))]
    return torch.stack(rows)


def chosen(x: Tensor) -> Tensor:
    """Which tokens of a batch a layer gets, in an order that none of the samples has."""
    rows = x.flatten(0, 1)
    order = (rows[:, 1] * 1e3).sin().argsort()
    return order[rows[order, 2] > -0.5]


def route(x: Tensor) -> Tensor:
    return x.flatten(0, 1)[chosen(x)]


def gather(y: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x.flatten(0, 1)).index_copy(0, chosen(x), y).view_as(x)


def images_of(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 4, -1)


def convolution(**options: Any) -> nn.Module:
    """Convolution of [B, 2, 4, 5] images, then a head on the mean of its outputs."""
    kernel = options.pop("kernel", 2)
    layers = [Apply(images_of), nn.Conv2d(2, 6, kernel, **options), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(2), Apply(lambda x: x.mean(2)), nn.Linear(6, C))


def convolution_and_norm(*head: nn.Module) -> nn.Module:
    """A strided convolution of [B, 2, 4, 5] images to 6 features of [2, 4], batch norm, a head."""
    convolution = nn.Conv2d(2, 6, 2, stride=(2, 1))
    return nn.Sequential(Apply(images_of), convolution, Frozen(6), *head)


def encoder(batch_first: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, 2, 12, batch_first=batch_first, **options)
    return layer if batch_first else Around(layer, swap, swap)


# A model's input is [N, 5, E]; N samples, and batches of 5 samples make dimensions 0 and 1 equal.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vectors": lambda: nn.Sequential(Apply(lambda x: x.mean(1)), nn.Linear(E, C)),
    "tokens": lambda: pooled(mlp()),
    "last token": lambda: nn.Sequential(mlp(), ReadLast()),
    "tokens flattened": lambda: pooled(Around(mlp(), lambda x: x.flatten(0, 1), rejoin)),
    "sequence first": lambda: pooled(Around(mlp(), swap, swap)),
    "sequence first flattened": lambda: pooled(
        Around(mlp(), lambda x: swap(x).flatten(0, 1), rejoin_swapped)
    ),
    "windows": lambda: pooled(
        Around(
            mlp(),
            halves,
            lambda y, x: rejoin(y, x).unflatten(2, (2, E)).sum(2),
        )
    ),
    "4-d": lambda: pooled(Around(mlp(), lambda x: torch.stack([x, -x], 1), lambda y, _: y.prod(1))),
    "attention": lambda: pooled(Attend("same", True)),
    "attention with weights": lambda: pooled(Attend("same", True, True)),
    "attention, sequence first": lambda: pooled(Attend("same", False)),
    "attention to keys": lambda: pooled(Attend("key", True)),
    "attention to keys, sequence first": lambda: pooled(Attend("key", False)),
    "attention, three inputs": lambda: pooled(Attend("other", True)),
    "attention, other widths": lambda: pooled(Attend("wide", True)),
    "attention, other widths, sequence first": lambda: pooled(Attend("wide", False)),
    "attention in windows": lambda: pooled(
        Around(Attend("same", True), halves, lambda y, x: rejoin(y, x).unflatten(2, (2, E)).sum(2))
    ),
    "attention in windows, sample last": lambda: pooled(
        Around(
            Attend("same", False),
            lambda x: halves(x).unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),
            lambda y, x: y.unflatten(0, (2, -1)).sum(0),
        )
    ),
    "encoder layer": lambda: pooled(encoder(True)),
    "encoder layer, sequence first": lambda: pooled(encoder(False, norm_first=True)),
    "encoder": lambda: pooled(nn.TransformerEncoder(encoder(True), 2)),
    "layer norm": lambda: pooled(nn.LayerNorm(E), nn.Tanh(), nn.LayerNorm(E, bias=False)),
    "layer norm over two dimensions": lambda: pooled(nn.LayerNorm((5, E)), nn.Tanh()),
    "rms norm": lambda: pooled(nn.RMSNorm(E), nn.Tanh(), nn.Linear(E, E)),
    "rms norm of a library": lambda: pooled(T5LayerNorm(), nn.Tanh(), nn.Linear(E, E)),
    "rms norm, sequence first": lambda: pooled(Around(nn.RMSNorm(E), swap, swap)),
    "patches": lambda: convolution(stride=2),
    "patches without bias": lambda: convolution(stride=(2, 1), kernel=(2, 3), bias=False),
    "convolution": lambda: convolution(padding=(1, 2), dilation=2, groups=2),
    "convolution, same size": lambda: convolution(padding="same"),
    "convolution, batch norm, pool": lambda: convolution_and_norm(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, C)
    ),
    "convolution, batch norm, flatten": lambda: convolution_and_norm(
        nn.Flatten(), nn.Linear(6 * 2 * 4, C)
    ),
    "weights [in, out]": lambda: pooled(Conv1D(10), nn.Tanh(), Conv1D(E, 10)),
    "weights [in, out] of vectors": lambda: nn.Sequential(
        Apply(lambda x: x.mean(1)), Conv1D(10), nn.Tanh(), Conv1D(C, 10)
    ),
    "weights [in, out], sequence first": lambda: pooled(Around(Conv1D(E), swap, swap)),
    "a layer used twice": lambda: pooled(Twice(), nn.Tanh()),
    "a layer used by tokens and by their mean": lambda: nn.Sequential(Both(), nn.Linear(E, C)),
    "a norm used twice": lambda: pooled(again(nn.LayerNorm(E)), again(nn.RMSNorm(E))),
    "an encoder used twice": lambda: pooled(again(encoder(True))),
    "a checkpoint used twice": lambda: pooled(again(Checkpointed(mlp()))),
    "layer norm without gain": lambda: pooled(OnlyBias(), nn.Tanh()),
    "embedding": lambda: pooled(Lookup(), nn.Tanh()),
    "embedding with padding": lambda: pooled(Lookup(padding_idx=3), nn.Tanh()),
    "embedding, sequence first": lambda: pooled(Around(Lookup(), swap, swap)),
    "relative position bias": lambda: pooled(RelativeBias(), nn.Tanh()),
    "sorted batch": lambda: pooled(Around(mlp(), sort, unsort)),
    "sorted batch, used twice": lambda: pooled(Around(Again(), sort, unsort_both), nn.Tanh()),
    "sorted batch, shared bias": lambda: pooled(Around(SharedBias(), sort, unsort_both), nn.Tanh()),
    "sorted batch, attention": lambda: pooled(Around(Attend("same", True), sort, unsort)),
    "sorted batch, norm": lambda: pooled(Around(nn.LayerNorm(E), sort, unsort), nn.Tanh()),
    "sorted batch, embedding": lambda: pooled(Around(Lookup(), sort, unsort), nn.Tanh()),
    "sorted batch, convolution": lambda: Around(convolution(stride=2), sort, unsort),
    "packed sequences": lambda: pooled(Around(mlp(), pack, unpack), nn.Tanh()),
    "packed sequences, layer used twice": lambda: pooled(Around(Twice(), pack, unpack), nn.Tanh()),
    "tokens in any order": lambda: pooled(Around(mlp(), route, gather), nn.Tanh()),
    "checkpoint of tokens in any order": lambda: pooled(
        Around(Checkpointed(mlp()), route, gather), nn.Tanh()
    ),
    "checkpoint": lambda: pooled(Checkpointed(mlp()), Checkpointed(encoder(True))),
}


def inputs(count: int = N, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, E, generator=generator, dtype=torch.float64)


def oracle(model: nn.Module, x: Tensor, target: str = "log_prob") -> Scores:
    """sum_x sum_c p_c (d target_c / d theta)^2, one sample and one class at a time, in float64."""
    model = copy.deepcopy(model).double().eval()
    named = named_parameters(model)
    scores = {name: torch.zeros_like(param) for name, param in named.items()}
    for sample in x.double():
        logits = model(sample[None])[0]
        values = logits.log_softmax(0) if target == "log_prob" else logits
        for value, prob in zip(values, logits.softmax(0), strict=True):
            grads = torch.autograd.grad(value, list(named.values()), retain_graph=True)
            for name, grad in zip(named, grads, strict=True):
                scores[name] += prob.detach() * grad.square()
    return scores


def assert_scores(actual: Scores, expected: Scores, floor: float = 1e-12) -> None:
    """Entry by entry, and by norm, within 1e-5; below `floor` of the largest all is noise."""
    assert set(actual) == set(expected)
    for name, score in actual.items():
        assert score.dtype == torch.float32, name
        error = (score.double() - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: {error}"
        largest = max(float(each.max()) for each in expected.values())
        torch.testing.assert_close(
            score.double(), expected[name], rtol=1e-5, atol=floor * largest, msg=name
        )


def batched(x: Tensor, size: int) -> list[Tensor]:
    return list(x.split(size))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", MODELS)
def test_exact_scores_equal_the_loop_of_single_samples(name: str) -> None:
    model, x = MODELS[name]().double(), inputs()
    expected = oracle(model, x)
    for size in (1, 3, 5, N):
        assert_scores(fisher_diag(model, batched(x, size), draws="exact", params="."), expected)


@pytest.mark.parametrize("name", ["encoder layer", "convolution", "vectors"])
def test_the_logit_as_target(name: str) -> None:
    model, x = MODELS[name]().double(), inputs()
    scores = fisher_diag(model, batched(x, 4), target="logit", draws="exact", params=".")
    assert_scores(scores, oracle(model, x, "logit"))


def test_scores_in_float32() -> None:
    model, x = MODELS["encoder layer"](), inputs().float()
    expected = oracle(model, x)
    for name, score in fisher_diag(model, batched(x, 3), draws="exact", params=".").items():
        rtol = REDUCTION_TOLERANCES[torch.float32].rtol
        assert (score.double() - expected[name]).norm() <= rtol * expected[name].norm(), name


def test_scores_under_bfloat16_autocast_and_of_a_bfloat16_model() -> None:
    model, x = MODELS["encoder layer"](), inputs().float()
    expected = oracle(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast_scores = fisher_diag(model, batched(x, 3), draws="exact", params=".")
    stored_scores = fisher_diag(
        model.bfloat16(), batched(x.bfloat16(), 3), draws="exact", params="."
    )
    for scores in (cast_scores, stored_scores):
        for name in ("0.linear1.weight", "0.self_attn.out_proj.weight", "2.bias", "0.norm2.weight"):
            assert scores[name].dtype == torch.float32
            error = (scores[name].double() - expected[name]).norm() / expected[name].norm()
            assert error < 0.1, (name, error)


def test_autocast_of_the_caller_does_not_reach_the_sums_of_squares() -> None:
    model, x = nn.Sequential(mlp(), nn.Linear(E, C)), inputs().float().mean(1)

    def logits_fn(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast(Tensor, model(batch))

    inside = fisher_diag(model, [x], logits_fn=logits_fn, params=".")
    with torch.autocast("cpu", torch.bfloat16):
        outside = fisher_diag(model, [x], params=".")
    assert all(torch.equal(score, outside[name]) for name, score in inside.items())


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("count", [N, 40])
def test_autocast_to_float16_in_layers_that_are_not_scored(inside: bool, count: int) -> None:
    model = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, E), nn.GELU(), nn.Linear(E, C))
    x = inputs(count).float().mean(1)

    def logits_fn(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=inside):
            return cast(Tensor, model(batch)).float()

    expected = oracle(model, x)
    with torch.autocast("cpu", torch.float16, enabled=not inside):
        options: dict[str, Any] = {"logits_fn": logits_fn, "draws": "exact", "params": r"^0\."}
        scores = fisher_diag(model, [x], **options)
        mask = calibrate(model, [x] * 2, 0.5, rounds=1, **options)
    for name, score in scores.items():
        assert (score - expected[name]).norm() < 0.01 * expected[name].norm(), name
    assert mask.iou(Mask.from_scores(scores, 0.5)) > 0.7


def test_padded_sequences_after_a_frozen_layer() -> None:
    """Where nothing needs a gradient yet, torch's encoder would switch to nested tensors."""
    lengths = torch.tensor([5, 3, 4, 1, 5, 2])

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(encoder(True), 2)
            self.head = nn.Linear(E, C)

        def forward(self, x: Tensor) -> Tensor:
            length = x[:, 0, 0].long()
            padding = torch.arange(5) >= length[:, None]
            hidden = self.encoder(x, src_key_padding_mask=padding)
            return self.head(hidden.masked_fill(padding[..., None], 0.0).sum(1))

    model, x = Padded().double(), inputs()
    x[:, 0, 0] = lengths
    expected = oracle(model, x)
    model.encoder.layers[0].requires_grad_(False)
    scores = fisher_diag(model, batched(x, 4), draws="exact", params=".")
    assert_scores(scores, {name: expected[name] for name in scores})
    assert len(scores) == 14


def test_the_order_of_samples_does_not_matter() -> None:
    model, x = MODELS["encoder layer, sequence first"]().double(), inputs()
    scores = fisher_diag(model, batched(x, 5), draws="exact", params=".")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mixed = fisher_diag(model, batched(x[order], 5), draws="exact", params=".")
    assert_scores(mixed, {name: score.double() for name, score in scores.items()})


def test_draws_in_float32_have_equal_shares() -> None:
    model, x = MODELS["encoder layer"](), inputs().float()
    narrow = fisher_diag(model, [x], draws=3, params=".")
    wide = fisher_diag(model.double(), [x.double()], draws=3, params=".")
    rtol = REDUCTION_TOLERANCES[torch.float32].rtol
    for name, score in narrow.items():
        assert (score - wide[name]).norm() <= rtol * wide[name].norm(), name


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", ["encoder layer", "sequence first"])
def test_drawn_labels_do_not_depend_on_the_batch_size(name: str, draws: int) -> None:
    model, x = MODELS[name]().double(), inputs(11)
    alone = fisher_diag(model, batched(x, 1), draws=draws, seed=3, params=".")
    for size in (5, 11):
        together = fisher_diag(model, batched(x, size), draws=draws, seed=3, params=".")
        assert_scores(together, {name: score.double() for name, score in alone.items()})
    other = fisher_diag(model, batched(x, 5), draws=draws, seed=4, params=".")
    assert not torch.equal(other["2.weight"], alone["2.weight"])


def test_the_mean_over_draws_tends_to_the_exact_expectation() -> None:
    model, x = MODELS["vectors"]().double(), inputs(40)
    exact = fisher_diag(model, [x], draws="exact", params=".")["1.weight"]

    def error(draws: int) -> float:
        drawn = fisher_diag(model, [x], draws=draws, params=".")["1.weight"]
        return float((drawn - exact).norm() / exact.norm())

    assert error(256) < 0.05 < error(1)


def test_label_sequences_add_up_their_log_probabilities() -> None:
    model, x = nn.Sequential(mlp(), nn.Linear(E, C)).double(), inputs()
    scores = fisher_diag(model, batched(x, 4), draws=2, seed=7, params=".")
    expected = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for index, sample in enumerate(x):
        for draw in range(2):
            log_probs = model(sample[None])[0].log_softmax(-1)
            uniform = np.random.default_rng([7, 0, index, draw]).random(5)
            labels = [
                int(np.searchsorted(np.cumsum(row.exp().detach().numpy()), u, side="right"))
                for row, u in zip(log_probs, uniform, strict=True)
            ]
            total = log_probs[torch.arange(5), torch.tensor(labels)].sum()
            grads = torch.autograd.grad(total, list(model.parameters()))
            for name, grad in zip(expected, grads, strict=True):
                expected[name] += grad.square() / 2
    assert_scores(scores, expected)


def test_classes_of_no_probability_do_not_disturb() -> None:
    model, x = MODELS["vectors"]().double(), inputs()

    def without_class_0(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).index_fill(1, torch.tensor([0]), -math.inf)

    for draws in ("exact", 4):
        scores = fisher_diag(model, [x], logits_fn=without_class_0, draws=draws, params=".")
        assert float(scores["1.weight"][0].abs().max()) == 0
        assert float(scores["1.weight"][1:].min()) > 0


def test_rows_of_a_fused_projection() -> None:
    model, x = MODELS["attention"]().double(), inputs()
    everything = fisher_diag(model, batched(x, 4), params=".")
    scores = fisher_diag(model, batched(x, 4), params="qk")
    assert scores.rows == {
        "0.attention.in_proj_weight": (0, 2 * E),
        "0.attention.in_proj_bias": (0, 2 * E),
    }
    for name, score in scores.items():
        assert torch.equal(score[: 2 * E], everything[name][: 2 * E])
        assert not score[2 * E :].any()
    mask = calibrate(model, batched(x, 2) * 2, density=0.5, params="qk")
    assert mask.nnz == round(0.5 * 2 * E * (E + 1))
    assert not mask.to_dense("0.attention.in_proj_weight")[2 * E :].any()


def test_tied_and_frozen_parameters() -> None:
    model = MODELS["tokens"]().double()
    model[0][0].requires_grad_(False)
    scores = fisher_diag(model, [inputs()])
    assert set(scores) == {"0.2.weight", "0.2.bias", "2.weight", "2.bias"}


# -- masks


def rounds_of_the_method(
    model: nn.Module, x: Tensor, density: float, rounds: int, soft: float, select: str
) -> list[dict[str, np.ndarray]]:
    """The kept entries after each round: the paper's algorithm in float64, with a full sort."""
    model = copy.deepcopy(model)
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    sizes = [param.numel() for param in base.values()]
    kept = np.ones(sum(sizes), dtype=bool)
    history = []
    for index in range(rounds):
        factors = np.where(kept, 1.0, soft)
        with torch.no_grad():
            parts = np.split(factors, np.cumsum(sizes)[:-1])
            for (name, param), part in zip(model.named_parameters(), parts, strict=True):
                param.copy_(base[name] * torch.from_numpy(part).view_as(param))
        scores = np.concatenate([s.flatten().numpy() for s in oracle(model, x).values()])
        scores = scores if select == "lowest" else -scores
        order = np.argsort(np.where(kept, scores, np.inf), kind="stable")
        kept = np.zeros_like(kept)
        kept[order[: round(density ** ((index + 1) / rounds) * len(kept))]] = True
        parts = np.split(kept, np.cumsum(sizes)[:-1])
        history.append(dict(zip(base, parts, strict=True)))
    return history


@pytest.mark.parametrize("select", ["lowest", "highest"])
@pytest.mark.parametrize(
    ("density", "rounds", "soft"), [(0.1, 4, 0.01), (0.3, 3, 0.1), (0.2, 1, 1.0)]
)
def test_masks_equal_the_method_of_the_paper(
    density: float, rounds: int, soft: float, select: Any
) -> None:
    model, x = MODELS["tokens"]().double(), inputs(10)
    expected = rounds_of_the_method(model, x, density, rounds, soft, select)
    options: dict[str, Any] = {"soft": soft, "select": select, "draws": "exact"}
    mask = calibrate(model, batched(x, 4), density, rounds, **options)
    entries = sum(param.numel() for param in model.parameters())
    assert mask.nnz == round(density * entries)
    assert list(mask.names) == list(expected[-1])
    for name in mask.names:
        assert np.array_equal(mask.to_dense(name).flatten().numpy(), expected[-1][name]), name
    for before, after in itertools.pairwise(expected):
        assert all((after[name] <= before[name]).all() for name in before)
    if rounds > 1:  # neither the rounds nor the damping may be idle
        assert mask != calibrate(model, batched(x, 4), density, 1, **options)
        assert mask != calibrate(model, batched(x, 4), density, rounds, **(options | {"soft": 1.0}))


def test_scores_too_small_for_float32_keep_their_order() -> None:
    model, x = MODELS["tokens"]().double(), inputs(10)
    with torch.no_grad():
        model[2].weight *= 1e-22
    scores = fisher_diag(model, [x], draws="exact", params=".")
    assert not scores["0.0.weight"].any()
    expected = rounds_of_the_method(model, x, 0.3, 2, 0.01, "lowest")[-1]
    mask = calibrate(model, [x], 0.3, 2, draws="exact")
    for name in mask.names:
        assert np.array_equal(mask.to_dense(name).flatten().numpy(), expected[name]), name


def test_a_mask_does_not_depend_on_the_batch_size_and_tells_what_made_it() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs(10)
    model[2].requires_grad_(False)
    mask = calibrate(model, batched(x, 10), 0.2, seed=5)
    assert mask == calibrate(model, batched(x, 3), 0.2, seed=5)
    assert mask != calibrate(model, batched(x, 3), 0.2, seed=6)
    assert mask.metadata == {
        "method": "talos",
        "params": "maskable",
        "passed_over": 2,
        "left_out": {"names": [], "share": 0.0},
        "density": 0.2,
        "rounds": 4,
        "samples": 10,
        "samples_of_rounds": [10, 10, 10, 10],
        "soft": 0.01,
        "select": "lowest",
        "target": "log_prob",
        "draws": 1,
        "labels": "sampled",
        "seed": 5,
        "parity": "paper",
        "torch": str(torch.__version__),
        "stability": None,
        "stability_by_chance": pytest.approx(0.2**0.25, rel=0.02),
    }


@pytest.mark.parametrize("rounds", [1, 2])
def test_stability_is_what_two_half_sets_agree_on(rounds: int) -> None:
    model, x = MODELS["tokens"]().double(), inputs(24)
    options: dict[str, Any] = {"draws": "exact", "rounds": rounds, "soft": 1.0}
    mask = calibrate(model, batched(x, 4), 0.3, **options)
    # With soft=1 no weight is damped, so a half's choice is that of the half alone among the kept.
    kept = (
        calibrate(model, batched(x, 4), 0.3**0.5, draws="exact", rounds=1) if rounds == 2 else None
    )
    halves = []
    for part in (x[:12], x[12:]):
        scores = fisher_diag(model, [part], draws="exact")
        for name, score in scores.items():
            if kept is not None:
                score[~kept.to_dense(name)] = 1e6
        halves.append(Mask.from_scores(scores, 0.3))
    assert mask.metadata["stability"] == (halves[0] & halves[1]).nnz / mask.nnz
    assert mask.metadata["stability_by_chance"] == pytest.approx(0.3 ** (1 / rounds), rel=0.02)
    assert calibrate(model, [x], 0.3, **options).metadata["stability"] is None
    once = calibrate(model, iter(batched(x, 4)), 0.3, rounds=1)
    assert once.metadata["stability"] is None  # nobody knows how many will come


def test_a_mask_is_the_same_with_and_without_halves() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs(20)
    assert calibrate(model, [x], 0.2) == calibrate(model, batched(x, 5), 0.2)


class Clip(nn.Module):
    """A tower as open_clip holds it: embeddings and the projection are parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(E))
        self.blocks = nn.Sequential(mlp(), mlp())
        self.proj = nn.Parameter(torch.randn(E, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x + self.class_embedding).mean(1) @ self.proj


def test_parity_with_the_released_code() -> None:
    model, x = Clip().double(), inputs(10)
    mask = calibrate(model, [x], 0.3, 1, draws="exact", parity="released")
    assert mask.metadata["target"] == "logit"
    assert mask.metadata["soft"] == 0.1
    assert mask.to_dense("class_embedding").all()
    assert mask.to_dense("proj").all()
    ours = calibrate(model, [x], 0.3, 1, draws="exact", target="logit", soft=0.1)
    entries = ours.numel
    assert int(0.3 * entries) != round(0.3 * entries)
    assert mask.nnz - E - E * C == int(0.3 * entries)
    assert ours.nnz == round(0.3 * entries)
    assert (mask & ours).nnz == min(ours.nnz, mask.nnz - E - E * C)
    assert set(ours.names) == set(mask.names) - {"class_embedding", "proj"}


def test_parity_keeps_every_tie() -> None:
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(5 * E, 4), nn.ReLU(), nn.Linear(4, C)),
        inputs(10),
    )
    with torch.no_grad():
        model[1].bias[:2] = -1e4  # dead units: their scores are all 0
    model.double()
    with pytest.warns(UserWarning, match="selected weights have a score of 0"):
        mask = calibrate(model, [x], 0.1, 1, parity="released")
    assert mask.to_dense("1.weight")[:2].all()
    scores = fisher_diag(model, [x], target="logit", params=".")
    assert mask.nnz == sum(int((score == 0).sum()) for score in scores.values()) > 0.1 * mask.numel
    with pytest.raises(TalosValueError, match="parity must be 'paper' or 'released', got 'code'"):
        calibrate(model, [x], parity=cast(Any, "code"))


def test_every_round_draws_labels_of_its_own() -> None:
    model, x = MODELS["tokens"]().double(), inputs(10)
    once = calibrate(model, [x], 0.3, rounds=1, soft=1.0)
    assert calibrate(model, [x], 0.3, rounds=1, soft=0.5) == once  # one round damps nothing
    assert calibrate(model, [x], 0.3, rounds=2, soft=1.0) != once


def test_full_density_selects_all() -> None:
    model = MODELS["tokens"]()
    assert calibrate(model, [inputs(8).float()], 1.0).density == 1.0


def test_progress_comes_after_every_batch() -> None:
    seen: list[CalibrationProgress] = []
    calibrate(
        MODELS["vectors"]().double(), batched(inputs(8), 5), rounds=2, on_progress=seen.append
    )
    assert seen == [
        CalibrationProgress(1, 2, 5, None),
        CalibrationProgress(1, 2, 8, None),
        CalibrationProgress(2, 2, 5, 8),
        CalibrationProgress(2, 2, 8, 8),
    ]


@pytest.mark.parametrize("how", ["returns", "raises", "interrupted"])
def test_nothing_is_left_behind(how: str) -> None:
    model = nn.Sequential(MODELS["encoder layer"](), nn.Dropout(0.5), nn.Linear(C, C))
    model[0][0].self_attn.train(False)
    model[2].weight.requires_grad_(False)
    with torch.no_grad():
        model[2].bias[0] = -0.0
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    values = [param.detach().clone() for param in model.parameters()]
    grads = [param.grad for param in model.parameters()]
    needs = [param.requires_grad for param in model.parameters()]
    flags = [module.training for module in model.modules()]
    functions = (functional.linear, functional.conv2d, torch.layer_norm, torch.rms_norm)
    attend, multiply = functional.multi_head_attention_forward, torch.addmm
    calls = 0

    def logits_fn(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6 and how != "returns":  # in the second round, when weights are damped
            assert not torch.equal(model[0][0].linear1.weight, values[4])
            raise KeyboardInterrupt if how == "interrupted" else RuntimeError("no more")
        return model(batch)

    batches = batched(inputs(8).float(), 2)
    if how == "returns":
        calibrate(model, batches, logits_fn=logits_fn)
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            calibrate(model, batches, logits_fn=logits_fn)
    for param, value, grad in zip(model.parameters(), values, grads, strict=True):
        assert_bit_equal(param, value)
        assert param.grad is grad
        assert bool((grad == 1).all())
    assert [param.requires_grad for param in model.parameters()] == needs
    assert [module.training for module in model.modules()] == flags
    assert functions == (*(functional.linear, functional.conv2d, torch.layer_norm, torch.rms_norm),)
    assert functional.multi_head_attention_forward is attend
    assert torch.addmm is multiply
    assert torch.backends.mha.get_fastpath_enabled()


def test_calibration_works_where_gradients_are_off() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs()
    expected = fisher_diag(model, [x])
    with torch.no_grad():
        scores = fisher_diag(model, [x])
    assert all(torch.equal(score, expected[name]) for name, score in scores.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the compiler warns
def test_wrapped_models_are_scored_as_what_they_wrap() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs()
    expected = fisher_diag(model, [x])
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        scores = fisher_diag(wrapped, [x])
        assert all(torch.equal(score, expected[name]) for name, score in scores.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_that_were_compiled_are_scored_eagerly() -> None:
    model, x = MODELS["encoder layer"]().double(), inputs()
    expected = fisher_diag(model, [x])
    model[2].compile(backend="eager")
    model(x)
    scores = fisher_diag(model, [x])
    assert all(torch.equal(score, expected[name]) for name, score in scores.items())


# -- the self-test


@pytest.mark.parametrize(
    "name", ["encoder layer, sequence first", "convolution", "a layer used twice", "checkpoint"]
)
def test_the_self_test_passes_where_scores_are_exact(name: str) -> None:
    model, x = MODELS[name](), inputs(8).float()
    for batches in ([x], [x[:1], x[1:]]):
        checked = fisher_diag(model, batches, params=".", check=True)
        plain = fisher_diag(model, batches, params=".")
        assert all(torch.equal(score, plain[key]) for key, score in checked.items())
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(model, [x], check=True, params=".")


def test_the_self_test_finds_a_use_that_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS["encoder layer"](), inputs(8).float()
    from talos.calibration.listeners import Sink

    original = Sink.parts

    def forgetful(sink: Sink) -> Any:
        parts = original.fget(sink)
        return () if any(part.name.endswith("linear1.weight") for part in parts) else parts

    monkeypatch.setattr(Sink, "parts", property(forgetful))
    fisher_diag(model, [x], params="linear2")  # no use of another layer is missed
    with pytest.raises(TalosRuntimeError, match=r"linear1\.\w+ must equal those of single"):
        fisher_diag(model, [x], params=".", check=True)


# -- refusals


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
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_scored_exactly_is_refused_by_name(name: str) -> None:
    model, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        fisher_diag(model.double(), [inputs()], params=".")


@pytest.mark.parametrize(
    ("name", "probes"),
    [
        ("encoder layer", 1),
        ("weights [in, out]", 1),  # views: what they flattened is known
        ("windows", 1),
        ("sorted batch", 1),
        ("sorted batch, used twice", 1 + 2 * 3),  # the uses must agree
        ("tokens in any order", 2 * 3),
        ("tokens flattened", 3),  # the inner layer's might be packed
    ],
)
def test_layouts_are_probed_once_where_they_can_be_known(
    name: str, probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = MODELS[name]().double(), inputs(12)
    backward, calls = torch.autograd.grad, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    fisher_diag(model, [part.clone() for part in batched(x, 4)], params=".")
    assert len(calls) == 3 + probes


def test_batch_norm_with_statistics_is_scored_in_eval_mode() -> None:
    norm = Around(nn.BatchNorm1d(E, affine=False), lambda x: x.transpose(1, 2), lambda y, _: y)
    model = nn.Sequential(mlp(), norm, Apply(lambda x: x.mean(2))).double()
    before = norm.layer.running_mean.clone()
    assert_scores(fisher_diag(model, [inputs()], draws="exact"), oracle(model, inputs()))
    assert torch.equal(norm.layer.running_mean, before)
    assert norm.layer.training


def test_scores_that_overflow_are_refused_by_name() -> None:
    model, x = MODELS["vectors"](), inputs().float() * 1e25
    with pytest.raises(TalosValueError, match=r"scores of 1\.weight must be finite"):
        fisher_diag(model, [x], target="logit", params=".")


def exhausted() -> Iterator[Tensor]:
    yield inputs()


class OnceOnly:
    """Iterable, but empty from the second time on."""

    def __init__(self) -> None:
        self.batches = exhausted()

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "density 0": ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
    "density 2": ({"density": 2.0}, "density must lie in"),
    "density NaN": ({"density": math.nan}, "density must lie in"),
    "density of nothing": ({"density": 1e-6}, "no weight selected"),
    "rounds": ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
    "soft": ({"soft": 0.0}, r"soft must lie in \(0, 1\], got 0.0"),
    "rounds float": ({"rounds": 2.0}, "rounds must be an integer of at least 1, got 2.0"),
    "rounds bool": ({"rounds": True}, "rounds must be an integer of at least 1, got True"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "draws": ({"draws": 0}, "draws must be a number of labels a sample or 'exact', got 0"),
    "draws word": ({"draws": "all"}, "got 'all'"),
    "target": ({"target": "loss"}, "target must be 'log_prob' or 'logit', got 'loss'"),
    "select": ({"select": "top"}, "select must be 'lowest' or 'highest', got 'top'"),
    "params": ({"params": "nothing"}, "params must match a parameter"),
    "no batches": ({"batches": []}, "at least one sample, got 0"),
    "a generator": ({"batches": exhausted()}, "batches must be re-iterable, got an iterator"),
    "once only": ({"batches": OnceOnly()}, "none in round 2 after 6 samples"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name: str) -> None:
    options, message = BAD_ARGUMENTS[name]
    with pytest.raises(TalosValueError, match=message):
        calibrate(MODELS["vectors"]().double(), **({"batches": [inputs()]} | options))


def test_batches_made_in_inference_mode_are_refused() -> None:
    model = MODELS["tokens"]()
    with torch.inference_mode():
        x = inputs(8).float()
    for run in (fisher_diag, calibrate):
        with pytest.raises(TalosRuntimeError, match=r"under torch\.inference_mode; clone\(\)"):
            run(model, [x])


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_integers_of_any_type(integer: Callable[[int], Any], tmp_path: Path) -> None:
    model, x = MODELS["vectors"](), inputs(8).float()
    mask = calibrate(model, [x], np.float64(0.5), integer(2), draws=integer(3), seed=integer(4))
    assert mask == calibrate(model, [x], 0.5, 2, draws=3, seed=4)
    mask.save(tmp_path / "mask.safetensors")
    assert Mask.load(tmp_path / "mask.safetensors").metadata["draws"] == 3


def test_exact_expectations_over_label_sequences_are_refused() -> None:
    with pytest.raises(TalosValueError, match=r"draws must be a number for logits \[B, T, V\]"):
        fisher_diag(nn.Linear(E, C).double(), [inputs()], draws="exact")


def test_few_samples_and_equal_scores_warn() -> None:
    model = MODELS["vectors"]().double()
    with pytest.warns(UserWarning, match="a mask from 6 samples is mostly noise"):
        calibrate(model, [inputs()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [inputs(8)])
    ones = torch.ones(8, E).double()
    with pytest.warns(UserWarning, match="all scores are equal: the first weights are selected"):
        mask = calibrate(nn.Linear(E, 1).double(), [ones], density=0.5, target="logit")
    assert mask.to_dense("weight").tolist() == [[True] * 4 + [False] * 4]


def test_weights_that_no_gradient_reaches_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is dead
    with pytest.warns(UserWarning, match=r"\d+ of the \d+ selected weights have a score of 0"):
        calibrate(model, [torch.randn(16, 4).double()], density=0.5)


def test_damping_that_wakes_dead_units_does_not_hide_them() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-3.0)  # a hundredth of it lets inputs through
    x = torch.randn(16, 4).double() / 4
    assert int((fisher_diag(model, [x])["0.weight"] == 0).sum()) == 32
    with pytest.warns(UserWarning, match=r"\d+ of the \d+ selected weights have a score of 0"):
        calibrate(model, [x], density=0.1)


def test_a_single_class_is_refused() -> None:
    model = nn.Linear(E, 1).double()
    with pytest.raises(TalosValueError, match=r"at least two classes, got \[8, 1\]"):
        calibrate(model, [inputs(8).mean(1)])
    assert calibrate(model, [inputs(8).mean(1)], density=0.5, target="logit").nnz == 4


def test_batches_in_the_forms_that_loops_use() -> None:
    model, x = MODELS["vectors"]().double(), inputs()
    expected = fisher_diag(model, [x])

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor) -> Any:
            return OrderedDict(logits=self.model(inputs))

    labels = torch.zeros(N, dtype=torch.long)
    forms = (
        fisher_diag(model, [(x, labels)]),
        fisher_diag(model, [{"x": x}], logits_fn=lambda model, batch: model(batch["x"])),
        fisher_diag(
            Wrapped(),
            [{"inputs": x, "labels": labels}],
            logits_fn=lambda model, batch: model(batch["inputs"])["logits"],
        ),
    )
    for scores in forms:
        for (_, score), other in zip(scores.items(), expected.values(), strict=True):
            assert torch.equal(score, other)
