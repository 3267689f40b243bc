"""Damaged files, given to every command that reads a file: exit code 2 and a line that names it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benches.damage import joined, parts
from talos.app.cli import main
from talos.app.cli.app import app
from talos.app.models.heads import HEAD_FILE, Head, save_heads
from talos.masks import Mask
from talos.task_vectors import TaskVector

Damage = Callable[[bytes], bytes]
ANY: dict[str, Damage] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "pickled": lambda raw: pickle.dumps(raw, 4),
    "zipped": lambda raw: b"PK\x03\x04" + raw,
    "no text": lambda raw: b"\xff\xfe\x00\x80" * 40,
    "nested": lambda raw: b"[" * 5000,
}
TENSORS: dict[str, Damage] = ANY | {
    "one byte less": lambda raw: raw[:-1],
    "one byte more": lambda raw: raw + b"\0",
    "another length": lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:],
    "another header": lambda raw: joined(b'{"a":1}', parts(raw)[1]),
    "twice": lambda raw: raw + raw,
}
CHECKED: dict[str, Damage] = TENSORS | {
    "a flipped bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 4]),
    "no metadata": lambda raw: joined(
        json.dumps({k: v for k, v in json.loads(parts(raw)[0]).items() if k[0] != "_"}).encode(),
        parts(raw)[1],
    ),
}
ROWS = "text,label\n" + "".join(f"{word} {i},{word}\n" for word in ("cat", "dog") for i in range(4))
LINES: dict[str, dict[str, Damage]] = {
    "inspect mask.safetensors": CHECKED,
    "inspect vector.safetensors": CHECKED,
    "inspect whole.safetensors mask.safetensors": CHECKED,
    "train --data whole.csv --mask mask.safetensors --out out.safetensors": CHECKED,
    "merge whole.safetensors vector.safetensors --out out.safetensors": CHECKED,
    "merge recipe.toml": ANY,
    "eval --data whole.csv --vector vector.safetensors --scale 1": CHECKED,
    "export vector.safetensors --base whole --out out": CHECKED,
    "export whole.safetensors --base base/model.safetensors --out out": TENSORS,
    "extract base/model.safetensors whole --out out.safetensors": TENSORS,
    "extract whole base/model.safetensors --out out.safetensors": TENSORS,
    "compare run.json": ANY,
    "report run.json --out out.html": ANY,
    "plot summary run.json --out out.svg": ANY,
    "experiment study.toml --out out": ANY,
    "calibrate --data data.csv --out out.safetensors": ANY,
    "calibrate --data data.jsonl --out out.safetensors": ANY,
    "predict --model classifier --data whole.csv --out out.csv": CHECKED,
    "demo --out out --data whole.csv --data data.csv": ANY,
}


def damaged_file(line: str) -> str:
    """Return the file of a command line that is damaged: the one that is not whole."""
    if "classifier" in line:
        return f"classifier/{HEAD_FILE}"
    words = [word for word in line.split() if "." in word and not word.startswith(("whole", "out"))]
    (found,) = words
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    mask = Mask.from_dense({"w": torch.tensor([True, False, True])})
    vector = TaskVector(mask, torch.tensor([1.0, 2.0]))
    mask.save(tmp_path / "mask.safetensors")
    vector.save(tmp_path / "vector.safetensors")
    vector.save(tmp_path / "whole.safetensors")
    for name in ("base", "whole"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.arange(3.0)}, tmp_path / name / "model.safetensors")
    head = Head("pets", "zero_shot", ("a", "b"), ("a", "b"), 9.0, 48, "", torch.ones(2, 3))
    (tmp_path / "classifier" / HEAD_FILE).parent.mkdir(parents=True)
    save_heads(tmp_path / "classifier" / HEAD_FILE, {"pets": head})
    for name, content in (
        ("recipe.toml", 'vectors = ["whole.safetensors"]\noutputs = ["out.safetensors"]\n'),
        ("study.toml", 'models = ["minilm"]\ntasks = ["whole.csv", "data.csv"]\n'),
        ("run.json", json.dumps({"schema": "talos-eval", "schema_version": 1})),
        ("whole.csv", ROWS),
        ("data.csv", ROWS),
        ("data.jsonl", '{"text": "a", "label": "b"}\n' * 9),
    ):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_file_ends_a_command_in_one_line(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / damaged_file(line)
    whole = file.read_bytes()
    for name, damage in LINES[line].items():
        file.write_bytes(damage(whole))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert main(line.split()) == 2, name
        out, err = capsys.readouterr()
        assert err.startswith("error: "), (name, err)
        assert err.count("\n") <= 2, (name, err)
        assert file.name in err, (name, err)
        assert "Traceback" not in out + err
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert after == before, name


def test_every_command_that_reads_a_file_is_there() -> None:
    commands = {each.name for each in app.registered_commands}
    assert commands == {line.split()[0] for line in LINES}


def test_names_in_files_give_no_orders_to_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\r"
    Mask.from_dense({"w": torch.ones(2) > 0}, metadata={evil: evil}).save(
        folder / "evil.safetensors"
    )
    (folder / "evil.csv").write_text(f"te{evil}xt,label\na,b\n")
    assert main(["inspect", "evil.safetensors"]) == 0
    assert main(["calibrate", "--data", "evil.csv", "--dry-run"]) == 2
    assert main(["inspect", f"{evil}.safetensors"]) == 2
    out, err = capsys.readouterr()
    assert "]0;title" in out
    assert "]0;title" in err
    assert not set("\x1b\x07\x9b\r") & set(out + err)
