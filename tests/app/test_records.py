"""What --json writes: the same figures as the tables, and nothing else on stdout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from talos.app.cli import main
from talos.app.cli.records import write_record
from talos.app.report.runs import EVAL_SCHEMA, EVAL_SCHEMA_VERSION
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.app.test_cli import refused
from tests.tiny import save_tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [
        f"{word} {i},{label}"
        for word, label in (("meow", "cat"), ("woof", "dog"))
        for i in range(20)
    ]
    path = tmp_path / "pets.csv"
    path.write_text("\n".join(["text,label", *rows]))
    return str(path)


def record(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """Run a command with --json -; return the JSON, which is all of stdout."""
    capsys.readouterr()
    assert main([*map(str, words), "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["schema"] == f"talos-{words[0]}"
    assert found["schema_version"] == 1
    assert {"created", "versions"} <= set(found)
    return found


def test_calibration_and_training(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, vector = tmp_path / "m.safetensors", tmp_path / "v.safetensors"
    common = ["--model", model, "--data", data, "--batch-size", "8"]
    found = record(capsys, "calibrate", *common, "--samples", "16", "--rounds", "1", "--out", mask)
    loaded = Mask.load(mask)
    assert (found["selected"], found["entries"]) == (loaded.nnz, loaded.numel)
    assert found["density"] == loaded.density
    assert sum(row["selected"] for row in found["layers"]) == loaded.nnz
    assert {row["type"] for row in found["layers"]} >= {"query", "key"}
    assert found["metadata"]["stability"] == loaded.metadata["stability"]
    assert found["bytes"] == mask.stat().st_size
    found = record(capsys, "train", *common, "--mask", mask, "--steps", "3", "--out", vector)
    assert len(found["losses"]) == 3
    assert found["entries"] == loaded.nnz
    assert found["metadata"] == TaskVector.load(vector).metadata


def test_merge_extract_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = (
        {"a": torch.zeros(4), "b": torch.ones(3)},
        {"a": torch.ones(4), "b": torch.ones(3)},
    )
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    first = tmp_path / "v.safetensors"
    files = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    found = record(capsys, "extract", *files, "--out", first)
    assert (found["entries"], found["norm"]) == (7, 2.0)
    assert found["types"][-1] == {"type": "total", "tensors": 2, "entries": 7, "changed": 4}
    merged = tmp_path / "e.safetensors"
    found = record(capsys, "merge", f"{first}:0.5", f"{first}:0.25", "--out", merged)
    assert found["files"] == [{"file": str(merged), "bytes": merged.stat().st_size}]
    assert [part["scale"] for part in found["metadata"]["sum"]] == [0.75]
    out = tmp_path / "out.safetensors"
    found = record(capsys, "export", merged, "--base", files[0], "--out", out)
    assert (found["files"], found["bytes"]) == ([str(out)], out.stat().st_size)


def test_comparisons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.app.report_data import made_up

    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up()))
    found = record(capsys, "compare", path)
    runs = made_up()["runs"]
    assert [row["accuracy"] for row in found["rows"][: len(runs)]] == [
        run["addition"]["absolute"] for run in runs
    ]


def test_a_file_is_written_beside_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector, out = tmp_path / "v.safetensors", tmp_path / "e.safetensors"
    TaskVector(Mask.from_dense({"w": torch.ones(2) > 0}), torch.ones(2)).save(vector)
    words = ["merge", str(vector), "--out", str(out), "--json", str(tmp_path / "merge.json")]
    assert main(words) == 0
    shown, err = capsys.readouterr()
    assert "2 entries" in shown
    assert "merge.json: the figures as JSON" in err
    assert json.loads((tmp_path / "merge.json").read_text())["entries"] == 2
    out.unlink()
    refused(words, capsys, "--json must not exist, .*--overwrite", tmp_path)
    words[-1] = str(tmp_path / "merge.txt")
    refused(words, capsys, "--json must end in .json", tmp_path)
    plan = ["calibrate", "--data", "a", "--dry-run", "--json", "-"]
    refused(plan, capsys, "--json must be left out with --dry-run", tmp_path)


def test_the_schema_of_eval_is_the_one_that_compare_reads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_record("-", "eval", {})
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["schema_version"]) == (EVAL_SCHEMA, EVAL_SCHEMA_VERSION)
    with pytest.raises(TalosValueError, match="finite"):
        write_record("-", "eval", {"a": float("nan")})
