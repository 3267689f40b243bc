"""`talos.methods`: each trains real architectures, and is what its equations say."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from talos.batches import default_logits
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.methods import (
    METHODS,
    Linearized,
    LinearizedModel,
    LLora,
    Lota,
    Magnitude,
    Method,
    Random,
    Talos,
)
from talos.methods.l_lora import first_factor
from talos.names import named_parameters
from talos.params import select_parameters
from talos.task_vectors import TaskVector
from talos.training import FineTuneStep, fine_tune, fine_tune_steps
from tests.architecture.test_families import FAMILIES, cast, logits_of
from tests.cases import assert_bit_equal

CLIP, T5, BERT = (
    *("open_clip ViT-B-32 visual", "T5ForConditionalGeneration v1.0"),
    "BertForSequenceClassification",
)
TIMM, GPT2 = "timm VisionTransformer", "GPT2ForSequenceClassification"
ARCHITECTURES = (CLIP, T5, BERT)

# Their routers compute in float32, whatever the model's dtype is.
ROUNDED = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")


def model_and_data(name: str) -> tuple[nn.Module, list[Any]]:
    """A small model with a frozen head, in evaluation mode, and one batch with labels."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.model(family.attentions[-1])
    batch = family.batch(6)
    batch.setdefault("labels", torch.arange(6) % 3)
    for key, param in model.named_parameters():
        param.requires_grad_("classifier" not in key)
    return model, [batch]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    logits = default_logits(model, batch)
    return F.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten())


def settings(model: nn.Module, method: str) -> dict[str, Any]:
    """The method with what it needs, and a rate at which it learns in a few steps."""
    generator = torch.Generator().manual_seed(1)
    if method == "talos":
        chosen = select_parameters(model)
        drawn = {n: torch.rand(s.param.shape, generator=generator) < 0.1 for n, s in chosen.items()}
        return {"method": Talos(Mask.from_dense(drawn)), "lr": 1e-2}
    sparse = method in ("random", "magnitude", "l_lora", "lota")
    return {"method": method, "lr": 1e-2 if sparse else 1e-3}


def train(model: nn.Module, data: Any, **kwargs: Any) -> TaskVector:
    torch.manual_seed(5)  # dropout
    return fine_tune(model, data, **{"steps": 6, "loss_fn": loss_of, **kwargs})


def outside(model: nn.Module) -> list[Any]:
    """All that a training may use and must give back."""
    return [
        [(name, id(param), param.requires_grad, param.grad) for name, param in
         model.named_parameters()],
        [(name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
          len(module._backward_hooks)) for name, module in model.named_modules()],
        [(name, buffer.tolist()) for name, buffer in model.named_buffers()],
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    ]  # fmt: skip


def evaluated(model: nn.Module, method: str, base: nn.Module) -> nn.Module:
    """What a method's tuned weights are evaluated on."""
    if method != "linearized":
        return model
    initial = {n: p.detach() for n, p in named_parameters(base).items()}
    return LinearizedModel(model, base=initial)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_learns_and_gives_everything_back(name: str, method: str) -> None:
    model, data = model_and_data(name)
    next(model.children()).train()
    base, before = copy.deepcopy(model), outside(model)
    vector = train(model, data, **settings(model, method))
    assert outside(model) == before
    model.eval()
    tuned = evaluated(model, method, base.eval())
    with torch.no_grad():
        assert loss_of(tuned, data[0]) < 0.99 * loss_of(base, data[0])
    assert vector.metadata["method"] == method
    restored = copy.deepcopy(base)
    vector.apply_(restored)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        outputs = (default_logits(each, data[0]) for each in
                   (evaluated(restored, method, base), tuned))  # fmt: skip
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    ends = []
    for _ in range(2):
        model, data = model_and_data(BERT)
        vector = train(model, data, steps=2, **settings(model, method))
        ends.append((vector, model.state_dict()))
    assert ends[0][0] == ends[1][0]
    for key, value in ends[0][1].items():
        assert_bit_equal(value, ends[1][1][key])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["closed", "raised"])
