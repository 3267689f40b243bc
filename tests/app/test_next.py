"""The commands proposed next: with the model and the data at hand, and never in a circle."""

from pathlib import Path

import pytest
import torch

from talos.app.cli import main
from talos.app.cli.console import command
from talos.app.cli.suggestions import after_vector, model_option, train_longer
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.tiny import save_tiny_encoder


def proposed(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  talos ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("next")
    rows = "".join(f"meow {i},cat\nwoof {i},dog\n" for i in range(10))
    (made / "pets.csv").write_text(f"text,label\n{rows}")
    save_tiny_encoder(made / "tiny")
    return made


def test_eval_proposes_a_mask_first_and_more_steps_where_a_vector_does_not_help(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    same = "--model tiny --data pets.csv"
    assert main(f"eval {same} --batch-size 4".split()) == 0
    [line] = proposed(capsys.readouterr().err)
    assert line == f"talos calibrate {same} --out mask.safetensors"
    train = f"train {same} --steps 1 --lr 1e-9 --max-length 8 --out v.safetensors"
    assert main(train.split()) == 0
    assert proposed(capsys.readouterr().err)[0].startswith(f"talos eval {same} --vector v.safetens")
    assert main(f"eval {same} --vector v.safetensors --scale grid --points 2".split()) == 0
    [line] = proposed(capsys.readouterr().err)
    assert line == f"talos train {same} --method nonlinear --steps 2 --out longer.safetensors"
    record = "--scale 0 --json e.json --overwrite"
    assert main(f"eval {same} --vector v.safetensors {record}".split()) == 0
    assert proposed(capsys.readouterr().err) == ["talos compare e.json OTHER.json"]


def test_an_out_that_is_proposed_is_not_there_yet(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    same = ["--model", str(folder / "tiny"), "--data", str(folder / "pets.csv")]
    for name in ("mask", "mask-2", "mask-3"):
        for words in (["calibrate", *same, "--dry-run"], ["eval", *same]):
            assert main(words) == 0
            [line] = proposed(capsys.readouterr().err)
            assert line.endswith(f" --out {name}.safetensors")
        Path(f"{name}.safetensors").touch()
    Path("edited").mkdir()
    assert command("export", "v", "--out", "edited") == "talos export v --out edited-2"


def test_a_vector_is_followed_by_its_own_model_base_and_tasks() -> None:
    file = Path("v.safetensors")
    made = {"model": "tiny", "task": "code_package", "method": "linearized"}
    assert after_vector(file, made, model_option(made)) == (
        "talos eval --model tiny --data code_package --vector v.safetensors --scale grid "
        "--linearized"
    )
    both = {"sum": [{"scale": 0.5, "of": made}, {"scale": 1.0, "of": {**made, "task": "digits"}}]}
    assert "--data code_package --data digits" in after_vector(file, both, ())
    assert "--data TASK" in after_vector(file, {**made, "task": "pets"}, ())
    extracted = {"extracted": {"base": "bert", "tuned": "bert-pets"}}
    assert after_vector(file, extracted, ()) == (
        "talos export v.safetensors --base bert --out edited"
    )
    assert "--mask MASK.safetensors --steps 200" in str(train_longer("minilm", "a.csv", {}))
    for untrained in (both, extracted):
        assert train_longer("minilm", "a.csv", untrained) is None


def test_the_own_tasks_of_a_merge_are_named_where_their_files_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    parts = [{"scale": 0.5, "of": {"task": task}} for task in ("pets", "away", "code_package")]
    merge = after_vector(Path("v.safetensors"), {"sum": parts}, ())
    assert "eval --data pets.csv --data TASK --data code_package --vector" in merge


def test_a_vector_of_another_base_is_refused_before_any_figure(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name = "encoder.layer.0.attention.self.query.weight"
    mask = Mask.from_dense({name: torch.ones(32, 32) > 0})
    vector = TaskVector(mask, torch.ones(1024), fingerprints={name: "0" * 16})
    vector.save(folder / "other.safetensors", overwrite=True)
    monkeypatch.setattr("talos.evaluation.Outcomes.of", pytest.fail)
    for words in ("", "--scale grid"):
        line = f"eval --model tiny --data pets.csv --vector other.safetensors {words}"
        assert main(line.split()) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "must be the base that the task vector was made from" in err
