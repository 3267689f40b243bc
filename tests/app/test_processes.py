"""Commands that torchrun starts in several processes: the same file, one voice, exit code 2."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from talos.app.cli import main
from talos.app.cli.options import as_options
from talos.errors import TalosRuntimeError
from talos.task_vectors import TaskVector
from tests.tiny import save_pets, save_tiny_encoder

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COMMAND = ("-m", "talos.app.cli")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_encoder(tmp_path / "tiny")
    save_pets(tmp_path, 30)
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun does: sums of more threads have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def calibrate(folder: Path, out: str) -> list[str]:
    words = ["calibrate", "--model", folder / "tiny", "--data", folder / "pets.csv"]
    words += ["--out", folder / out, "--samples", "40", "--batch-size", "8", "--rounds", "2"]
    return [str(word) for word in words]


def in_two(*words: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *TORCHRUN, *COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_the_mask_of_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(calibrate(folder, "one.safetensors")) == 0
    alone = capsys.readouterr().out
    found = in_two(*calibrate(folder, "two.safetensors"))
    assert found.returncode == 0, found.stderr
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    table, written = alone.split("\n\n", 1)  # a line has the speed
    assert found.stdout.split("\n\n")[0] == table
    assert found.stdout.count("entries (density") == written.count("entries (density") == 1


@pytest.mark.slow
def test_two_processes_train_one_vector(folder: Path) -> None:
    words = ["train", "--model", folder / "tiny", "--data", folder / "pets.csv", "--steps", "2"]
    found = in_two(*map(str, [*words, "--out", folder / "v.safetensors"]))
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("entries") == found.stderr.count("pets.csv: 60 rows") == 1
    assert TaskVector.load(folder / "v.safetensors").metadata["steps"] == 2


@pytest.mark.slow
def test_an_error_ends_both_processes_with_one_message(folder: Path) -> None:
    (folder / "m.safetensors").touch()
    found = in_two(*calibrate(folder, "m.safetensors"))
    assert found.returncode == 1  # torchrun's
    assert found.stderr.count("error: --out must not exist, got ") == 1
    assert "exitcode: 2" in found.stderr.replace("exitcode  : 2", "exitcode: 2")
    assert not found.stdout
    assert not (folder / "m.safetensors").stat().st_size


def test_other_commands_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("talos.app.cli.app.several", lambda: 2)
    assert main(["inspect", "m.safetensors"]) == 2
    assert capsys.readouterr().err == (
        "error: talos inspect must run in one process, got 2 by WORLD_SIZE; start it without "
        "torchrun\n"
    )


def test_processes_that_do_not_meet_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["calibrate", "--help"]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: the processes must meet at MASTER_ADDR and MASTER_PORT, got ")
    assert found.endswith("; start them with torchrun\n")


def test_an_error_of_another_process_names_its_rank_and_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        with as_options({"rank": "--rank", "path": "--mask"}):
            raise TalosRuntimeError("rank 1 raised TalosOSError: path must be a file, got none")

    monkeypatch.setattr("talos.app.cli.app.app", fail)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "error: rank 1: --mask must be a file, got none\n"


def test_a_process_that_is_gone_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("talos.app.cli.app.app", fail)
    text = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection reset by peer"
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "error: every process must run to the end, got one that is gone; its own output may say "
        "why; a training with --checkpoint goes on with --resume\n"
    )
    text = "a fault of our own"
    with pytest.raises(RuntimeError, match="our own"):
        main(["train"])


def test_the_group_ends_with_its_block() -> None:
    """Threads that outlive it end the process with SIGABRT, now and then."""
    script = """
import os
from talos.app.cli import processes

processes.several = lambda: 2
with processes.joined():
    import torch.distributed.nn.functional
    inside = len(os.listdir("/proc/self/task"))
print(inside, len(os.listdir("/proc/self/task")))
"""
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **group, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    inside, after = map(int, found.stdout.split())
    assert after == 1 < inside
