"""Compact gradients: the same training as with dense ones, and never two of those at once."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import talos
from benches.measure import peak_bytes
from talos import Mask, SparseAdam, TalosRuntimeError, TalosTypeError, TalosValueError
from talos.optim import compaction as routed
from talos.optim.compact_gradient import CompactGradient
from talos.params import select_parameters
from talos_kernels import Index, TensorIndex
from tests.architecture.test_families import FAMILIES, Batch
from tests.cases import assert_bit_equal

TRAINED = (
    "open_clip ViT-B-32 visual",
    "open_clip CLIP",
    "BertForSequenceClassification",
    "T5ForConditionalGeneration v1.0",
    "T5ForConditionalGeneration v1.1",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "timm VisionTransformer",
)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    return getattr(output, "logits", output)


def random_mask(model: nn.Module, density: float = 0.3, params: str = "maskable") -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask.from_dense(
        {
            name: torch.rand(each.param.shape, generator=generator) < density
            for name, each in select_parameters(model, params).items()
        }
    )


def train(
    model: nn.Module,
    optimizer: SparseAdam,
    batches: list[Batch],
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    run: Callable[[nn.Module, Batch], Tensor] = logits,
) -> list[float]:
    """Steps of `accumulate` batches each; the norms."""
    norms = []
    for first in range(0, len(batches), accumulate):
        for batch in batches[first : first + accumulate]:
            run(model, batch).float().log_softmax(-1)[..., 0].mean().backward()
        if max_norm is not None:
            norms.append(float(optimizer.clip_grad_norm_(max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def both(
    model: nn.Module, mask: Mask, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, SparseAdam, nn.Module, SparseAdam]:
    """The model twice: with dense and with compact gradients."""
    model = model.to(dtype)
    other = copy.deepcopy(model)
    dense, compact = (SparseAdam(each, mask, lr=1e-2, **options) for each in (model, other))
    compact.compact_gradients()
    return model, dense, other, compact


@pytest.fixture(autouse=True)
def linear_is_given_back() -> Iterator[None]:
    gc.freeze()  # what is there already is not looked through
    yield
    gc.collect()
    gc.unfreeze()
    assert nn.functional.linear is torch._C._nn.linear


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_with_dense_gradients(name: str) -> None:
    family = FAMILIES[name]
    model = family.model(family.attentions[-1])
    mask = random_mask(model)
    before = copy.deepcopy(model)
    model, dense, other, compact = both(model, mask)
    batches = [family.batch(3) for _ in range(4)]
    expected = train(model, dense, batches, accumulate=2, max_norm=0.1)
    norms = train(other, compact, batches, accumulate=2, max_norm=0.1)
    assert norms == pytest.approx(expected, rel=1e-4)
    moved = 0.0
    for (key, ours), theirs, start in zip(
        other.named_parameters(), model.parameters(), before.parameters(), strict=True
    ):
        moved = max(moved, float((ours - start).detach().abs().max()))
        # Adam divides a gradient by its size: what is rounding there may be a step's hundredth here
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3, msg=key)
        if key in mask.names:
            assert_bit_equal(ours[~mask.to_dense(key)], start[~mask.to_dense(key)])
    assert moved > 1e-2
    compact.release()


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_float64(name: str) -> None:
    family = FAMILIES[name]
    model = family.model(family.attentions[-1]).double()
    mask = random_mask(model)
    batch = family.batch(3)
    wide = {key: each.double() if each.is_floating_point() else each for key, each in batch.items()}
    logits(model, wide).log_softmax(-1)[..., 0].mean().backward()
    wanted = {key: param.grad for key, param in model.named_parameters() if key in mask.names}
    scale = nn.utils.get_total_norm(list(wanted.values())).float()
    single = copy.deepcopy(model).float()
    optimizer = SparseAdam(single, mask)
    optimizer.compact_gradients()
    logits(single, batch).log_softmax(-1)[..., 0].mean().backward()
    for key, param in single.named_parameters():
        if key not in mask.names:
            assert param.grad is None
            continue
        assert isinstance(param.grad, CompactGradient), key
        selected = mask.to_dense(key)
        exact = wanted[key][selected].float()
        torch.testing.assert_close(param.grad.entries / scale, exact / scale, rtol=0, atol=1e-5)
        assert not param.grad.to_dense()[~selected].any()


class DenseGradients(TorchDispatchMode):
    """Counts the tensors shaped as one of the weights, and none of them, that are alive at once."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.shapes = {weight.shape for weight in weights}
        self.weights = {weight.data_ptr() for weight in weights}
        self.alive: set[StorageWeakRef] = set()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and type(found) is Tensor and found.shape in self.shapes:
            if found.data_ptr() not in self.weights:
                self.alive.add(StorageWeakRef(found.untyped_storage()))
            self.alive = {each for each in self.alive if not each.expired()}
            self.most = max(self.most, len(self.alive))
        return found


