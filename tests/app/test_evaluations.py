"""`talos eval` and `talos compare` against models that are copied, edited and asked directly."""

import csv
import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from talos import Mask, TaskVector, fine_tune
from talos.app.cli import main
from talos.app.cli.figures import NOTES
from talos.app.cli.loading import load_data
from talos.app.models import Classifier, Encoder, load_encoder
from talos.app.report.runs import compare, from_hex, load_runs, to_hex
from talos.app.tasks import Task
from talos.errors import TalosValueError
from talos.names import named_parameters
from tests.app.report_data import MODELS, made_up
from tests.tiny import save_tiny_encoder

Term = tuple[float, str]  # a coefficient and the task of a vector

WORDS = {"pets": ("meow", "woof"), "signs": ("plus", "minus")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two tasks whose texts differ in length, and a strong random vector of each."""
    folder = tmp_path_factory.mktemp("evaluations")
    save_tiny_encoder(folder / "model")
    encoder = load_encoder(str(folder / "model"))
    weights = named_parameters(encoder)
    for seed, (task, words) in enumerate(WORDS.items()):
        with (folder / f"{task}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label"])
            rows.writerows(
                [f"{word} {'x' * (i % 7)} {i}", word] for word in words for i in range(80)
            )
        draw = torch.Generator().manual_seed(seed)
        chosen = {
            name: torch.rand(each.shape, generator=draw) < 0.3
            for name, each in weights.items()
            if name.endswith(("query.weight", "intermediate.dense.weight"))
        }
        mask = Mask.from_dense(chosen)
        values = torch.randn(mask.nnz, generator=draw)
        TaskVector(mask, values, metadata={"task": task}).save(folder / f"{task}.safetensors")
    return folder


def options(folder: Path, *tasks: str) -> list[str]:
    data = [word for task in WORDS for word in ("--data", str(folder / f"{task}.csv"))]
    own = [word for task in tasks for word in ("--vector", str(folder / f"{task}.safetensors"))]
    return ["--model", str(folder / "model"), "--max-length", "16", *data, *own]


@cache
def loaded(folder: Path, task: str) -> tuple[Encoder, Classifier, Task]:
    data = load_data(str(folder / f"{task}.csv"))
    assert isinstance(data, Task)
    encoder = load_encoder(str(folder / "model"))
    return encoder, encoder.classifier(data.class_texts), data


@cache
def logits(folder: Path, task: str, split: str, *terms: Term, prune: str = "") -> Tensor:
    """Logits on a task's examples, in their order, of a copy with vectors added to it."""
    encoder, classifier, data = loaded(folder, task)
    model = deepcopy(classifier).eval()
    weights = named_parameters(model)
    with torch.no_grad():
        for coef, name in terms:
            vector = TaskVector.load(folder / f"{name}.safetensors")
            for each in vector.mask.names:
                weights[each] += coef * vector.to_dense(each)
        if prune:
            mask = TaskVector.load(folder / f"{prune}.safetensors").mask
            for each in mask.names:
                weights[each][mask.to_dense(each)] = 0
        batches = data.batches(split, encoder.tokenizer, batch_size=7, max_length=16)
        return torch.cat([model(batch) for batch in batches])


def right(folder: Path, task: str, split: str, *terms: Term, prune: str = "") -> Tensor:
    labels = torch.tensor([each.label for each in loaded(folder, task)[2].examples(split)])
    return logits(folder, task, split, *terms, prune=prune).argmax(1) == labels


def share(answers: Tensor) -> float:
    return float(answers.double().mean())


def test_every_metric_is_that_of_copies(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sum.json"
    asked = ["--metric", "all", "--points", "3", "--json", str(path)]
    assert main(["eval", *options(folder, "signs", "pets"), *asked]) == 0
    shown, err = capsys.readouterr()
    for word in ("normalised", "negation", "disentanglement error", "expansion", "by chance"):
        assert word in shown, word
    assert err.rstrip().endswith(f"talos compare {path} OTHER.json")
    assert not re.search("pretrained(?! model)", shown)  # the model may be an edited one
    run = json.loads(path.read_text())
    metrics, tasks = run["metrics"], list(WORDS)
    coefs = [0.0, 0.5, 1.0]
    test = {
        (task, terms): right(folder, task, "test", *terms)
        for task in tasks
        for terms in (
            (),
            *(((1.0, one),) for one in tasks),
            *(((c, "pets"), (c, "signs")) for c in coefs),
            *(((-c, one),) for one in tasks for c in coefs),
        )
    }
    before = {task: share(test[task, ()]) for task in tasks}
    alone = {task: share(test[task, ((1.0, task),)]) for task in tasks}
    for task in tasks:
        found = metrics["accuracy"]["tasks"][task]
        assert found["pretrained"]["value"] == before[task]
        assert found["single"]["value"] == alone[task]
        assert found["difference"]["value"] == pytest.approx(alone[task] - before[task])
        for kind, terms in (("pretrained", ()), ("single", ((1.0, task),))):
            answers = from_hex(run["outcomes"][kind][task], run["tasks"][task]["examples"])
            assert torch.equal(answers, test[task, terms])
        for other in tasks:
            ratio = metrics["interference"][task][other]["value"]
            assert ratio == share(test[other, ((1.0, task),)]) / before[other]
            ratio = metrics["sensitivity"][task][other]["value"]
            assert ratio == share(right(folder, other, "test", prune=task)) / before[other]
    check_addition(folder, metrics["addition"], test, coefs)
    answers = {t: from_hex(run["outcomes"]["edited"][t], len(test[t, ()])) for t in tasks}
    coef = run["scaling_coef"]
    assert coef == metrics["addition"]["scaling_coef"]
    for task in tasks:
        assert torch.equal(answers[task], test[task, ((coef, "pets"), (coef, "signs"))])
    for target, control in (tasks, tasks[::-1]):
        found = metrics["negation"][target]
        terms = ((-found["scaling_coef"], target),)
        assert found["target"]["value"] == share(test[target, terms])
        assert found["control"]["value"] == share(test[control, terms])
        assert (f"{target}, subtracted: no coefficient " in shown) == (found["scaling_coef"] == 0)
        assert (found["why_zero"] is None) == (found["scaling_coef"] != 0)
    assert "left out" not in shown
    check_disentanglement(folder, metrics["disentanglement"], coefs)
    masks = [TaskVector.load(folder / f"{t}.safetensors").mask for t in metrics["iou"]["tasks"]]
    assert metrics["iou"]["iou"][0][1] == masks[0].iou(masks[1])


def check_addition(
    folder: Path, found: dict[str, Any], test: dict[Any, Tensor], coefs: list[float]
) -> None:
    normalised = []
    for coef, point in zip(coefs, found["grid"], strict=True):
        ratios = []
        for task in WORDS:
            merged = right(folder, task, "validation", (coef, "pets"), (coef, "signs"))
            assert point["tasks"][task] == share(merged)
            ratios.append(share(merged) / share(right(folder, task, "validation", (1.0, task))))
        normalised.append(sum(ratios) / 2)
        assert point["normalised"] == pytest.approx(normalised[-1])
    best = found["scaling_coef"]
    assert normalised[coefs.index(best)] == max(normalised)
    merged = {t: share(test[t, ((best, "pets"), (best, "signs"))]) for t in WORDS}
    alone = {t: share(test[t, ((1.0, t),)]) for t in WORDS}
    assert found["absolute"]["value"] == pytest.approx(sum(merged.values()) / 2)
    expected = sum(merged[task] / alone[task] for task in WORDS) / 2
    assert found["normalised"]["value"] == pytest.approx(expected)


def check_disentanglement(folder: Path, found: dict[str, Any], coefs: list[float]) -> None:
    first, second = found["tasks"]
    assert found["scaling_coefs"] == coefs
    for i, a in enumerate(coefs):
        for j, b in enumerate(coefs):
            error = 0.0
            for task, own in ((first, a), (second, b)):
                alone = logits(folder, task, "test", (own, task)).argmax(1)
                both = logits(folder, task, "test", (a, first), (b, second)).argmax(1)
                error += share(alone != both)
            assert found["error"][i][j] == pytest.approx(error)


def test_one_vector_at_its_coefficient_is_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for scale in ("0.5", "1"):
        paths.append(tmp_path / f"at{scale}.json")
        written = ["--scale", scale, "--json", str(paths[-1])]
        assert main(["eval", *options(folder, "pets"), *written]) == 0
    capsys.readouterr()
    assert main(["compare", *map(str, paths)]) == 0
    shown, err = capsys.readouterr()
    assert re.search(r"pets +at0.5 +0.50 ", shown)
    assert f"--model {folder / 'model'} --data {folder / 'pets.csv'} --data" in err
    rows = compare([run for path in paths for run in load_runs(path)])
    assert [(row.task, row.run) for row in rows] == [
        (task, run) for task in (None, *WORDS) for run in ("at0.5", "at1")
    ]
    answers = {
        (task, c): right(folder, task, "test", (c, "pets")) for task in WORDS for c in (0.5, 1.0)
    }
    for row, coef in zip(rows, 3 * (0.5, 1.0), strict=True):
        tasks = list(WORDS) if row.task is None else [row.task]
        mean = sum(share(answers[task, coef]) for task in tasks) / len(tasks)
        first = sum(share(answers[task, 0.5]) for task in tasks) / len(tasks)
        assert row.accuracy["value"] == pytest.approx(mean)
        if coef == 0.5:
            assert row.difference is None
        else:
            assert row.difference is not None
            assert row.difference["value"] == pytest.approx(mean - first)
            assert row.difference["low"] <= row.difference["value"] <= row.difference["high"]
    accuracy = json.loads(paths[1].read_text())["metrics"]["accuracy"]["tasks"]
    assert [accuracy[str(row.task)]["edited"] for row in rows[3::2]] == [
        row.accuracy for row in rows[3::2]
    ]


def test_a_grid_shows_every_task(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.json"
    asked = ["--scale", "grid", "--points", "3", "--json", str(path)]
    assert main(["eval", *options(folder, "pets"), *asked]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"scale +{' +'.join(WORDS)} +absolute", shown)
    for point in json.loads(path.read_text())["metrics"]["accuracy"]["grid"]:
        coef = point["scaling_coef"]
        wanted = {task: share(right(folder, task, "validation", (coef, "pets"))) for task in WORDS}
        assert point["tasks"] == pytest.approx(wanted)
        cells = " +".join(f"{100 * each:.1f}" for each in (*wanted.values(), point["absolute"]))
        assert re.search(rf"{coef:.2f} +{cells}", shown)


@pytest.mark.parametrize("scale", ["0.25", "0"])
def test_the_sum_that_was_measured_is_made_by_the_commands_proposed_next(
    folder: Path, capsys: pytest.CaptureFixture[str], scale: str
) -> None:
    assert main(["eval", *options(folder, *WORDS), "--scale", scale]) == 0
    proposed = capsys.readouterr().err.split("next\n")[1]
    files = [folder / f"{task}.safetensors" for task in WORDS]
    if scale == "0":
        assert proposed.split() == ["talos", "inspect", *map(str, files)]
        return
    terms = " ".join(f"{file}:0.25" for file in files)
    data = " ".join(f"--data {folder / task}.csv" for task in WORDS)
    assert proposed.splitlines() == [
        f"  talos merge {terms} --out edit.safetensors",
        f"  talos export {terms} --base {folder / 'model'} {data} --out edited",
    ]


def test_a_sum_belongs_to_the_task_that_it_was_made_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for task in ("signs", "pets"):
        files += ["--vector", str(tmp_path / f"half-{task}.safetensors")]
        (0.5 * TaskVector.load(folder / f"{task}.safetensors")).save(files[-1])
    assert main(["eval", *options(folder), *files, "--metric", "accuracy", "--json", "-"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert [each["task"] for each in run["vectors"]] == ["signs", "pets"]
    for task in WORDS:
        expected = share(right(folder, task, "test", (0.5, task)))
        assert run["metrics"]["accuracy"]["tasks"][task]["single"]["value"] == expected


def test_a_vector_that_subtracts_is_not_negated_with_all_metrics(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    negated = tmp_path / "n.safetensors"
    (-0.5 * TaskVector.load(folder / "pets.safetensors")).save(negated)
    asked = ["--vector", str(negated), "--metric", "all", "--points", "2"]
    assert main(["eval", *options(folder), *asked]) == 0
    shown, err = capsys.readouterr()
    assert "negation was left out: --vector must be that of a task" in err
    assert "negation" not in shown


def test_a_control_that_is_only_guessed_is_doubted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {task: share(right(folder, task, "validation")) > 0.5 for task in WORDS}
    assert set(known.values()) == {True, False}
    asked = ["--metric", "negation", "--points", "2"]
    assert main(["eval", *options(folder, *WORDS), *asked]) == 0
    err = capsys.readouterr().err
    for target, control in (WORDS, tuple(WORDS)[::-1]):
        doubted = f"warning: the control of {target} ({control}) has " in err
        assert doubted != known[control]


def test_a_merge_is_measured_instead_of_the_sum(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets, signs = (TaskVector.load(folder / f"{task}.safetensors") for task in WORDS)
    merged = tmp_path / "merged.safetensors"
    (0.5 * pets - 0.25 * signs).save(merged)
    asked = ["--merged", str(merged), "--scale", "0.5", "--metric", "addition", "--json", "-"]
    assert main(["eval", *options(folder, *WORDS), *asked]) == 0
    run = json.loads(capsys.readouterr().out)
    for task in WORDS:
        expected = right(folder, task, "test", (0.25, "pets"), (-0.125, "signs"))
        assert run["metrics"]["addition"]["tasks"][task]["value"] == share(expected)
        assert torch.equal(from_hex(run["outcomes"]["edited"][task], len(expected)), expected)
    asked = ["--merged", str(merged), "--metric", "negation"]
    assert main(["eval", *options(folder, *WORDS), *asked]) == 2
    assert "--metric must hold addition with --merged, got negation" in capsys.readouterr().err


def test_what_all_leaves_out_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", "--metric", "all", "--points", "2", *options(folder, "pets")]
    assert main(asked) == 0
    shown, err = capsys.readouterr()
    assert "addition was left out: --vector must be given at least 2 times, got 1" in err
    assert "disentanglement was left out: --vector must be given 2 times, got 1" in err
    assert "linearity was" not in err
    assert "\n\n\n" not in shown


def test_a_search_that_ends_in_no_edit_says_so() -> None:
    nothing, reason = {"why_zero": None}, {"why_zero": "no coefficient helps"}
    for metric in ("accuracy", "addition"):
        assert list(NOTES[metric](reason)) == ["no coefficient helps"]
        assert not list(NOTES[metric](nothing))
    found = list(NOTES["negation"]({"pets": reason, "signs": nothing}))
    assert found == ["pets, subtracted: no coefficient helps"]


@pytest.fixture(scope="module")
def forgettable(folder: Path) -> Path:
    """A vector that pets are recognised with, and signs not: subtracted, both have little of it."""
    encoder, classifier, data = loaded(folder, "pets")
    model = deepcopy(classifier)
    batches = list(data.batches("train", encoder.tokenizer, batch_size=32, max_length=16))
    vector = fine_tune(model, batches, method="nonlinear", steps=40, lr=3e-3)
    path = folder / "tuned.safetensors"
    replace(vector, metadata={"task": "pets"}).save(path)
    return path


def test_a_task_is_forgotten_with_a_control(
    folder: Path, forgettable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "forgot.json"
    pets, signs = (str(folder / f"{task}.csv") for task in WORDS)
    common = ["eval", "--model", str(folder / "model"), "--max-length", "16", "--points", "6"]
    asked = ["--vector", str(forgettable), "--keep", "0.5", "--forget", "pets", "--data", pets]
    assert main([*common, *asked, "--control", signs, "--json", str(path)]) == 0
    out, shown = capsys.readouterr()
    run = json.loads(path.read_text())
    (found,) = run["metrics"].values()
    tried = found["pets"]["grid"]
    vector = TaskVector.load(forgettable)
    pretrained = share(right(folder, "signs", "validation"))
    for point in tried:
        after = of_vector(folder, "signs", "validation", vector, -point["scaling_coef"])
        assert point["control"] == share(after)
        if point["target"] is None:
            assert point["control"] < 0.5 * pretrained
        else:
            after = of_vector(folder, "pets", "validation", vector, -point["scaling_coef"])
            assert point["target"] == share(after)
    coef = found["pets"]["scaling_coef"]
    assert 0 < coef == -run["scaling_coef"]
    assert re.search(rf"\n +{-coef:.2f} .*◂", out)
    assert re.search(rf"\n *pets +{-coef:.2f} ", out)
    assert re.search(r"\n +0.00 ", out)
    assert list(run["tasks"]) == ["pets", "signs"]  # the control was added to the data
    for task in WORDS:
        answers = of_vector(folder, task, "test", vector, -coef)
        assert torch.equal(from_hex(run["outcomes"]["edited"][task], len(answers)), answers)
    assert f"talos merge {forgettable}:{-coef:g} --out edit.safetensors" in shown
    assert f"talos export {forgettable}:{-coef:g} --base {folder / 'model'} --data" in shown
    every = ["--data", pets, "--data", signs, "--vector", str(forgettable), "--json", "-"]
    assert main([*common, *every, "--forget", pets, "--keep", "0.5"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == run["metrics"]
    assert main([*common, *every, "--metric", "negation"]) == 0  # all others, 95 %
    kept = json.loads(capsys.readouterr().out)["metrics"]["negation"]["pets"]["grid"]
    assert all(p["control"] >= 0.95 * pretrained for p in kept if p["target"] is not None)


def of_vector(folder: Path, task: str, split: str, vector: TaskVector, coef: float) -> Tensor:
    encoder, classifier, data = loaded(folder, task)
    labels = torch.tensor([each.label for each in data.examples(split)])
    with vector.applied(classifier.eval(), coef), torch.no_grad():
        batches = data.batches(split, encoder.tokenizer, batch_size=7, max_length=16)
        return torch.cat([classifier(batch) for batch in batches]).argmax(1) == labels


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--control signs", "--forget must be given with --control, got none"),
        ("--keep 0.9", "--forget must be given with --keep, got none"),
        ("--forget pets --keep 1.5 --vector {v}", "--keep must lie in"),
        ("--forget pets", "--vector must be given once with --forget, .*, got 0"),
        ("--forget pets --vector {v} --scale 1", "--scale must be left out with --forget, got 1"),
        (
            "--forget pets --vector {v} --metric iou",
            "--metric must be left out with --forget, got iou",
        ),
        ("--forget none --vector {v}", "--forget must be a task of --data, pets, signs, got none"),
        ("--forget signs --vector {v}", "--forget must be the task of the vector, pets, got signs"),
        (
            "--forget pets --vector {v} --control pets",
            "--control must be a task other than pets, which is forgotten, got pets",
        ),
        ("--forget pets --vector {v} --control nowhere", "--control must be a built-in task"),
        ("--forget pets --vector {n}", "--vector must be the vector of the task to forget, got .*"),
        ("--metric negation --vector {n}", "--vector must be the vector of the task to forget, .*"),
        ("--scale grid --vector {n}", "--scale must be a number for .*n.safetensors, .*--forget"),
        ("--forget signs --vector {s}", "--forget must be the task of the vector, pets, got signs"),
        ("--forget pets --vector {b}", "--forget must be the .*, pets and signs, got pets"),
        ("--data {f}/../{name}/pets.csv", "--data must differ"),
        (
            "--forget pets --vector {v} --control {f}/../{name}/pets.csv",
            "--control must be a task other than pets",
        ),
    ],
)
def test_what_cannot_be_forgotten_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    message: str,
) -> None:
    vector = folder / "pets.safetensors"
    negated = tmp_path / "n.safetensors"
    (-0.6 * TaskVector.load(vector)).save(negated)
    single, both = tmp_path / "s.safetensors", tmp_path / "b.safetensors"
    loaded = TaskVector.load(vector)
    (0.5 * loaded).save(single)
    (loaded + TaskVector.load(folder / "signs.safetensors")).save(both)
    names = {"v": vector, "n": negated, "s": single, "b": both, "f": folder, "name": folder.name}
    words = asked.format(**names).split()
    assert main(["eval", *options(folder), *words]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) <= 2


def test_json_alone_is_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *options(folder), "--json", "-"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert (run["schema"], run["vectors"], run["scaling_coef"]) == ("talos-eval", [], None)


@pytest.mark.parametrize("count", [1, 8, 13])
def test_answers_come_back_from_their_digits(count: int) -> None:
    answers = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(from_hex(to_hex(answers), count), answers)
    for wrong, message in (("zz", "hexadecimal digits"), ("00" * 9, f"must be {count} bits")):
        with pytest.raises(TalosValueError, match=message):
            from_hex(wrong, count)


def run_of(answers: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """A minimal file of `talos eval`, of a run without vectors."""
    return {
        "schema": "talos-eval",
        "schema_version": 1,
        "tasks": {t: {"examples": len(a), "fingerprint": t} for t, a in answers.items()},
        "vectors": [],
        "outcomes": {"pretrained": {task: to_hex(each) for task, each in answers.items()}},
        **changes,
    }


def test_a_comparison_says_what_is_linearized_and_cuts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a_long_name_of_a_run_" * 3
    paths = [tmp_path / f"{name}{i}.json" for i in range(2)]
    known = {"model": "tiny", "tasks": {"a": {"examples": 3, "fingerprint": "a", "data": "a.csv"}}}
    answers = {"a": torch.tensor([True, False, True])}
    for path, linearized in zip(paths, (False, True), strict=True):
        path.write_text(json.dumps(run_of(answers, **known, linearized=linearized)))
    assert main(["compare", *map(str, paths[::-1])]) == 0
    shown, err = capsys.readouterr()
    assert f"{name}1 (linearized) " in shown
    assert re.search(rf"{name}0 +66.7", shown)
    assert "…" not in shown
    assert "--data a.csv --linearized --vector" in err


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (run_of({"b": torch.ones(3) > 0}), "RUN must be of the same tasks, got a in .*and b in"),
        (
            run_of({"a": torch.ones(3) > 0}, tasks={"a": {"examples": 3, "fingerprint": "x"}}),
            "RUN must be of the same test examples, got others of a",
        ),
        (run_of({"a": torch.ones(3) > 0}, schema="x"), "must be the JSON of `talos eval --json`"),
        (run_of({"a": torch.ones(3) > 0}, schema_version=9), "must have schema_version 1, got 9"),
        (run_of({"a": torch.ones(3) > 0}, tasks=None), "got a damaged file"),
        (
            run_of({"a": torch.ones(3) > 0}, tasks={"a": {"examples": math.inf}}),
            "got a damaged file",
        ),
        *(
            (made_up() | {part: wrong}, "the accuracies of each run, got a damaged file")
            for part, wrong in (("models", 3), ("runs", [{"seed": 0}]), ("runs", [{"seed": []}]))
        ),
        (run_of({"a": torch.ones(3) > 0}, vectors=[{}]), "evaluate them with --metric addition"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(
    second: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, run in zip(paths, (run_of({"a": torch.ones(3) > 0}), second), strict=True):
        path.write_text(json.dumps(run))
    assert main(["compare", *map(str, paths)]) == 2
    err = capsys.readouterr().err
    with pytest.raises(TalosValueError, match=message):
        raise TalosValueError(err)


def test_the_runs_of_an_experiment_have_estimates_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    results = made_up(MODELS[:1])
    results["models"][0]["source"] = "tiny"
    path.write_text(json.dumps(results))
    assert main(["compare", str(path)]) == 0
    out, shown = capsys.readouterr()
    assert "without answers, so without differences" in shown
    assert "talos eval --model tiny --data TASK --vector" in shown
    assert re.search(r"mean +\S+ talos-density-0.1, seed 0 +0.65 ", out)
    rows, runs = compare(load_runs(path)), results["runs"]
    added = [run["addition"] for run in runs]
    assert [row.accuracy for row in rows[: len(runs)]] == [each["absolute"] for each in added]
    assert [row.normalised for row in rows[: len(runs)]] == [each["normalised"] for each in added]
    assert all(row.difference is None for row in rows)
    path.write_text(json.dumps(made_up()))
    assert main(["compare", str(path)]) == 0
    out, shown = capsys.readouterr()
    assert "random, a <b> & $_$, seed 2" in out
    assert "the runs are of different models" in shown


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--metric", "fisher"], "--metric must be accuracy, addition"),
        (["--metric", "addition"], "--vector must be given at least 2 times, got 1"),
        (["--metric", "linearity", "--linearized"], "--linearized must be left out"),
        (["--vector", "PETS"], "--vector must be given once for each task, got two of pets"),
        (["--vector", "SIGNS", "--vector", "SIGNS"], "--data must be given for each --vector"),
        (["--merged", "SIGNS"], "--vector must be given for each merged task with --merged"),
        (["--json", "run.txt"], "--json must end in .json"),
        (["--points", "1"], "--points must be an integer of at least 2"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(
    asked: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {task.upper(): str(folder / f"{task}.safetensors") for task in WORDS}
    asked = [files.get(word, word) for word in asked]
    assert main(["eval", *options(folder, "pets"), *asked]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_another_model_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = Mask.from_dense({"encoder.other.weight": torch.ones(2, 2) > 0})
    name = next(iter(TaskVector.load(folder / "pets.safetensors").mask.names))
    for made, lead in (
        ("org/other", "was made with --model org/other, got --model model: "),
        ("model", ": "),
    ):
        path, vector = tmp_path / "mask.safetensors", tmp_path / "v.safetensors"
        replace(mask, metadata={"model": made}).save(path)
        words = ["--model", str(folder / "model"), "--data", str(folder / "pets.csv")]
        out = tmp_path / "out.safetensors"
        assert main(["train", *words, "--mask", str(path), "--out", str(out)]) == 2
        assert re.search(f"error: {path} ?{lead}mask must name param", capsys.readouterr().err)
        TaskVector(mask, torch.ones(4), metadata={"model": made}).save(vector, overwrite=True)
        assert main(["eval", *options(folder), "--vector", str(vector)]) == 2
        assert re.search(f"error: {vector} ?{lead}task vector must", capsys.readouterr().err)
        weight = {name: torch.zeros(32, 32)}
        other = TaskVector.from_models(weight, {name: torch.ones(32, 32)}, metadata={"model": made})
        other.save(vector, overwrite=True)
        assert main(["eval", *options(folder), "--vector", str(vector)]) == 2
        error = capsys.readouterr().err
        assert re.search(f"error: {vector} ?{lead}model must be the base", error)
        assert "force" not in error
    assert not out.exists()


def test_a_number_in_place_of_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    runs = [{"model": MODELS[0], "row": "a", "seed": 10**400, "addition": "x"}]
    path.write_text(json.dumps({**made_up(), "runs": runs}))
    with pytest.raises(TalosValueError, match="must hold the accuracies of each run"):
        load_runs(path)
