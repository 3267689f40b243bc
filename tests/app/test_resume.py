"""`talos train --checkpoint`: a training that was stopped goes on, and writes the same file."""

import json
from pathlib import Path
from typing import Any

import pytest

from talos.app.cli import main
from talos.app.cli.console import Bars
from talos.files import atomic
from tests.tiny import save_tiny_encoder

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line without its outputs."""
    folder = tmp_path_factory.mktemp("inputs")
    model, data = save_tiny_encoder(folder / "tiny"), folder / "pets.csv"
    rows = [
        f"{word} {i},{label}"
        for i in range(30)
        for word, label in (("meow", "cat"), ("woof", "dog"))
    ]
    data.write_text("\n".join(["text,label", *rows]))
    line = f"train --model {model} --data {data} --method lota --steps 3 --batch-size 4 --every 2"
    return line.split()


def test_a_training_that_ctrl_c_stopped_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def outputs(name: str) -> list[str]:
        paths = {"--out": f"{name}.safetensors", "--json": f"{name}.json", "--checkpoint": name}
        return [word for key, path in paths.items() for word in (key, str(tmp_path / path))]

    assert main([*words, *outputs("whole")]) == 0
    summary = capsys.readouterr().out.split("entries")[1]

    shown: list[int] = []
    show = Bars.show

    def interrupted(self: Bars, label: str, done: int, *rest: Any) -> None:
        show(self, label, done, *rest)
        shown.append(done)
        if done == 5 and stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "show", interrupted)
    stop = True
    assert main([*words, *outputs("run")]) == 130
    assert capsys.readouterr().err.endswith(
        f"\ninterrupted: {tmp_path / 'run'} has the checkpoint of step 4; the same command and "
        "--resume goes on from there\n"
    )
    assert main([*words, *outputs("run")]) == 2
    assert "--checkpoint must be a folder without checkpoints" in (err := capsys.readouterr().err)
    assert "pass --resume, or choose" in err
    stop, shown[:] = False, []
    assert main([*words, *outputs("run"), "--resume"]) == 0
    assert shown == [4, 5, 6]
    told = capsys.readouterr()
    assert f"{tmp_path / 'run'}: goes on after step 4\n" in told.err
    assert told.out.split("entries")[1] == summary
    whole, resumed = (tmp_path / name for name in ("whole", "run"))
    same = [each.with_suffix(".safetensors").read_bytes() for each in (whole, resumed)]
    assert same[0] == same[1]
    records = [json.loads(each.with_suffix(".json").read_text()) for each in (whole, resumed)]
    assert len(records[0]["losses"]) == 6
    differ = {"file": "", "created": ""}
    assert records[0] | differ == records[1] | differ

    other = [*words, *outputs("other"), "--resume"]
    other[other.index("--checkpoint") + 1] = str(whole)
    for option, value, text in (
        ("--batch-size", "8", "batch_size=8 (there 4)"),
        ("--seed", "1", "seed=1 (there 0)"),
    ):
        assert main(replaced(other, option, value)) == 2
        err = capsys.readouterr().err
        assert "error: --resume must go on with the settings of " in err
        assert text in err
    data = Path(words[words.index("--data") + 1])
    assert data.suffix == ".csv"
    rows = data.read_text()
    with pytest.MonkeyPatch.context() as patch:  # other texts to train on, the same to test on
        patch.setattr("talos.app.tasks.task.Task.fingerprint", lambda self: "the same")
        assert main([*words, *outputs("more")]) == 0
        data.write_text(rows.replace("meow", "purr"))
        assert main([*words, *outputs("more"), "--resume", "--overwrite"]) == 2
    data.write_text(rows)
    assert "data.batches=" in capsys.readouterr().err


def replaced(words: list[str], option: str, value: str) -> list[str]:
    """The command line with another value of an option."""
    if option not in words:
        return [*words, option, value]
    place = words.index(option) + 1
    return [*words[:place], value, *words[place + 1 :]]


def test_a_full_disk_is_told_and_the_older_checkpoint_stays(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run, saves = tmp_path / "run", 0
    write = atomic.os.fsync

    def full(descriptor: int) -> None:
        nonlocal saves
        saves += 1
        if saves > 2:  # the file and the folder of the first checkpoint
            raise OSError(28, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", full)
    line = [*words, "--out", str(tmp_path / "v.safetensors"), "--checkpoint", str(run)]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert f"error: --checkpoint must be writable, got {run}" in err
    assert "No space left on device" in err
    assert [path.name for path in run.iterdir()] == ["step-00000002.safetensors"]
    monkeypatch.undo()
    assert main([*line, "--resume"]) == 0