def test_one_dense_gradient_is_alive_at_a_time() -> None:
    width, layers = 48, 5
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    most = {}
    for compact in (False, True):
        optimizer = SparseAdam(model, random_mask(model, params="."))
        if compact:
            optimizer.compact_gradients()
        loss = model(torch.randn(3, width)).square().mean()
        with DenseGradients([layer.weight for layer in model]) as counter:
            loss.backward()
        most[compact] = counter.most
        optimizer.zero_grad()
        optimizer.release()
    assert most == {False: layers, True: 1}


def test_the_hook_alone_keeps_one_dense_gradient_too() -> None:
    width, layers = 48, 4
    weights = [nn.Parameter(torch.randn(width, width)) for _ in range(layers)]
    mask = Mask.from_dense({str(i): torch.rand(width, width) < 0.2 for i in range(layers)})
    optimizer = SparseAdam([(str(i), each) for i, each in enumerate(weights)], mask)
    optimizer.compact_gradients()
    x = torch.randn(3, width)
    for weight in weights:
        x = (x @ weight).tanh()  # not by functional.linear
    with DenseGradients(weights) as counter:
        x.sum().backward()
    assert counter.most == 1
    assert all(isinstance(weight.grad, CompactGradient) for weight in weights)
    optimizer.release()


def test_the_values_of_a_fused_projection_have_no_weight_gradient() -> None:
    width, tokens = 32, 7
    attention = nn.MultiheadAttention(width, 2, batch_first=True)
    selected = torch.rand(3 * width, width) < 0.5
    selected[2 * width :] = False
    x = torch.randn(2, tokens, width)
    operations = []
    for compact in (False, True):
        optimizer = SparseAdam(attention, Mask.from_dense({"in_proj_weight": selected}))
        if compact:
            optimizer.compact_gradients()
        loss = attention(x, x, x, need_weights=False)[0].sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        operations.append(counter.get_total_flops())
        optimizer.zero_grad()
        optimizer.release()
    assert operations[0] - operations[1] == 2 * 2 * tokens * width * width


def test_under_a_default_device_autograd_makes_no_weight_gradient() -> None:
    model, optimizer = compacting(sampled=True)
    with torch.device("cpu"):  # a mode of torch's functions
        loss = model(torch.randn(2, 6)).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 0
    optimizer.release()


@pytest.mark.parametrize("name", ["open_clip ViT-B-32 visual", "BertForSequenceClassification"])
def test_under_autocast(name: str) -> None:
    family = FAMILIES[name]

    def run(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model, batch)

    model = family.model(family.attentions[-1])
    mask = random_mask(model)
    model, _, other, compact = both(model, mask)
    batch = family.batch(4)
    outputs = run(model, batch), run(other, batch)
    assert_bit_equal(*outputs)
    for each in outputs:
        each.float().log_softmax(-1)[..., 0].mean().backward()
    for (key, theirs), ours in zip(model.named_parameters(), other.parameters(), strict=True):
        if key in mask.names:
            dense = theirs.grad
            assert (ours.grad.to_dense() - dense * mask.to_dense(key)).norm() <= 0.01 * dense.norm()
    compact.release()