def test_a_run_that_ends_early_gives_everything_back(method: str, how: str) -> None:
    model, data = model_and_data(BERT)
    before, calls = outside(model), 0

    def loss(module: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if how == "raised" and calls == 2:
            raise ValueError("broken batch")
        return loss_of(module, batch)

    events = fine_tune_steps(model, data, steps=9, loss_fn=loss, **settings(model, method))
    next(events)
    with nullcontext() if how == "closed" else pytest.raises(ValueError, match="broken"):
        events.close() if how == "closed" else next(events)
    model.zero_grad()  # those of the last step stay, as in any loop
    assert outside(model) == before


def expansion(
    model: nn.Module, logits: Callable[[nn.Module], Tensor], moved: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """f, J moved by differentiating a vector-Jacobian product, and g -> J^T g."""
    params = {name: param for name, param in model.named_parameters() if name in moved}
    with sdpa_kernel(SDPBackend.MATH):
        output = logits(model)
    dummy = torch.zeros_like(output, requires_grad=True)
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True}
    pulled = torch.autograd.grad(output, list(params.values()), dummy, **options)
    pairs = [(g, moved[n]) for n, g in zip(params, pulled, strict=True) if g is not None]
    (pushed,) = torch.autograd.grad([g for g, _ in pairs], dummy, [v for _, v in pairs],
                                    retain_graph=True)  # fmt: skip

    def transposed(cotangent: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(output, list(params.values()), cotangent, retain_graph=True,
                                    allow_unused=True)  # fmt: skip
        return {n: torch.zeros_like(params[n]) if g is None else g
                for n, g in zip(params, found, strict=True)}  # fmt: skip

    return output.detach(), pushed.detach(), transposed


def moved_by(model: nn.Module, scale: float = 0.02) -> dict[str, Tensor]:
    """Moves the trainable weights, and tells by how much."""
    steps = {n: scale * torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, step in steps.items():
            model.get_parameter(name).add_(step)
    return steps


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ROUNDED])
def test_linearized_is_the_first_order_expansion(name: str) -> None:
    """In every family of models, against two reverse passes in float64."""
    family = FAMILIES[name]
    model = family.model(family.attentions[-1]).double()
    batch = cast(family.batch(3), torch.float64)
    base, linear = copy.deepcopy(model), LinearizedModel(model, logits_of)
    moved = moved_by(model)
    value, pushed, transposed = expansion(base, lambda each: logits_of(each, batch), moved)
    found = linear(batch)
    torch.testing.assert_close(found - value, pushed, rtol=1e-5, atol=1e-9)
    assert (logits_of(model, batch) - found).abs().max() > 1e-3 * pushed.abs().max()
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    for key, expected in transposed(cotangent).items():
        grad = model.get_parameter(key).grad
        grad = torch.zeros_like(expected) if grad is None else grad  # what is never used
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


def test_dropout_draws_one_mask_for_value_and_change() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    inputs = torch.randn(4, 6, dtype=torch.float64)
    base, linear = copy.deepcopy(model), LinearizedModel(model)
    moved = moved_by(model)
    torch.manual_seed(7)
    found = linear(inputs)
    torch.manual_seed(7)
    value, pushed, _ = expansion(base, lambda each: each(inputs), moved)
    torch.testing.assert_close(found, value + pushed)


def test_an_expansion_is_called_with_a_batch() -> None:
    linear = LinearizedModel(nn.Linear(6, 3))
    with pytest.raises(TalosTypeError, match="one batch, got 0 and input_ids, labels;"):
        linear(input_ids=torch.zeros(1, 6), labels=torch.zeros(1))


def test_what_needs_no_gradient_is_no_part_of_the_expansion() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[2].requires_grad_(False)
    linear, inputs = LinearizedModel(model), torch.randn(4, 6, dtype=torch.float64)
    assert list(linear.base) == ["0.weight", "0.bias"]
    before = linear(inputs)
    with torch.no_grad():
        model[2].bias.add_(1.0)
    torch.testing.assert_close(linear(inputs), before + 1.0)


def test_statistics_of_batches_are_not_updated() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    linear = LinearizedModel(model)
    moved_by(model)
    linear(torch.randn(8, 6)).sum().backward()
    for name, buffer in model.named_buffers():
        assert_bit_equal(buffer, kept[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [CLIP, BERT])
def test_without_a_graph_it_is_the_same(
    name: str, context: Callable[[], AbstractContextManager[None]]
) -> None:
    """Inference mode would drop the derivative without a word."""
    model, (batch,) = model_and_data(name)
    linear = LinearizedModel(model)
    moved_by(model)
    expected = linear(batch)
    with context():
        found = linear(batch)
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert not found.requires_grad
    assert_bit_equal(found, expected)


def test_attention_without_a_graph_takes_no_path_that_has_no_derivative() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer).double().eval()
    inputs = torch.randn(2, 3, 8, dtype=torch.float64)
    base, linear = copy.deepcopy(model), LinearizedModel(model)
    moved = moved_by(model)
    value, pushed, _ = expansion(base, lambda each: each(inputs), moved)
    with torch.no_grad():
        torch.testing.assert_close(linear(inputs) - value, pushed)


def test_theta_0_moves_with_the_module_and_may_be_shared() -> None:
    model = nn.Linear(3, 2)
    shared = {name: param.detach().clone() for name, param in model.named_parameters()}
    linear = LinearizedModel(model, base=shared)
    assert all(linear.base[name] is tensor for name, tensor in shared.items())
    assert not linear.state_dict().keys() - {"model.weight", "model.bias"}
    state = {name: value + 1.0 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # other parameters are theta now
    torch.testing.assert_close(linear(torch.ones(1, 3)), model(torch.ones(1, 3)))
    linear.double()
    assert {tensor.dtype for tensor in linear.base.values()} == {torch.float64}
    assert linear(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64


def test_autocast_reaches_the_expansion() -> None:
    model, (batch,) = model_and_data(BERT)
    linear = LinearizedModel(model)
    moved_by(model)
    expected = linear(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(batch)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_linearized_takes_the_logits_function_and_the_default_loss() -> None:
    model, (batch,) = model_and_data(BERT)

    def logits(each: nn.Module, batch: Any) -> Tensor:
        return 2.0 * each(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    before = F.cross_entropy(logits(model, batch), batch["labels"]).item()
    model.train(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    first, *_ = fine_tune_steps(model, [batch], method=Linearized(), steps=2, logits_fn=logits)
    assert first.loss == pytest.approx(before, rel=1e-5)


def adapted(name: str) -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """Weight, role and the part of it, [out, in], of each query and value projection."""
    model, _ = model_and_data(name)
    found: list[tuple[str, str, Callable[[Tensor], Tensor]]] = []
    for key in model.state_dict():
        if key.endswith(("in_proj_weight", "qkv.weight")):
            found.append((key, "query", lambda w: w[: len(w) // 3]))
            found.append((key, "value", lambda w: w[2 * len(w) // 3 :]))
        elif key.endswith("c_attn.weight"):
            found.append((key, "query", lambda w: w.T[: w.shape[1] // 3]))
            found.append((key, "value", lambda w: w.T[2 * w.shape[1] // 3 :]))
        elif key.endswith(("query.weight", ".q.weight")):
            found.append((key, "query", lambda w: w))
        elif key.endswith(("value.weight", ".v.weight")):
            found.append((key, "value", lambda w: w))
    return found


@pytest.mark.parametrize("name", [*ARCHITECTURES, TIMM, GPT2])
def test_l_lora_is_lora_with_each_layer_expanded(name: str) -> None:
    """Against A and B that autograd trains, in W + s (B0 A0 + B0 dA + dB A0)."""
    method = LLora(rank=4, lora_alpha=8.0, seed=3)
    model, data = model_and_data(name)
    places = adapted(name)
    assert len(places) >= 4
    base = {key: value.clone() for key, value in model.state_dict().items()}
    twin = copy.deepcopy(model).train()
    a, b, a0 = {}, {}, {}
    for key, role, part in places:
        out, inputs = part(base[key]).shape
        a0[key, role] = first_factor(key, role, (4, inputs), seed=3)
        a[key, role] = nn.Parameter(a0[key, role].clone())
        b[key, role] = nn.Parameter(torch.zeros(out, 4))
    optimizer = torch.optim.AdamW([*a.values(), *b.values()], weight_decay=0.0)

    def weights() -> dict[str, Tensor]:
        found = {key: base[key].clone() for key, _, _ in places}
        for key, role, part in places:
            b0 = torch.zeros_like(b[key, role])
            first = a0[key, role]
            change = b0 @ first + b0 @ (a[key, role] - first) + (b[key, role] - b0) @ first
            part(found[key]).add_(2.0 * change)
        return found

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = twin

        def forward(self, batch: Any) -> Tensor:
            return loss_of(self.model, batch)

    torch.manual_seed(5)
    norms = []
    for step in range(1, 4):
        optimizer.zero_grad()
        swapped = {f"model.{key}": value for key, value in weights().items()}
        torch.func.functional_call(Loss(), swapped, (data[0],)).backward()
        assert all(not bool(each.grad.any()) for each in a.values())  # A moves nothing
        norms.append(nn.utils.clip_grad_norm_(b.values(), 0.5).item())
        optimizer.param_groups[0]["lr"] = 1e-2 * step / 3
        optimizer.step()
    torch.manual_seed(5)
    events: list[FineTuneStep] = []
    vector = fine_tune(model, data, method=method, steps=3, warmup=3, lr=1e-2, max_grad_norm=0.5,
                       loss_fn=loss_of, on_step=events.append)  # fmt: skip
    assert [event.grad_norm for event in events] == pytest.approx(norms, rel=1e-3)
    expected = {key: value.detach() for key, value in weights().items()}
    tuned = model.state_dict()
    for key in base:
        if key not in expected:
            assert_bit_equal(tuned[key], base[key])
            continue
        change = (tuned[key] - base[key]).abs().max()
        torch.testing.assert_close(tuned[key], expected[key], rtol=0, atol=2e-3 * float(change))
    mask = vector.mask
    for key in expected:
        chosen = torch.zeros_like(base[key], dtype=torch.bool)
        for other, _, part in places:
            if other == key:
                part(chosen).fill_(True)
        assert torch.equal(mask.to_dense(key), chosen)
        assert_bit_equal(tuned[key][~chosen], base[key][~chosen])


def test_l_lora_of_two_tasks_share_their_first_factor() -> None:
    vectors = []
    for shift in (0, 1):
        model, (batch,) = model_and_data(BERT)
        data = [{**batch, "labels": (batch["labels"] + shift) % 3}]
        vectors.append(train(model, data, method=LLora(rank=2), lr=1e-2))
    key = "bert.encoder.layer.0.attention.self.query.weight"
    places = [n for n in vectors[0].mask.names for _ in range(vectors[0].mask.indices[n].nnz)]
    where = torch.tensor([place == key for place in places])
    deltas = [vector.values[where].view(32, 32) for vector in vectors]
    assert not torch.allclose(deltas[0], deltas[1], rtol=0.1)
    rows = torch.linalg.qr(first_factor(key, "query", (2, 32), seed=0).T).Q  # [in, r]
    for delta in deltas:
        assert (delta - delta @ rows @ rows.T).norm() < 1e-3 * delta.norm()


def test_l_lora_of_bfloat16_rounds_once() -> None:
    """Steps far below the weights' precision add up, for they are added to B."""
    half = nn.MultiheadAttention(16, 2).bfloat16()
    whole = copy.deepcopy(half).float()
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    phases = [LLora().start(each, hyper, default_logits) for each in (half, whole)]
    for _ in range(30):
        gradient = torch.randn(48, 16).bfloat16().abs()  # one direction
        half.in_proj_weight.grad, whole.in_proj_weight.grad = gradient, gradient.float()
        for phase in phases:
            phase.clip(1.0)
            phase.step()
    assert_bit_equal(half.in_proj_weight.detach(), whole.in_proj_weight.detach().bfloat16())
    assert not torch.equal(phases[0].task_vector().values, torch.zeros(512))


def test_lota_trains_what_moved_most_and_nothing_else() -> None:
    found, data = model_and_data(BERT)
    base = copy.deepcopy(found)
    events, vector = train_all(found, data, method=Lota(density=0.1))
    assert [event.step for event in events] == list(range(1, 9))
    assert {event.steps for event in events} == {8}
    assert [event.lr for event in events[:4]] == [event.lr for event in events[4:]]
    full = copy.deepcopy(base)
    train_all(full, data, method="nonlinear")
    moved = torch.cat([
        (p - q).detach().abs().flatten()
        for p, q in zip(full.parameters(), base.parameters(), strict=True) if p.requires_grad
    ])  # fmt: skip
    count = round(0.1 * len(moved))
    chosen = torch.zeros(len(moved), dtype=torch.bool)
    chosen[moved.topk(count).indices] = True
    assert moved[chosen].min() > moved[~chosen].max()  # there is one answer
    mask = vector.mask
    ours = torch.cat([mask.to_dense(n).flatten() for n, p in base.named_parameters()
                      if p.requires_grad])  # fmt: skip
    assert torch.equal(ours, chosen)
    for (name, before), after in zip(base.named_parameters(), found.parameters(), strict=True):
        kept = ~mask.to_dense(name) if name in mask else torch.ones_like(before) > 0
        assert_bit_equal(after.detach()[kept], before.detach()[kept])
    assert bool(vector.values.any())


def train_all(
    model: nn.Module, data: Any, method: Method | str
) -> tuple[list[FineTuneStep], TaskVector]:
    torch.manual_seed(5)
    events: list[FineTuneStep] = []
    vector = fine_tune(model, data, method=method, steps=4, lr=1e-3, loss_fn=loss_of,
                       on_step=events.append)  # fmt: skip
    return events, vector


def test_the_second_training_of_lota_begins_at_the_base() -> None:
    """Without dropout it equals training the same mask by itself, bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    inputs = torch.randn(3, 12, 8)
    data = list(zip(inputs, inputs[..., :3].argmax(-1), strict=True))
    other = copy.deepcopy(model)
    vector = fine_tune(model, data, method="lota", steps=5, lr=1e-2)
    fine_tune(other, data, vector.mask, steps=5, lr=1e-2)
    for key, value in model.state_dict().items():
        assert_bit_equal(value, other.state_dict()[key])


class Average(nn.Module):
    """Subtracts a running mean, a buffer that each forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.mean = 0.9 * self.mean + y.detach().mean(0)
        return y * (1 + self.mean)


def test_the_second_training_of_lota_begins_with_the_buffers_of_the_first() -> None:
    model = Average()
    other, mean = copy.deepcopy(model), model.mean
    data = [(torch.randn(12, 8), torch.arange(12) % 3)]
    with pytest.warns(UserWarning, match="buffers moved"):
        vector = fine_tune(model, data, method="lota", steps=5, lr=1e-2)
    with pytest.warns(UserWarning, match="buffers moved"):
        fine_tune(other, data, vector.mask, steps=5, lr=1e-2)
    for key, value in model.state_dict().items():
        assert_bit_equal(value, other.state_dict()[key])
    assert_bit_equal(mean, torch.zeros(3))


def test_attention_only_moves_attention_only() -> None:
    model, data = model_and_data(BERT)
    base = copy.deepcopy(model)
    vector = train(model, data, method="attention_only")
    chosen = select_parameters(base, "attention")
    assert list(vector.mask.names) == list(chosen)
    assert vector.mask.density == 1.0
    for name, before in base.named_parameters():
        if name not in chosen:
            assert_bit_equal(model.get_parameter(name), before)
        elif "key.bias" not in name:  # softmax does not see what all keys share
            assert bool((model.get_parameter(name) != before).all())


@pytest.mark.parametrize("select", ["lowest", "highest"])
def test_magnitude_takes_the_smallest_or_the_largest(select: str) -> None:
    model, data = model_and_data(CLIP)
    base = copy.deepcopy(model)
    mask = train(model, data, method=Magnitude(0.2, select=select), lr=1e-2).mask
    weights = torch.cat([base.get_parameter(n).detach().abs().flatten() for n in mask.names])
    chosen = torch.cat([mask.to_dense(n).flatten() for n in mask.names])
    assert list(mask.names) == list(select_parameters(base))
    assert int(chosen.sum()) == round(0.2 * len(weights))
    low, high = (chosen, ~chosen) if select == "lowest" else (~chosen, chosen)
    assert weights[low].max() <= weights[high].min()


def test_random_draws_by_its_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        model, data = model_and_data(CLIP)
        method = Random(0.3, params="qk", seed=seed)
        masks.append(train(model, data, method=method, steps=1).mask)
    assert masks[0] == masks[1]
    assert masks[0].iou(masks[2]) == pytest.approx(0.3 / 1.7, abs=0.05)
    rows = select_parameters(model_and_data(CLIP)[0], "qk").rows
    entries = 0
    for name in masks[0].names:
        dense, (first, last) = masks[0].to_dense(name), rows[name]
        assert not bool(dense[:first].any() | dense[last:].any())
        entries += dense[first:last].numel()
    assert masks[0].nnz == round(0.3 * entries)


MASK = Mask.from_dense({"weight": torch.eye(3) > 0})


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: {"method": "sparse"}, TalosValueError, "method must be one of talos, nonlinear"),
        (lambda: {"method": 3}, TalosTypeError, "method must be a name or a Method, got int"),
        (lambda: {"method": "talos"}, TalosValueError, "mask must be given for the method talos"),
        (
            lambda: {"method": "nonlinear", "mask": MASK},
            TalosValueError,
            "mask must be left out with the method nonlinear",
        ),
        (lambda: {"method": "l_lora"}, TalosValueError, "params must match a parameter of Linear"),
        (lambda: {"method": "attention_only"}, TalosValueError, "params must match a parameter"),
        (
            lambda: {"method": Talos(MASK), "mask": MASK},
            TalosValueError,
            r"mask must be left out with method=Talos\(mask\), which has one",
        ),
        (lambda: {"method": Talos(None)}, TalosTypeError, "mask must be a talos.Mask, got None"),
        (lambda: {"method": LLora(rank=0)}, TalosValueError, "rank must be an integer of at least"),
        (lambda: {"method": LLora(lora_alpha=-1)}, TalosValueError, "lora_alpha must be positive"),
        (lambda: {"method": Lota(density=0)}, TalosValueError, r"density must lie in \(0, 1\]"),
        (lambda: {"method": Random(density=2)}, TalosValueError, r"density must lie in \(0, 1\]"),
        (lambda: {"method": Magnitude(0.0)}, TalosValueError, r"density must lie in \(0, 1\]"),
        (
            lambda: {"method": "lota", "batches": iter([])},
            TalosValueError,
            "batches must be re-iterable for the method lota, got an iterator",
        ),
        (
            lambda: {"method": "lota", "model": nn.Linear(3, 3, dtype=torch.complex64)},
            TalosTypeError,
            "weight must be float32, bfloat16, float16 or float64, got torch.complex64",
        ),
        (
            lambda: {"method": "linearized", "model": nn.DataParallel(nn.Linear(3, 3))},
            TalosValueError,
            "model must not be wrapped for the method linearized, got DataParallel",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_at_the_call(
    make: Callable[[], dict[str, Any]], error: type[Exception], match: str
) -> None:
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(error, match=match):
        fine_tune_steps(**{"model": nn.Linear(3, 3), "batches": data, "steps": 1, **make()})


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        *((Lota, {"density": each}, "density must lie") for each in (None, "0.1", True, [0.1])),
        *((Lota, {"sparse_lr": each}, "sparse_lr must be positive and finite") for each in (0, -1)),
        *((Lota, {"sparse_lr": e}, "sparse_lr must be a positive number") for e in (True, "1")),
        *((LLora, {"rank": each}, "rank must be an integer") for each in (True, 1.5, None, "4")),
        *(
            (LLora, {"lora_alpha": each}, "lora_alpha must be a positive number")
            for each in (True, None, "4")
        ),
        *(
            (LLora, {"lora_alpha": each}, "lora_alpha must be positive and finite")
            for each in (torch.nan, torch.inf)
        ),
        *(
            (kind, {"seed": each}, "seed must be an integer of 64 bits")
            for kind in (LLora, Random)
            for each in (1.5, True, None, "x", 2**70)
        ),
        (Magnitude, {"select": "foo"}, "select must be 'lowest' or 'highest', got 'foo'"),
    ],
)
def test_settings_are_refused_where_they_are_written(
    kind: type[Method], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(TalosValueError, match=match):
        kind(**settings)


def test_the_second_training_of_lota_may_have_a_rate_of_its_own() -> None:
    data = [(torch.randn(4, 3), torch.arange(4) % 3)]
    rates, vectors = [], []
    for method in (Lota(), Lota(sparse_lr=1e-3), Lota(sparse_lr=1e-1)):
        events: list[FineTuneStep] = []
        vectors.append(fine_tune(nn.Linear(3, 3), data, method=method, steps=4, lr=1e-3,
                                 on_step=events.append))  # fmt: skip
        rates.append([event.lr for event in events])
    plain, same, own = rates
    assert same == plain
    assert own[:4] == plain[:4]
    assert own[4:] == pytest.approx([100 * rate for rate in plain[4:]])
    assert vectors[2].metadata["sparse_lr"] == 1e-1
    assert "sparse_lr" not in vectors[0].metadata


def test_nothing_trainable_is_refused() -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    for method in ("nonlinear", "linearized", "lota"):
        with pytest.raises(TalosValueError, match="requires_grad=True, got none"):
            fine_tune(model, [], method=method, steps=1)


HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def attention_of(name: str, rows: int) -> nn.Module:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.add_module(name, nn.Linear(16, rows))
    model.attn.out_proj = nn.Linear(16, 16)
    return model


@pytest.mark.parametrize(("name", "rows"), [("qkv", 24), ("qkv_proj", 24), ("query_key_value", 48)])
def test_what_is_fused_in_another_way_is_not_cut_into_thirds(name: str, rows: int) -> None:
    model = attention_of(name, rows)
    with pytest.raises(TalosValueError, match=r"in thirds of its rows"):
        METHODS["l_lora"]().start(model, HYPER, default_logits)
    with pytest.raises(TalosValueError, match=rf"in attn.{name} of .* not known to be"):
        select_parameters(model, "qk")
    phase = METHODS["attention_only"]().start(model, HYPER, default_logits)
    trained = {id(p) for group in phase.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
