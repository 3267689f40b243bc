"""What theory offers to keep tasks apart, measured on a sentence encoder.

    python -m benches.penalties --out benches/results/<device>/penalties.json

Tasks and training are those of talos/app/recipes/causes.toml. A form adds one thing to sparse or to
full fine-tuning:

    localization   + w * mean over texts of the other tasks of ||h(x; theta) - h(x; theta_0)||^2
    unlabelled     the same, over texts of a task that is not merged
    curvature      + w / 2 * sum_j F_j (theta_j - theta_0j)^2     F: Fisher scores of the others
    even           a mask of a tenth of each tensor after one round of scoring, not of all tensors
                   together after four
    random         a random mask for each task

h is the encoder's unit vector; F is a mean over samples, of the maskable weights. Localization is
the paper's open question; the curvature penalty is that of arXiv 2602.17385 with the diagonal of F,
and needs the other tasks' scores. A form without a penalty tries three rates, and each penalty its
weights w at the rate of `plain`. What answers best on validation data with the first seed is taken,
and trained with the other seeds. A record holds the figures of one seed and the seconds that
training takes; `summary` has, for each form over its seeds, the mean single-task accuracy `alone`,
the accuracy `absolute` of the sum, and `gain`, its paired difference from the plain form.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import talos
from benches import measure
from benches.results import write_json
from talos import evaluation
from talos.app.experiments.judging import (
    Batch,
    TaskModels,
    calibration_batches,
    training_batches,
)
from talos.app.experiments.training import seed_of
from talos.app.models import load_encoder
from talos.app.tasks import load_task
from talos.batches import evaluation_mode
from talos.evaluation import Bootstrap
from talos.evaluation.intervals import Model, over_tasks
from talos.methods import Method, Nonlinear, Random, Talos
from talos.names import named_parameters

TASKS = ("character_kind", "fragment_kind", "docstring_topic", "code_package")
UNLABELLED = "test_or_library"
SIZES, STEPS, BATCH, TOKENS = (480, 48, 160), 30, 16, 32
SAMPLES, DENSITY, COEFFICIENTS = 128, 0.1, 11
RATES = {
    ("talos", "plain"): (3e-3, 1e-2, 3e-2),
    ("talos", "even"): (1e-3, 3e-3, 1e-2),
    ("talos", "random"): (3e-4, 1e-3, 3e-3),
    ("nonlinear", "plain"): (2e-5, 5e-5, 1e-4),
}
WEIGHTS = {
    "localization": (0.03, 0.3, 3.0),
    "unlabelled": (0.03, 0.3, 3.0),
    "curvature": (10.0, 300.0, 1e4),
}
FORMS = [
    *(("talos", form) for form in ("plain", "even", "random", *WEIGHTS)),
    *(("nonlinear", form) for form in ("plain", "localization", "curvature")),
]

_DIGITS = 9  # of sums that are equal but for rounding the first is taken

Penalty = Callable[[], Tensor]
Form = tuple[str, str]  # a method, and what is added to it


@dataclass(frozen=True)
class Way:
    """One way of training: a method, what is added to it, the weight of that, and the rate."""

    method: str
    form: str
    weight: float
    lr: float


@dataclass(frozen=True)
class Found:
    """The answers of a way: of each task's own model, and of one with all vectors added."""

    alone: Mapping[str, Model]
    added: Mapping[str, Model]