def test_a_transposed_batch_copies_no_weight() -> None:
    """As attention with `batch_first` hands it to its projection."""
    model = nn.Linear(64, 512)
    optimizer = SparseAdam(model, random_mask(model, params="."))
    optimizer.compact_gradients()
    x = torch.randn(2, 50, 64, requires_grad=True)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x.transpose(0, 1)).float().sum().backward()

    assert peak_bytes(run) < 20 * model.weight.nbytes
    optimizer.release()


def test_with_bf16_weights_the_compact_gradient_is_float32() -> None:
    model = nn.Linear(16, 8).bfloat16()
    optimizer = SparseAdam(model, random_mask(model, params="."))
    optimizer.compact_gradients()
    model(torch.randn(4, 16).bfloat16()).sum().backward()
    assert model.weight.grad.dtype == torch.bfloat16
    assert model.weight.grad.entries.dtype == torch.float32
    optimizer.step()
    optimizer.release()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model, dense, other, compact = both(model, random_mask(model, params="."))
    x = torch.randn(5, 8, requires_grad=True)
    train(model, dense, [{"input": x}], run=lambda m, b: m(b["input"]))
    train(
        other, compact, [{"input": x}],
        run=lambda m, b: checkpoint(m, b["input"], use_reentrant=reentrant),
    )  # fmt: skip
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours, theirs)
    compact.release()


@pytest.mark.slow
def test_compiled_models_compact_by_the_hook() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model, dense, other, compact = both(model, random_mask(model, params="."))
    x = torch.randn(5, 8)
    train(model, dense, [{"input": x}], run=lambda m, b: m(b["input"]))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    train(other, compact, [{"input": x}], run=lambda _, b: compiled(b["input"]))
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    compact.release()


def test_gradscaler_and_torchs_clipping_work_on_the_compact_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    mask = random_mask(model, params=".")
    model, dense, other, compact = both(model, mask)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1) for _ in range(2)]
    for step in range(3):
        x = torch.randn(5, 8)
        bad = step == 1
        for each, optimizer, scaler in zip((model, other), (dense, compact), scalers, strict=True):
            loss = each(x).square().mean() * (float("inf") if bad else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            for name, param in each.named_parameters():  # torch would count the unselected too
                if type(param.grad) is Tensor:
                    param.grad *= mask.to_dense(name)
            nn.utils.clip_grad_norm_(each.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=step == 0)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    compact.release()


def test_hooks_of_a_weight_see_and_change_the_dense_gradient() -> None:
    model = nn.Linear(8, 4)
    optimizer = SparseAdam(model, random_mask(model, params="."))
    optimizer.compact_gradients()
    seen = []
    handle = model.weight.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    x = torch.randn(3, 8)
    model(x).sum().backward()
    handle.remove()
    (dense,) = seen
    assert dense.shape == (4, 8)
    selected = optimizer.mask.to_dense("weight")
    assert_bit_equal(model.weight.grad.entries, 2 * dense[selected])
    optimizer.release()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_sampled_gradients_are_those_of_the_product(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(40, 96), nn.Tanh(), nn.Linear(96, 70), nn.LayerNorm(70))
    mask = random_mask(model, params=".")
    other = copy.deepcopy(model)
    product, sampled = SparseAdam(model, mask), SparseAdam(other, mask)
    batches = torch.randn(2, 3, 5, 40)

    def accumulate(trained: nn.Module) -> None:
        for x in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = trained(x)
            y.float().square().sum().backward()

    product.compact_gradients()
    accumulate(model)
    product.release()
    monkeypatch.setattr(routed, "_scratch", pytest.fail)
    sampled.compact_gradients(sampled=True)
    accumulate(other)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert isinstance(ours.grad, CompactGradient)
        difference = (ours.grad.to_dense() - theirs.grad).norm()
        assert difference <= (1e-2 if autocast else 1e-6) * theirs.grad.norm()
    sampled.release()


def test_a_graphs_scratch_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weight: Any = SimpleNamespace(
        is_cuda=True, shape=torch.Size((2, 3)), numel=lambda: 6, device=torch.device("cpu")
    )
    monkeypatch.setattr(routed, "_scratches", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=1))
    for capturing, kept in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda each=capturing: each)
        first, second = (routed._scratch(weight, torch.bfloat16) for _ in range(2))
        assert first.shape == weight.shape
        assert len(routed._scratches) == kept
        assert (first.data_ptr() == second.data_ptr()) is not capturing


