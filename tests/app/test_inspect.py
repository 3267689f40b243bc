"""`talos inspect`: parents of a merged file, metadata in words, two files side by side."""

import json
import re
from pathlib import Path

import pytest
import torch

import talos
from talos.app.cli import main
from talos.masks import Mask
from talos.task_vectors import Patch, TaskVector
from tests.app.test_cli import refused

NAME = "layer.0.query.weight"


def vector(picked: list[bool], values: list[float], **metadata: object) -> TaskVector:
    mask = Mask.from_dense({NAME: torch.tensor(picked).reshape(2, 2)})
    return TaskVector(mask, torch.tensor(values), metadata=metadata)


@pytest.fixture
def pair() -> list[TaskVector]:
    return [
        vector([True, True, True, False], [3.0, 1.0, 2.0], task="a", method="talos", model="m"),
        vector([False, True, True, True], [1.0, -2.0, 5.0], task="b", method="lota", model="m"),
    ]


def test_parents_are_a_table(
    pair: list[TaskVector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = talos.merge(pair, "trim", density=0.25, scaling_coefs=[0.5, -1.0])
    path = tmp_path / "e.safetensors"
    (0.25 * inner + 2.0 * pair[0]).save(path)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.split("\nparents\n")[1].splitlines()]
    head = rows.index(["coefficient", "task", "method", "model", "entries", "kept"])
    assert rows[head + 1 : head + 5] == [
        ["0.25", "trim"],
        ["0.5", "a", "talos", "m", "1"],
        ["-1", "b", "lota", "m", "1"],
        ["2", "a", "talos", "m"],
    ]
    assert "{" not in shown
    assert "..." not in shown


def test_a_trimmed_sum_still_shows_its_parents(
    pair: list[TaskVector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "e.safetensors"
    (pair[0] - pair[1]).trim(0.5).save(path)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\n 1 +a +talos +m", shown)
    assert re.search(r"\n -1 +b +lota +m", shown)
    assert re.search(r"\n trimmed +0.5 ", shown)
    assert "sum" not in shown.split("\nmade by\n")[1]


def test_metadata_are_in_words_and_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, names = tmp_path / "m.safetensors", [f"encoder.layer.{i}.own.weight" for i in range(30)]
    about = {"passed_over": 0, "left_out": {"names": names, "share": 0.5}, "samples_of_rounds": [4]}
    Mask.from_dense({NAME: torch.eye(2) > 0}, metadata=about).save(path)
    assert main(["inspect", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "frozen tensors passed over 0" in shown
    assert "left out: share 0.5" in shown
    assert "samples of rounds 4" in shown
    assert all(name in shown for name in names)


def test_two_vectors_side_by_side(
    pair: list[TaskVector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for each, path in zip(pair, paths, strict=True):
        each.save(path)
    assert main(["inspect", *paths]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    cosine = (1.0 * 1.0 - 2.0 * 2.0) / (5 * 5) ** 0.5  # of (1, 2) and (1, -2)
    assert f"cosine {cosine:.3f} on the 2 entries that both select" in shown
    assert "intersection over union 0.500 (0.600 by chance)" in shown
    assert re.search(r"query +4 +3 +3 +2 +0.500", shown)
    assert re.search(r"selected by both +66.7 % +66.7 %", shown)
    assert re.search(r"task +a +b", shown)
    assert not re.search(r"\bmodel\b", shown)  # it is the same
    assert main(["inspect", *paths, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["overlap"]
    assert found["cosine"] == pytest.approx(cosine)
    assert (found["entries"], found["iou"]) == (2, 0.5)
    assert found["metadata"] == {"task": ["a", "b"], "method": ["talos", "lota"]}


def test_what_cannot_stand_side_by_side(
    pair: list[TaskVector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, patch, mask, wide = (tmp_path / f"{n}.safetensors" for n in ("v", "p", "m", "w"))
    pair[0].save(first)
    Patch({NAME: (2, 2)}, {NAME: torch.tensor([1])}, {NAME: torch.ones(1)}).save(patch)
    Mask.from_dense({"other": torch.eye(2) > 0}).save(mask)
    Mask.from_dense({NAME: torch.ones(3, 3) > 0}).save(wide)
    message = "FILE must be a mask or task vector beside another one, got the patch"
    refused(["inspect", str(first), str(patch)], capsys, message, tmp_path)
    message = "both FILE must agree on the shape of"
    refused(["inspect", str(first), str(wide)], capsys, message, tmp_path)
    message = "FILE must be given once or twice, got 3"
    refused(["inspect", *[str(first)] * 3], capsys, message, tmp_path)
    message = "--layers must be left out with two files"
    refused(["inspect", str(first), str(mask), "--layers"], capsys, message, tmp_path)
    assert main(["inspect", str(first), str(mask)]) == 0
    shown, err = capsys.readouterr()
    assert "no tensor in common" in err
    assert "cosine" not in shown
