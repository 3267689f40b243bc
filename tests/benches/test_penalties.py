"""The penalties are what their formulas say, and a strong one holds the encoder where it was."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor

import talos
from benches import penalties
from benches.penalties import Study, Way
from talos.app.tasks import Task
from talos.names import named_parameters
from tests.app.experiments.tiny_experiment import TASKS, tiny_encoder, tiny_tasks


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two tasks on a tiny encoder; the texts without labels are those of the second."""
    tasks = {task.name: task for task in tiny_tasks()}

    def load(name: str, sizes: object) -> Task:
        return tasks[name]

    monkeypatch.setattr(penalties, "load_encoder", lambda _: tiny_encoder(tmp_path))
    monkeypatch.setattr(penalties, "load_task", load)
    for name, value in {
        "TASKS": TASKS,
        "UNLABELLED": TASKS[1],
        "STEPS": 60,
        "BATCH": 4,
        "TOKENS": 12,
        "SAMPLES": 8,
    }.items():
        monkeypatch.setattr(penalties, name, value)
    return Study(0)


def moved(study: Study) -> dict[str, Tensor]:
    """Move all weights of the encoder, and return by how much."""
    changes = {}
    with torch.no_grad():
        for place, (name, param) in enumerate(named_parameters(study.models.model).items()):
            torch.manual_seed(place)
            changes[name] = 0.01 * torch.randn_like(param)
            param.add_(changes[name])
    return changes


@pytest.mark.parametrize("form", ["localization", "unlabelled", "curvature"])
def test_a_penalty_is_zero_at_the_pretrained_weights_and_positive_elsewhere(
    form: str, study: Study
) -> None:
    penalty = study.penalty(form, TASKS[0])
    assert penalty is not None
    study.encoder.train()  # as while training, with dropout
    assert penalty().item() == pytest.approx(0, abs=1e-9)
    assert study.encoder.training
    moved(study)
    assert penalty().item() > 1e-7


def test_curvature_is_the_other_tasks_scores_times_the_squares(study: Study) -> None:
    scores = talos.fisher_diag(study.models.classifiers[TASKS[1]], study._samples(TASKS[1]), seed=0)
    penalty = study.penalty("curvature", TASKS[0])
    assert penalty is not None
    changes = moved(study)
    expected = sum(float((scores[n] / 8 * changes[n].square()).sum()) for n in scores) / 2
    assert penalty().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", ["localization", "curvature"])
def test_training_with_a_penalty_ends_where_it_is_small(form: str, study: Study) -> None:
    found = []
    for way in (Way("nonlinear", "plain", 0.0, 1e-2), Way("nonlinear", form, 1e6, 1e-2)):
        vector = study.train(way, TASKS[0])
        penalty = study.penalty(form, TASKS[0])
        assert penalty is not None
        with vector.applied(study.models.model), torch.no_grad():
            found.append(penalty().item())
    assert 0 < found[1] < found[0] / 2


def test_an_even_mask_takes_as_much_of_each_tensor(study: Study) -> None:
    mask = study.mask(TASKS[0], True)
    for index in mask.indices.values():
        assert index.nnz == round(0.1 * index.numel)


def test_a_summary_compares_each_form_with_the_plain_one_of_its_method(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalties, "STEPS", 3)
    monkeypatch.setattr(penalties, "WEIGHTS", dict.fromkeys(penalties.WEIGHTS, (1.0, 1e4)))
    monkeypatch.setattr(penalties, "RATES", dict.fromkeys(penalties.RATES, (3e-2,)))
    out = tmp_path / "penalties.json"
    assert penalties.main(["--out", str(out), "--seeds", "2"]) == 0
    found = json.loads(out.read_text())
    assert [(each["method"], each["form"]) for each in found["summary"]] == penalties.FORMS
    assert any(each["gain"]["value"] for each in found["summary"])
    for each in found["summary"]:
        form = each["method"], each["form"]
        tried = [r for r in found["records"] if (r["method"], r["form"], r["seed"]) == (*form, 0)]
        best = max(r["validation"] for r in tried)
        assert [r["validation"] for r in tried if r["taken"]] == [pytest.approx(best)]
        taken = [r for r in found["records"] if (r["method"], r["form"]) == form and r["taken"]]
        plain = [
            r
            for r in found["records"]
            if (r["method"], r["form"]) == (form[0], "plain") and r["taken"]
        ]
        assert [r["seed"] for r in taken] == [0, 1]
        sums = [[r["absolute"]["value"] for r in rows] for rows in (taken, plain)]
        assert each["alone"]["value"] == pytest.approx(fmean(r["alone"] for r in taken))
        assert each["absolute"]["value"] == pytest.approx(fmean(sums[0]))
        assert each["gain"]["value"] == pytest.approx(fmean(sums[0]) - fmean(sums[1]))
        assert each["gain"]["low"] <= each["gain"]["value"] <= each["gain"]["high"]