def test_copies_and_releases_have_dense_gradients() -> None:
    model = nn.Linear(8, 4)
    optimizer = SparseAdam(model, random_mask(model, params="."))
    optimizer.compact_gradients()
    model(torch.randn(3, 8)).sum().backward()
    entries = model.weight.grad.entries.clone()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (group,) = other.param_groups
        assert not any(isinstance(param.grad, CompactGradient) for param in group["params"])
    optimizer.release()
    assert type(model.weight.grad) is Tensor
    assert_bit_equal(model.weight.grad[optimizer.mask.to_dense("weight")], entries)
    optimizer.zero_grad()
    model(torch.randn(3, 8)).sum().backward()
    assert type(model.weight.grad) is Tensor


def test_a_forgotten_optimizer_stops_compacting() -> None:
    model = nn.Linear(8, 4)
    optimizer = SparseAdam(model, random_mask(model, params="."))
    optimizer.compact_gradients()
    optimizer.compact_gradients()  # twice is once
    del optimizer
    gc.collect()
    model(torch.randn(3, 8)).sum().backward()
    assert type(model.weight.grad) is Tensor


def test_another_optimizers_compact_gradient_is_refused() -> None:
    model = nn.Linear(8, 4)
    first, second = (SparseAdam(model, random_mask(model, d, ".")) for d in (0.3, 0.6))
    first.compact_gradients()
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(TalosValueError, match=r"weight\.grad must be compacted by this optimizer"):
        second.step()
    first.release()


def gradient() -> tuple[CompactGradient, Tensor]:
    selected = torch.tensor([[True, False, True], [False, False, True]])
    index = Index.pack([TensorIndex.encode(selected)])
    weight = nn.Parameter(torch.zeros(2, 3))
    entries = torch.tensor([3.0, -4.0, 12.0])
    dense = torch.zeros(2, 3)
    dense[selected] = entries
    return CompactGradient.of(weight, index, entries), dense


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.mul_(2.0),
        lambda g: g.div_(torch.tensor(4.0)),
        lambda g: g.mul_(torch.arange(6.0).view(2, 3)),
        lambda g: g.mul_(torch.arange(3.0)),
        lambda g: g.neg_(),
        lambda g: g.zero_(),
        lambda g: torch._foreach_mul_([g], 3.0),
        lambda g: torch._foreach_mul_([g], torch.tensor(3.0)),
    ],
)
def test_changes_are_those_of_the_dense_gradient(change: Callable[[Tensor], object]) -> None:
    ours, dense = gradient()
    change(ours)
    change(dense)
    assert torch.equal(ours.to_dense(), dense)


@pytest.mark.parametrize(
    "ask",
    [
        lambda g: g.norm(),
        lambda g: torch.linalg.vector_norm(g, 1),
        lambda g: torch.linalg.vector_norm(g, torch.inf),
        lambda g: g.abs().max(),
        lambda g: g.isfinite().all(),
        lambda g: g + 1,
        lambda g: (g * g).sum(),
        lambda g: torch.stack(torch._foreach_norm([g, torch.ones(2)])),
    ],
)
def test_questions_are_answered_as_by_the_dense_gradient(ask: Callable[[Tensor], Tensor]) -> None:
    ours, dense = gradient()
    torch.testing.assert_close(ask(ours), ask(dense))


