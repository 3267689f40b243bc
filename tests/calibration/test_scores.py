"""Scores equal a loop of single samples in float64, and leave the model as it was."""

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from talos.calibration import calibrate, fisher_diag
from talos.errors import TalosRuntimeError
from talos.masks import Mask
from tests.calibration.models import (
    MODELS,
    Apply,
    Around,
    C,
    E,
    N,
    assert_scores,
    batched,
    encoder,
    inputs,
    mlp,
    oracle,
)
from tests.cases import REDUCTION_TOLERANCES, assert_bit_equal


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


def test_frozen_parameters_are_not_scored() -> None:
    model = MODELS["tokens"]().double()
    model[0][0].requires_grad_(False)
    scores = fisher_diag(model, [inputs()])
    assert set(scores) == {"0.2.weight", "0.2.bias", "2.weight", "2.bias"}


def test_batch_norm_with_statistics_is_scored_in_eval_mode() -> None:
    norm = Around(nn.BatchNorm1d(E, affine=False), lambda x: x.transpose(1, 2), lambda y, _: y)
    model = nn.Sequential(mlp(), norm, Apply(lambda x: x.mean(2))).double()
    before = norm.layer.running_mean.clone()
    assert_scores(fisher_diag(model, [inputs()], draws="exact"), oracle(model, inputs()))
    assert torch.equal(norm.layer.running_mean, before)
    assert norm.layer.training


def test_scoring_works_where_gradients_are_off() -> None:
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


_FIRST_COMPILED = """
import sys, torch
from torch import nn
from talos import fisher_diag

def compiled(model, batch):
    return torch.compile(lambda x: model(x), backend="eager")(batch)

model, x = nn.Linear(4, 3), torch.randn(5, 4)
assert "torch._dynamo" not in sys.modules
scores = fisher_diag(model, [x], logits_fn=compiled)
assert all(torch.equal(score, scores[n]) for n, score in fisher_diag(model, [x]).items())
"""


def test_what_a_model_compiles_during_the_first_calibration_runs_eagerly() -> None:
    subprocess.run([sys.executable, "-c", _FIRST_COMPILED], check=True)


def test_threads_do_not_disturb_one_another() -> None:
    x = inputs()
    models = [MODELS["encoder layer"]().double() for _ in range(3)]
    expected = [fisher_diag(model, [x], params=".") for model in models]

    def slowly(model: nn.Module, batch: Tensor) -> Tensor:
        threading.Event().wait(0.02)
        return cast(Tensor, model(batch))

    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(fisher_diag, model, [x], logits_fn=slowly, params=".") for model in models
        ]
    for job, wanted in zip(jobs, expected, strict=True):
        for name, score in job.result().items():
            assert_bit_equal(score, wanted[name])


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


def test_the_self_test_reads_the_sparse_gradient_of_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    ids = torch.tensor([[0, 1], [2, 2], [3, 0]])
    assert fisher_diag(model, [ids], params=".", check=True).samples == 3


def test_the_self_test_finds_a_use_that_is_not_seen() -> None:
    model, x = MODELS["encoder layer"](), inputs(8).float()
    model[0].linear1.weight.register_hook(lambda grad: None if grad is None else 2 * grad)
    fisher_diag(model, [x], params="linear2", check=True)
    with pytest.raises(TalosRuntimeError, match=r"linear1\.weight must equal those of single"):
        fisher_diag(model, [x], params=".", check=True)
