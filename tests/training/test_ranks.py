"""Checkpoints of several ranks: rank 0 writes, each has generators and a place of its own."""

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import talos
from talos.distributed import rank
from talos.errors import TalosError
from talos.files import load_file
from tests.cases import assert_bit_equal
from tests.distributed.processes import in_processes
from tests.training.test_checkpoints import Drawn, attention_and_data, only, train
from tests.training.test_loop import CLASSES, half_mask


def training(folder: Path, **options: Any) -> tuple[talos.TaskVector, list[float]]:
    """Trains with dropout on batches that each rank draws; returns what every rank drew, too."""
    model, data = attention_and_data()
    drawn: list[float] = []
    options = {
        "on_step": lambda _: drawn.append(random.random() + float(torch.rand(()))),
        **options,
    }
    seed = options.pop("seed", 5) + rank()
    _, vector = train(model, Drawn(data), folder, seed, mask=half_mask(model), **options)
    return vector, drawn


def failed(folder: Path, **options: Any) -> str:
    try:
        training(folder, **options)
    except TalosError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def with_a_full_disk(folder: Path) -> str:
    """Fails where rank 0 writes."""
    fsync = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    os.fsync = full
    try:
        return failed(folder)
    finally:
        os.fsync = fsync


def on_two(folder: Path) -> dict[str, Any]:
    whole, drawn = training(folder / "whole")
    start = only(folder / "whole", 2, folder / f"from-{rank()}")  # rank 0 tells which is the newest
    if rank() == 0:
        shutil.copytree(start, folder / "three")
        shutil.copytree(start, folder / "one")
    torch.distributed.barrier()
    resumed, rest = training(folder / "from-0", resume=True, seed=17)
    return {
        "whole": whole,
        "resumed": resumed,
        "drawn": drawn,
        "rest": rest,
        "full": with_a_full_disk(folder / "full"),
        "other": failed(folder / "whole", resume=True, data={"rank": rank()}),
        "again": failed(folder / "whole"),
        "given": failed(folder / "new" if rank() == 0 else None),
        "every": failed(folder / "new", every=1 + rank()),
        "wrong": failed(folder / "new", every=rank()),
        "keep": failed(folder / "new", keep=1 + rank()),
        "resume": failed(folder / "new", resume=rank() == 0),
        "moved": [moved(folder / "moved"), moved(folder / "moved", resume=True)],
    }


def moved(folder: Path, *, resume: bool = False) -> tuple[talos.TaskVector, torch.Tensor]:
    """Trains a model with a buffer that moves on each rank by itself and that the loss depends on.

    The second training goes on after the second step.
    """
    model, data = attention_and_data()
    model.register_buffer("average", torch.zeros(CLASSES))
    if resume and rank() == 0:
        for step in (3, 4):
            (folder / f"step-{step:08}.safetensors").unlink()
    torch.distributed.barrier()
    _, vector = train(
        model, data[rank() :], folder, resume=resume, method="nonlinear", logits_fn=averaged
    )
    return vector, model.average


def averaged(model: Any, batch: Any) -> torch.Tensor:
    logits = model(batch[0])
    with torch.no_grad():
        model.average.lerp_(logits.mean(0), 0.5)
    return logits + model.average.sin() * logits


def on_another_number(folder: Path) -> tuple[talos.TaskVector, int]:
    vector, rest = training(folder, resume=True)
    return vector, len(rest)


def test_every_rank_goes_on_with_its_own_bits(tmp_path: Path) -> None:
    first, second = in_processes(2, on_two, tmp_path)
    for found in (first, second):
        assert found["resumed"] == found["whole"] == first["whole"]
        assert found["rest"] == found["drawn"][2:]
        assert len(found["rest"]) == 2
    assert first["drawn"] != second["drawn"]

    assert first["full"].startswith("TalosOSError: path must be writable")
    assert second["full"].startswith("TalosRuntimeError: rank 0 raised TalosOSError: path must be")
    assert not list((tmp_path / "full").iterdir())
    assert first["other"] != "nothing" != second["other"]
    for name, text in (
        ("given", "TalosValueError: checkpoint must be the same on all ranks, got .*new"),
        (
            "every",
            "TalosValueError: every must be the same on all ranks, got '1' on rank 0 and '2'",
        ),
        ("wrong", "every must be an integer of at least 1, got 0"),
        ("keep", "TalosValueError: keep must be the same on all ranks"),
        ("resume", "TalosValueError: resume must be the same on all ranks"),
    ):
        assert re.search(text, first[name])
        assert re.search(text, second[name])
    for (whole, average), (resumed, again) in (first["moved"], second["moved"]):
        assert resumed == whole
        assert_bit_equal(again, average)
    assert not torch.equal(first["moved"][0][1], second["moved"][0][1])
    assert "must be a folder without checkpoints" in first["again"]
    assert "rank 0 raised TalosOSError: checkpoint must be a folder" in second["again"]

    _, content = load_file(
        tmp_path / "whole" / "step-00000004.safetensors", "checkpoint", finite=False
    )
    assert len(content["orders"]) == 2

    vectors = in_processes(3, on_another_number, tmp_path / "three")
    assert [rest for _, rest in vectors] == [2, 2, 2]
    assert vectors[0][0] == vectors[1][0] == vectors[2][0]
    vector, rest = on_another_number(tmp_path / "one")
    assert rest == 2
    assert vector.mask == first["whole"].mask