def test_a_change_of_unselected_entries_is_refused() -> None:
    ours, dense = gradient()
    for write in (
        lambda: ours.fill_(1.0),
        lambda: ours.add_(1.0),
        lambda: ours.exp_(),
        lambda: ours.clamp_(min=0.5),
        lambda: ours.pow_(0),
        lambda: ours.uniform_(),
        lambda: ours.index_fill_(0, torch.tensor([0]), 1.0),
        lambda: torch._foreach_add_([ours, torch.ones(2)], 1.0),
    ):
        with pytest.raises(TalosTypeError, match="must not be changed by"):
            write()
        assert torch.equal(ours.to_dense(), dense)
    assert "3 of 6 entries" in repr(ours)
    assert_bit_equal(copy.deepcopy(ours).to_dense(), ours.to_dense())


def test_calibration_and_evaluation_go_on_beside_it() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = SparseAdam(model, random_mask(model, params="."))
    x = torch.randn(6, 8)
    wanted = talos.fisher_diag(model, [x])
    optimizer.compact_gradients()
    for name, score in talos.fisher_diag(model, [x]).items():
        assert_bit_equal(score, wanted[name])
    with torch.no_grad():
        model(x)
    torch.func.grad(lambda w: torch.func.functional_call(model, {"0.weight": w}, x).sum())(
        model[0].weight.detach()
    )
    optimizer.release()


def compacting(**options: Any) -> tuple[nn.Linear, SparseAdam]:
    model = nn.Linear(6, 4)
    optimizer = SparseAdam(model, Mask.from_dense({"weight": torch.rand(4, 6) < 0.5}))
    optimizer.compact_gradients(**options)
    return model, optimizer


@pytest.mark.parametrize("way", ["grad", "backward", "jacobian", "vectorized"])
def test_the_gradient_of_an_input_alone_leaves_the_weights_alone(way: str) -> None:
    model, optimizer = compacting()
    x = torch.ones(2, 6, requires_grad=True)
    if way == "grad":
        (found,) = torch.autograd.grad(model(x).sum(), x)
    elif way == "backward":
        model(x).sum().backward(inputs=[x])
        found = x.grad
    else:
        found = torch.autograd.functional.jacobian(
            lambda x: model(x).sum(0), x, vectorize=way == "vectorized"
        ).sum(0)
    torch.testing.assert_close(found, model.weight.sum(0).expand(2, 6).detach())
    assert model.weight.grad is None
    optimizer.release()


def test_autograd_grad_returns_the_dense_gradient_of_a_weight() -> None:
    model, optimizer = compacting()
    (found,) = torch.autograd.grad(model(torch.ones(2, 6)).sum(), model.weight)
    assert_bit_equal(found, torch.full((4, 6), 2.0))
    assert model.weight.grad is None
    optimizer.release()


def test_a_penalty_on_gradients_trains_as_with_dense_gradients() -> None:
    gradients = []
    for compact in (False, True):
        torch.manual_seed(0)
        model, optimizer = compacting()
        if not compact:
            optimizer.release()
        x = torch.randn(3, 6, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
        grad = model.weight.grad
        gradients.append(grad.entries if compact else grad[optimizer.mask.to_dense("weight")])
        optimizer.release()
    torch.testing.assert_close(*gradients)
    model, optimizer = compacting()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x).float().tanh().sum()
    with pytest.raises(TalosRuntimeError, match="cannot be differentiated under autocast"):
        torch.autograd.grad(y, x, create_graph=True)
    optimizer.release()


