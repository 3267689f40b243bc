"""The forms of scoring one batch that are measured beside each other: the Fisher's diagonal of all
maskable parameters of a transformer tower, fp32, from given labels.

Every form takes a `Scored` and a batch and returns sums over samples of squared gradients of the
log-probability of each sample's label, by name. The labels were drawn once and lie in the batch.

- `plain`: no scores: the gradients that an ordinary training step computes. What scoring stands on.
- `loop`: forward and backward of one sample after the other. The definition.
- `retained`: the scheme of the method's released code: one forward of the batch, then a backward
  of each sample's loss through the graph of all, its squares copied to the host and added there.
- `vectorised`: `vmap(grad)` of torch.func.
- `hooked`: inputs and output gradients of every layer by hooks; each sample's weight gradient by an
  einsum over its tokens.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import talos
from benches import measure
from benches.results import OURS
from benches.workload import Answering, Batch, inputs_of, library_model
from talos.params import select_parameters

Scores = dict[str, Tensor]


class Scored(Answering):
    """A tower and a frozen head: a batch to the log-probability of each sample's labels, fp32 [B].

    Only the maskable parameters require a gradient, in every form.
    """

    autocast = False
    """Whether it runs under bf16 autocast."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__(tower)
        candidates = select_parameters(self)
        for name, param in self.named_parameters():
            param.requires_grad_(name in candidates)

    def forward(self, batch: Batch) -> Tensor:
        device = batch["labels"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            logits = self.logits(batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
        return chosen.flatten(1).sum(1) if chosen.dim() > 1 else chosen

    def scored(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.named_parameters() if each.requires_grad}


def with_labels(model: Scored, inputs: Batch) -> Batch:
    """Return the batch with labels drawn from the model."""
    with torch.no_grad():
        logits = model.logits(inputs)
    return inputs | {"labels": torch.distributions.Categorical(logits=logits).sample()}


def build(
    name: str, layers: int | None, batch_size: int, device: torch.device
) -> tuple[Scored, Batch]:
    """Return a model of `SHAPES` with some or all of its layers, and a batch; always the same."""
    torch.manual_seed(0)
    with device:
        tower: Any = library_model(name, layers)
        if name == "t5-large":
            # At T5's own scale an untrained decoder is all but sure of the token it just read, and
            # the gradients of a log-probability near 0 are rounding.
            tower.shared.weight.data.mul_(0.25)
        model = Scored(tower)
        return model, with_labels(model, inputs_of(name, batch_size))


def samples(batch: Batch) -> Iterator[Batch]:
    """Yield batches of one."""
    for row in range(len(batch["labels"])):
        yield {name: each[row : row + 1] for name, each in batch.items()}


def log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits [B, 1] whose only class is the given label: talos takes their gradient."""
    return model(batch)[:, None]


def class_logits(model: Scored, batch: Batch) -> Tensor:
    """Return logits over all classes, from which a calibration draws its labels."""
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=model.autocast):
        return model.logits(batch)


def ours(model: Scored, batch: Batch) -> Scores:
    return talos.fisher_diag(model, [batch], logits_fn=log_probs, target="logit")


def further_batches(model: Scored, batch: Batch, count: int) -> list[float]:
    """Return the seconds of each batch after the first of one call, whose set-up is not in them."""
    ends: list[float] = []
    talos.fisher_diag(
        model,
        [batch] * (count + 1),
        logits_fn=log_probs,
        target="logit",
        on_progress=lambda progress: ends.append(measure.clock()),
    )
    return [end - start for start, end in pairwise(ends)]


def plain(model: Scored, batch: Batch) -> Scores:
    params = model.scored()
    grads = torch.autograd.grad(model(batch).mean(), list(params.values()))
    return dict(zip(params, grads, strict=True))


def loop(model: Scored, batch: Batch) -> Scores:
    params = model.scored()
    scores = {name: torch.zeros_like(param) for name, param in params.items()}
    for sample in samples(batch):
        grads = torch.autograd.grad(model(sample).sum(), list(params.values()))
        for score, each in zip(scores.values(), grads, strict=True):
            score.addcmul_(each, each)
    return scores


def retained(model: Scored, batch: Batch) -> Scores:
    params = model.scored()
    scores = {name: torch.zeros(param.shape) for name, param in params.items()}
    losses = model(batch)
    for row, loss in enumerate(losses):
        more = row + 1 < len(losses)
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=more)
        for score, each in zip(scores.values(), grads, strict=True):
            score += each.square().cpu()
    return scores


def vectorised(model: Scored, batch: Batch) -> Scores:
    params = {name: param.detach() for name, param in model.scored().items()}

    def loss(params: Scores, sample: Batch) -> Tensor:
        one = {name: each[None] for name, each in sample.items()}
        return functional_call(model, params, (one,)).sum()

    with sdpa_kernel(SDPBackend.MATH):  # vmap would run the fused kernels a sample at a time
        grads = vmap(grad(loss), in_dims=(None, 0), randomness="error")(params, batch)
    return {name: each.square_().sum(0) for name, each in grads.items()}


def hooked(model: Scored, batch: Batch) -> Scores:
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if any(each.requires_grad for each in module.parameters(recurse=False))
    }

    def note(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = layer, args[0].detach(), output

    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        losses = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for _, _, output in seen.values()]
    scores: Scores = {}
    # With respect to outputs alone, no weight gradient is computed in vain.
    grads = torch.autograd.grad(losses.sum(), outputs)
    for (name, (layer, x, _)), dy in zip(seen.items(), grads, strict=True):
        for param, each in sample_gradients(layer, x, dy).items():
            scores[f"{name}.{param}"] = each.float().square_().sum(0)
    return scores


def sample_gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the gradients [B, ...] of a layer's weight and bias."""
    weight, norm = layer.weight, "Norm" in type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        x = functional.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
        dy = dy.flatten(2).transpose(1, 2)
    if isinstance(layer, nn.LayerNorm):
        x = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    elif norm:  # T5's
        x = functional.rms_norm(x, weight.shape, eps=layer.variance_epsilon)
    x, dy = (each.to(dy.dtype).flatten(1, -2) for each in (x, dy))  # [B, T, .]
    if norm:
        grads = {"weight": (dy * x).sum(1)}
    else:
        grads = {"weight": torch.einsum("bto,bti->boi", dy, x).view(-1, *weight.shape)}
    if getattr(layer, "bias", None) is not None:
        grads["bias"] = dy.sum(1)
    return grads


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` of two linear layers, which hooks can see, over the same weights."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width, self.heads = attention.embed_dim, attention.num_heads
        with torch.device("meta"):
            self.in_proj = nn.Linear(width, 3 * width)
            self.out_proj = nn.Linear(width, width)
        self.in_proj.weight = attention.in_proj_weight
        self.in_proj.bias = attention.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.parameters()

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """Self-attention of [B, T, D]; keys and values are those of `x`, there is no mask."""
        parts = self.in_proj(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


def split(model: Scored) -> Scored:
    """Return a copy whose attention consists of linear layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, SplitAttention(module))
    return model


@dataclass(frozen=True)
class Form:
    """How a batch is scored, and what is done to the model once, before.

    Attributes:
        score: a model and a batch to scores.
        prepare: a model to the one that `score` takes.
        scores: whether scores come out, and not an ordinary gradient.
    """

    score: Callable[[Scored, Batch], Scores]
    prepare: Callable[[Scored], Scored] = lambda model: model
    scores: bool = True


FIRST = f"{OURS}, first batch"

FORMS: dict[str, Form] = {
    OURS: Form(ours),  # timed by `further_batches`
    FIRST: Form(ours),
    "(p) plain forward and backward": Form(plain, scores=False),
    "(a) per-sample loop": Form(loop),
    "(b) released scheme": Form(retained),
    "(c) vmap(grad)": Form(vectorised),
    "(e) hooks and einsum": Form(hooked, split),
}


def relative_error(found: Scores, wanted: Scores) -> float:
    """Return the largest relative distance, by norm, of a tensor found from the one wanted.

    Where a gradient is 0 but for rounding (the bias of keys), 1e-6 of all scores' norm is allowed.
    """
    total = math.sqrt(sum(float(each.double().square().sum()) for each in wanted.values()))
    errors = []
    for name, each in found.items():
        expected = wanted[name.replace(".in_proj.", ".in_proj_")].double()
        distance = (each.to(expected.device).double() - expected).norm()
        errors.append(float(distance) / (float(expected.norm()) + 1e-6 * total))
    return max(errors)


def exact(model: Scored, batch: Batch) -> Scores:
    """Return the loop's scores in float64, with which every form is compared."""
    wide = {n: each.double() if each.is_floating_point() else each for n, each in batch.items()}
    return loop(copy.deepcopy(model).double(), wide)