class Study:
    """The tasks on one encoder, and what ways share: masks, the other tasks' texts and scores."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.encoder = load_encoder("minilm")
        self.tasks = {name: load_task(name, sizes=SIZES) for name in (*TASKS, UNLABELLED)}
        self.models = TaskModels(self.encoder, [self.tasks[name] for name in TASKS])
        self.outcomes = self.models.outcomes(max_length=TOKENS)
        self.base = {n: p.detach().clone() for n, p in named_parameters(self.encoder).items()}
        self.texts = cache(self._texts)
        self.fisher = cache(self._fisher)
        self.mask = cache(self._mask)

    @property
    def _reading(self) -> dict[str, int]:
        return {"batch_size": BATCH, "max_length": TOKENS, "seed": self.seed}

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's unit vectors of a batch, [B, D]."""
        vectors: Tensor = self.encoder(batch["input_ids"], batch["attention_mask"])
        return vectors

    def _training(self, task: str, count: int) -> list[Batch]:
        return training_batches(
            self.tasks[task], self.encoder, count=count * BATCH, **self._reading
        )

    @torch.no_grad()
    def _texts(self, task: str) -> list[tuple[Batch, Tensor]]:
        """Return ten batches of a task's texts, with their vectors by the pretrained encoder."""
        return [(each, self.encode(each)) for each in self._training(task, 10)]

    def _samples(self, task: str) -> list[Batch]:
        return calibration_batches(self.tasks[task], self.encoder, count=SAMPLES, **self._reading)

    def _fisher(self, task: str) -> dict[str, Tensor]:
        """Return the mean score of a task's samples, by the names of the classifier's weights."""
        model = self.models.classifiers[task]
        found = talos.fisher_diag(model, self._samples(task), seed=self.seed)
        return {name: each / SAMPLES for name, each in found.items()}

    def _mask(self, task: str, even: bool) -> talos.Mask:
        """Return a task's mask: a tenth of each tensor, or of all tensors together."""
        if not even:
            model = self.models.classifiers[task]
            return talos.calibrate(model, self._samples(task), DENSITY, seed=self.seed)
        return talos.Mask.from_dense(
            {
                name: talos.Mask.from_scores({name: scores}, DENSITY).to_dense(name)
                for name, scores in self.fisher(task).items()
                if scores.numel() * DENSITY >= 1
            }
        )

    def penalty(self, form: str, task: str) -> Penalty | None:
        """Return what a form adds to the loss of a task, before the weight."""
        others = [each for each in TASKS if each != task]
        if form == "curvature":
            return self._curvature(others)
        if form not in ("localization", "unlabelled"):
            return None
        names = [UNLABELLED] if form == "unlabelled" else others
        in_turn = itertools.cycle(
            pair for row in zip(*map(self.texts, names), strict=True) for pair in row
        )

        def moved() -> Tensor:
            batch, before = next(in_turn)
            with evaluation_mode(self.encoder):  # dropout, too, would move h
                distance: Tensor = (self.encode(batch) - before).square().sum(-1).mean()
            return distance

        return moved

    def _curvature(self, others: Sequence[str]) -> Penalty:
        params = named_parameters(self.models.model)
        scores = [self.fisher(each) for each in others]
        fisher = {name: sum(each[name] for each in scores) for name in scores[0]}

        def stretched() -> Tensor:
            parts = [
                (fisher[name] * (params[name] - self.base[name]).square()).sum()
                for name in fisher
                if params[name].requires_grad
            ]
            return torch.stack(parts).sum() / 2

        return stretched

    def fine_tuning(self, way: Way, task: str) -> Method:
        """Return how a way trains a task."""
        if way.method == "nonlinear":
            return Nonlinear()
        if way.form == "random":
            return Random(density=DENSITY, seed=seed_of(self.seed, task))
        return Talos(self.mask(task, way.form == "even"))

    def train(self, way: Way, task: str) -> talos.TaskVector:
        """Fine-tune on a task; the weights are the pretrained ones afterwards."""
        penalty = self.penalty(way.form, task)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            own = F.cross_entropy(model(batch), batch["labels"])
            return own if penalty is None else own + way.weight * penalty()

        torch.manual_seed(self.seed)
        try:
            return talos.fine_tune(
                self.models.classifiers[task],
                self._training(task, STEPS),
                method=self.fine_tuning(way, task),
                steps=STEPS,
                lr=way.lr,
                loss_fn=loss,
            )
        finally:
            self.models.restore_()

    def judge(self, way: Way) -> tuple[dict[str, Any], Found]:
        """Return the figures of a way, and its answers."""
        for task in TASKS:  # what ways share is not timed
            self.penalty(way.form, task)
            self.fine_tuning(way, task)
        began = measure.clock()
        vectors = {task: self.train(way, task) for task in TASKS}
        seconds = measure.clock() - began
        added = evaluation.addition(
            self.outcomes, vectors, coefs=evaluation.scaling_coefs(COEFFICIENTS)
        )
        alone = self.outcomes.of_each(vectors, "test")
        record = {
            "seed": self.seed,
            **asdict(way),
            "seconds": seconds,
            "alone": fmean(self.outcomes.figures(alone).values()),
            "validation": max(point.absolute for point in added.grid),
            "scaling_coef": added.scaling_coef,
            "absolute": dict(added.absolute),
            "normalised": dict(added.normalised),
        }
        return record, Found(alone, added.picked)


def summed(
    bootstrap: Bootstrap, found: Sequence[Found], plain: Sequence[Found]
) -> dict[str, dict[str, Any]]:
    """Sum up a form over its seeds.

    Args:
        bootstrap: of the test examples.
        found: the answers with each seed.
        plain: those of the plain form.
    """

    def table(models: Sequence[Mapping[str, Model]]) -> Tensor:
        return bootstrap.resampled({t: [each[t] for each in models] for t in TASKS}, over_tasks)

    added, before = (table([each.added for each in own]) for own in (found, plain))
    alone = table([each.alone for each in found])
    tables = {"alone": alone, "absolute": added, "gain": added - before}
    return {key: dict(bootstrap.over_seeds(each)) for key, each in tables.items()}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seeds", type=int, default=3)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; write the records of each form as they come."""
    given = parser().parse_args(arguments)
    if given.seeds < 1:
        parser().error(f"--seeds must be at least 1, got {given.seeds}")
    about = measure.machine() | {"tasks": TASKS, "sizes": SIZES, "steps": STEPS}
    summary: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    taken: dict[Form, Way] = {}
    found: dict[Form, list[Found]] = {}
    first, *others = [Study(seed) for seed in range(given.seeds)]
    for form in FORMS:
        tried = [(way, *first.judge(way)) for way in ways(*form, taken)]
        best = max(tried, key=lambda each: round(each[1]["validation"], _DIGITS))
        taken[form] = best[0]
        judged = [best, *((best[0], *study.judge(best[0])) for study in others)]
        found[form] = [answers for _, _, answers in judged]
        for way, record, _ in [*tried, *judged[1:]]:
            records.append(record | {"taken": way == best[0]})
            shown = (f"{each:.3f}" for each in (record["alone"], record["absolute"]["value"]))
            print(record["seed"], *asdict(way).values(), *shown, flush=True)
        figures = summed(first.outcomes.bootstrap, found[form], found[form[0], "plain"])
        summary.append({**asdict(best[0]), "seeds": given.seeds, **figures})
        write_json(given.out, {"about": about, "summary": summary, "records": records})
    return 0


def ways(method: str, form: str, taken: Mapping[Form, Way]) -> list[Way]:
    """Return what is tried with the first seed."""
    if form in WEIGHTS:
        lr = taken[method, "plain"].lr
        return [Way(method, form, weight, lr) for weight in WEIGHTS[form]]
    return [Way(method, form, 0.0, lr) for lr in RATES[method, form]]


if __name__ == "__main__":
    sys.exit(main())