def test_what_happens_between_forward_and_backward_counts() -> None:
    model, optimizer = compacting()
    y = model(torch.ones(2, 6)).sum()
    optimizer.release()
    y.backward()
    assert type(model.weight.grad) is Tensor
    optimizer.compact_gradients()
    model.weight.grad, seen = None, []
    y = model(torch.ones(2, 6)).sum()
    handle = model.weight.register_hook(seen.append)
    y.backward()
    handle.remove()
    assert seen[0].shape == (4, 6)
    assert isinstance(model.weight.grad, CompactGradient)
    optimizer.release()


def test_another_gradient_that_was_assigned_accumulates() -> None:
    model, optimizer = compacting()
    model(torch.ones(2, 6)).sum().backward()
    kept = model.weight.grad.clone()
    optimizer.zero_grad()
    model.weight.grad = kept
    model(torch.ones(2, 6)).sum().backward()
    assert float(model.weight.grad.to_dense().max()) == 4.0
    optimizer.release()


def test_a_wrapper_around_linear_survives_compacting_twice() -> None:
    model, optimizer = compacting()
    mine = nn.functional.linear
    nn.functional.linear = lambda *args, **kwargs: mine(*args, **kwargs)
    try:
        optimizer.compact_gradients(False)
        optimizer.compact_gradients()
        nn.Linear(3, 2)(torch.ones(1, 3))
        model(torch.ones(2, 6)).sum().backward()
        assert isinstance(model.weight.grad, CompactGradient)
    finally:
        nn.functional.linear = mine
        optimizer.release()


def test_inputs_that_are_written_unseen_are_cast_anew() -> None:
    model, optimizer = compacting()
    x = torch.ones(2, 6)
    memory = x.numpy()
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        memory[:] = 2
        assert not torch.equal(model(x), first)
    optimizer.release()


def test_a_view_is_of_the_dense_gradient_and_cannot_be_written() -> None:
    ours, dense = gradient()
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "row": lambda g: g[0],
        "flat": lambda g: g.view(-1),
        "reshaped": lambda g: g.reshape(-1),
        "flattened": lambda g: g.flatten(),
        "transposed": lambda g: g.T,
        "of its data": lambda g: g.data[0],
        "unsqueezed": lambda g: g.unsqueeze(0),
        "split": lambda g: g.split(1)[0],
        "diagonal": lambda g: g.diagonal(),
        "of a list": lambda g: torch.cat([g.flatten(), g.flatten()]),
    }
    for name, view in views.items():
        assert torch.equal(view(ours), view(dense)), name
        if name != "of a list":
            with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
                view(ours).mul_(2)
    for write in (
        lambda: ours.__setitem__(..., 1),
        lambda: ours.t_(),
        lambda: ours.fill_diagonal_(1),
    ):
        with pytest.raises(TalosTypeError, match="must not be changed by"):
            write()
    assert torch.equal(ours.to_dense(), dense)


def test_numpy_and_lists_read_the_dense_gradient() -> None:
    ours, dense = gradient()
    assert ours.tolist() == dense.tolist()
    assert np.array_equal(ours.detach().cpu().numpy(), dense.numpy())
    assert np.array_equal(np.asarray(ours), dense.numpy())
    assert np.array_equal(np.histogram(ours, 4)[0], np.histogram(dense, 4)[0])
    with pytest.raises(ValueError, match="read-only"):
        ours.numpy()[0] = 1


UNARY = (
    "abs_",
    "sign_",
    "sgn_",
    "neg_",
    "tanh_",
    "sin_",
    "relu_",
    "trunc_",
    "square_",
    "nan_to_num_",
)


