"""`talos train` in several processes: each takes its share of every batch."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from talos.app.cli import main
from talos.distributed import world_size
from talos.task_vectors import TaskVector
from tests.cases import REDUCTION_TOLERANCES
from tests.distributed.processes import in_processes
from tests.tiny import save_pets, save_tiny_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An encoder without dropout, and 39 rows to train on: each fifth batch of 8 has seven."""
    config = save_tiny_encoder(tmp_path / "tiny") / "config.json"
    own = json.loads(config.read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(own | none))
    save_pets(tmp_path, 23, ("meow, but otherwise", "cat"))
    return tmp_path


def train(folder: Path, *words: str, steps: int = 6, batch_size: int = 8) -> int:
    out = f"v{world_size()}.safetensors"
    given = ["--model", folder / "tiny", "--data", folder / "pets.csv", "--out", folder / out]
    given += ["--steps", steps, "--batch-size", batch_size]
    return main([*map(str, ["train", *given]), *words])


def test_the_vector_is_that_of_one_process(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "--lr", "1e-3") == 0
    assert "39 train" in capsys.readouterr().err
    assert in_processes(2, train, folder, "--lr", "1e-3") == [0, 0]
    one, two = (TaskVector.load(folder / f"v{ranks}.safetensors") for ranks in (1, 2))
    assert two.metadata == one.metadata
    assert two.fingerprints == one.fingerprints
    difference = two.values - one.values  # sums of another order, which Adam divides by small ones
    assert difference.norm() <= REDUCTION_TOLERANCES[torch.float32].rtol * one.values.norm()


def whole_batches(folder: Path) -> tuple[int, str]:
    """Trains on batches of 39 rows, which two processes cannot share."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = train(folder, steps=1, batch_size=40)
    return status, said.getvalue()


def test_a_batch_that_all_processes_take_whole_is_meant(folder: Path) -> None:
    for status, said in in_processes(2, whole_batches, folder):
        assert status == 0, said
        assert "first batch" not in said


def test_a_batch_that_cannot_be_shared_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("talos.app.cli.commands.train.several", lambda: 3)
    assert train(folder) == 2
    assert capsys.readouterr().err == (
        "error: --batch-size must be a multiple of the number of processes, 3, which share each "
        "batch, got 8\n"
    )
    assert not (folder / "v1.safetensors").exists()
