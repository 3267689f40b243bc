"""Models whose weights are used in many ways, and the scores that they must have."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from talos.names import named_parameters

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


def by_name(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, w)


def changed_in_place(x: Tensor, table: Tensor) -> Tensor:
    return functional.embedding(x.argmax(-1), table).mul_(x).add_(1.0)


def two_paddings(x: Tensor, table: Tensor) -> Tensor:
    ids = x.argmax(-1)
    found = functional.embedding(ids, table, padding_idx=2)
    return found * x + functional.embedding(ids.flip(1), table, padding_idx=-1)


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
    "attention, three inputs": lambda: pooled(Attend("other", True)),
    "attention, other widths": lambda: pooled(Attend("wide", True)),
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
    "a layer used twice": lambda: pooled(Twice(), nn.Tanh()),
    "a layer used by tokens and by their mean": lambda: nn.Sequential(Both(), nn.Linear(E, C)),
    "a norm used twice": lambda: pooled(again(nn.LayerNorm(E)), again(nn.RMSNorm(E))),
    "a checkpoint used twice": lambda: pooled(again(Checkpointed(mlp()))),
    "layer norm without gain": lambda: pooled(OnlyBias(), nn.Tanh()),
    "embedding": lambda: pooled(Lookup(), nn.Tanh()),
    "embedding with padding": lambda: pooled(Lookup(padding_idx=3), nn.Tanh()),
    "embedding, sequence first": lambda: pooled(Around(Lookup(), swap, swap)),
    "relative position bias": lambda: pooled(RelativeBias(), nn.Tanh()),
    "sorted batch": lambda: pooled(Around(mlp(), sort, unsort)),
    "sorted batch, used twice": lambda: pooled(Around(Again(), sort, unsort_both), nn.Tanh()),
    "sorted batch, convolution": lambda: Around(convolution(stride=2), sort, unsort),
    "packed sequences": lambda: pooled(Around(mlp(), pack, unpack), nn.Tanh()),
    "packed sequences, layer used twice": lambda: pooled(Around(Twice(), pack, unpack), nn.Tanh()),
    "tokens in any order": lambda: pooled(Around(mlp(), route, gather), nn.Tanh()),
    "checkpoint": lambda: pooled(Checkpointed(mlp()), Checkpointed(encoder(True))),
    "torch's names": lambda: pooled(
        Calls(
            by_keywords,
            w=torch.randn(E, E),
            b=torch.randn(E),
            table=torch.randn(E, E),
            gain=torch.rand(E) + 0.5,
        )
    ),
    "functions imported by name": lambda: pooled(Calls(by_name, w=torch.randn(E, E)), nn.Tanh()),
    "embedding changed in place": lambda: pooled(
        Calls(changed_in_place, table=torch.randn(E, E)), nn.Tanh()
    ),
    "two paddings of a table": lambda: pooled(
        Calls(two_paddings, table=torch.randn(E, E)), nn.Tanh()
    ),
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