@pytest.mark.parametrize("name", UNARY)
def test_what_leaves_zeros_alone_works_on_the_entries(name: str) -> None:
    ours, dense = gradient()
    getattr(ours, name)()
    getattr(dense, name)()
    assert isinstance(ours, CompactGradient)
    torch.testing.assert_close(ours.to_dense(), dense)
    ours, dense = gradient()
    if hasattr(torch, f"_foreach_{name}"):
        getattr(torch, f"_foreach_{name}")([ours, plain := torch.full((2,), -0.5)])
        getattr(torch, f"_foreach_{name}")([dense, other := torch.full((2,), -0.5)])
        torch.testing.assert_close([ours.to_dense(), plain], [dense, other])


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.clamp_(-0.5, 0.5),
        lambda g: g.clamp_(max=torch.full((2, 3), 0.25)),
        lambda g: g.pow_(3),
        lambda g: g.masked_fill_(g > 1, 0.0),
        lambda g: g.addcmul_(g.detach() * 1, g.detach() * 1),
        lambda g: torch._foreach_clamp_min_([g], -0.25),
        lambda g: torch._foreach_addcmul_([g], [g.detach() * 1], [g.detach() * 1], 2.0),
        lambda g: torch.nn.utils.clip_grad_value_([holder(g)], 0.5),
    ],
)
def test_clipping_by_value_and_its_like_work_on_the_entries(
    change: Callable[[Tensor], object],
) -> None:
    ours, dense = gradient()
    entries = ours.entries
    change(ours)
    change(dense)
    assert ours.entries is entries
    torch.testing.assert_close(ours.to_dense(), dense)


def holder(grad: Tensor) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(grad.shape))
    param.grad = grad
    return param


def test_dense_tensors_take_it_as_an_operand() -> None:
    ours, dense = gradient()
    assert torch.equal(torch.ones(2, 3).mul_(ours), dense)
    assert torch.equal(torch.zeros(2, 3).add_(ours), dense)
    assert torch.equal(torch.zeros(2, 3).copy_(ours), dense)
    assert torch.equal(ours.norm(dim=-1), dense.norm(dim=-1))
    assert ours.to_dense(torch.float64).dtype == torch.float64


def test_items_are_assigned_where_the_gradient_stays_on_its_entries() -> None:
    changes: tuple[Callable[[Tensor], object], ...] = (
        lambda g: g.__setitem__(0, 0),
        lambda g: g.__setitem__(torch.isnan(g), 0.0),
        lambda g: g.__setitem__(g.abs() > g.abs().mean(), 0.0),
        lambda g: g.__setitem__(g != 0, 2.0),
        lambda g: g.__setitem__((slice(1, None), 0), g[1:, 0] * 0.5),
        lambda g: g.__setitem__(..., g.clone()),
        lambda g: g.data.__setitem__(0, 0),
    )
    for change in changes:
        ours, dense = gradient()
        for each in (ours, dense):
            change(each)
        assert torch.equal(ours.to_dense(), dense)


def test_an_operation_that_is_given_the_gradient_as_out_works_on_the_entries() -> None:
    changes: tuple[Callable[[Tensor], object], ...] = (
        lambda g: torch.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5, out=g),
        lambda g: torch.clamp(g, -0.1, 0.1, out=g),
        lambda g: torch.mul(g, 0.5, out=g),
        lambda g: torch.mul(g, torch.full_like(g, 3.0), out=g),
        lambda g: torch.abs(-g, out=g),
    )
    for change in changes:
        ours, dense = gradient()
        before = ours.entries
        for each in (ours, dense):
            assert change(each) is each
        assert ours.entries is before
        assert torch.equal(ours.to_dense(), dense)
    ours, dense = gradient()
    with pytest.raises(TalosTypeError, match="must not be changed by"):
        torch.exp(ours, out=ours)
    assert torch.equal(ours.to_dense(), dense)


def test_its_data_is_assigned() -> None:
    ours, dense = gradient()
    ours.data = ours.data * 0.5
    assert isinstance(ours, CompactGradient)
    assert torch.equal(ours.to_dense(), dense * 0.5)


def test_a_file_holds_the_dense_gradient() -> None:
    ours, dense = gradient()
    file = io.BytesIO()
    torch.save({"grad": ours}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["grad"]
    assert type(found) is Tensor
    assert torch.equal(found, dense)
