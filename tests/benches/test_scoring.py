"""The forms of scoring, the estimators and the loops of `benches`, on tiny models."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import talos
from benches import bench_estimators as estimators
from benches import scoring
from benches.bench_fisher_diag import TOLERANCE
from benches.workload import Batch
from talos.app.models import ZeroShotClassifier, load_encoder
from talos.params import select_parameters
from tests.tiny import save_tiny_encoder

Task = tuple[scoring.Scored, Batch, scoring.Scores]


def tiny_tower(kind: str) -> tuple[nn.Module, Batch]:
    ids = torch.randint(0, 50, (3, 7))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "image":
        tower = VisionTransformer(
            image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
        )
        return tower, {"images": torch.randn(3, 3, 32, 32)}
    if kind == "text":
        config = BertConfig(vocab_size=50, hidden_size=16, **sizes)
        return BertModel(config, add_pooling_layer=False), {"input_ids": ids}
    t5 = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=50)
    tower = T5ForConditionalGeneration(t5)
    tower.shared.weight.data.mul_(0.25)
    return tower, {"input_ids": ids, "decoder_input_ids": ids[:, :4]}


@pytest.fixture(scope="module", params=["image", "text", "sequence"])
def task(request: pytest.FixtureRequest) -> Task:
    torch.manual_seed(0)
    tower, inputs = tiny_tower(request.param)
    model = scoring.Scored(tower)
    batch = scoring.with_labels(model, inputs)
    return model, batch, scoring.exact(model, batch)


@pytest.mark.parametrize("name", [name for name, form in scoring.FORMS.items() if form.scores])
def test_every_form_scores_as_the_loop_does(task: Task, name: str) -> None:
    model, batch, wanted = task
    form = scoring.FORMS[name]
    found = form.score(form.prepare(model), batch)
    assert set(wanted) == set(select_parameters(model))
    assert len(found) == len(wanted)
    assert scoring.relative_error(found, wanted) <= TOLERANCE


def test_plain_form_has_the_gradients_of_the_mean(task: Task) -> None:
    model, batch, _ = task
    wanted = {name: torch.zeros_like(param) for name, param in model.scored().items()}
    for sample in scoring.samples(batch):
        for name, grad in scoring.plain(model, sample).items():
            wanted[name] += grad / len(batch["labels"])
    assert scoring.relative_error(scoring.plain(model, batch), wanted) <= TOLERANCE


def test_tokens_taken_for_samples_are_an_error() -> None:
    torch.manual_seed(0)
    dy, x = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    right = torch.einsum("bto,bti->boi", dy, x).square().sum(0)
    wrong = torch.einsum("bto,bti->oi", dy.square(), x.square())
    assert scoring.relative_error({"w": wrong}, {"w": right}) > 0.1
    assert scoring.relative_error({"w": right}, {"w": right}) == 0


def test_further_batches_are_timed_one_by_one(task: Task) -> None:
    model, batch, _ = task
    times = scoring.further_batches(model, batch, 3)
    assert len(times) == 3
    assert min(times) > 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ZeroShotClassifier:
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")
    return ZeroShotClassifier(load_encoder(folder), ["a letter", "a mark", "a digit"])


@pytest.fixture(scope="module")
def batches(classifier: ZeroShotClassifier) -> list[Batch]:
    texts = [f"{i} is a text of {'some ' * (i % 5)}words" for i in range(32)]
    encoded = classifier.encoder.tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.arange(32) % 3
    whole = {"labels": labels, **{k: encoded[k] for k in ("input_ids", "attention_mask")}}
    return [{name: each[start : start + 16] for name, each in whole.items()} for start in (0, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("rows", estimators.LOOPS.values())
def test_the_loops_make_the_mask_that_calibrate_makes(
    classifier: ZeroShotClassifier,
    batches: list[Batch],
    rows: Callable[[nn.Module, Batch], Iterator[torch.Tensor]],
) -> None:
    wide = copy.deepcopy(classifier).double()
    before = copy.deepcopy(wide.state_dict())
    wanted = talos.calibrate(wide, batches, 0.1, 4, soft=estimators.SOFT, seed=3)
    mask = estimators.loop_calibrate(wide, batches, 0.1, 4, seed=3, rows=rows)
    assert mask.nnz == wanted.nnz
    assert estimators.overlap(mask, wanted) == 1.0
    other = estimators.loop_calibrate(wide, batches, 0.1, 4, seed=4, rows=rows)
    assert estimators.overlap(other, wanted) < 0.999
    torch.testing.assert_close(wide.state_dict(), before, rtol=0, atol=0)


def test_masks_of_more_samples_include_the_fewer(
    classifier: ZeroShotClassifier, batches: list[Batch]
) -> None:
    exact = {"draws": "exact"}
    masks = estimators.masks_of_one_round(classifier, batches, (16, 32), 0, exact)
    for size, given in ((16, batches[:1]), (32, batches)):
        wanted = talos.calibrate(classifier, given, estimators.DENSITY, 1, draws="exact")
        assert estimators.overlap(masks[size], wanted) > 0.999
    assert estimators.overlap(masks[16], masks[32]) < 0.999


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_every_estimator_comes_near_the_exact_scores(
    classifier: ZeroShotClassifier, batches: list[Batch], name: str
) -> None:
    options = estimators.ESTIMATORS[name].options
    exact = talos.calibrate(classifier, batches, estimators.DENSITY, 1, draws="exact")
    masks = estimators.masks_of_one_round(classifier, batches, (32,), 0, options)
    assert estimators.overlap(masks[32], exact) > 2 * estimators.DENSITY
