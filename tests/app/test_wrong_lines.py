"""Wrong command lines: each ends with exit code 2 and one or two lines that name the option."""

from pathlib import Path

import pytest

from talos.app.cli import main

# The words of the command line, the option or argument that the message names, and a part of it.
LINES: tuple[tuple[str, str, str], ...] = (
    ("calibrate --data a --data b --out m.safetensors", "--data", "given once, got a and b"),
    ("calibrate --data a --model b --model c --dry-run", "--model", "given once, got b and c"),
    ("calibrate --data a --out m.safetensors --out=n.safetensors", "--out", "must be given once"),
    ("calibrate --data a --dry-run --density .1 --density .2", "--density", "given once, got .1"),
    ("train --data a --data a --out v.safetensors", "--data", "run `talos train` once for each"),
    ("train --data a --mask a --mask b --out v.safetensors", "--mask", "given once, got a and b"),
    ("train --data a --out v.safetensors --steps 1 --steps 2 --steps 3", "--steps", "1 and 2 and"),
    ("merge a:1 b:1 --out x.safetensors --out y.safetensors", "--out", "must be given once"),
    ("merge a:1 b:1 --method ties --method dare --out x.safetensors", "--method", "ties and dare"),
    ("extract a b --mask all --mask changed --out v.safetensors", "--mask", "all and changed"),
    ("export v --base a --base b --out c", "--base", "must be given once, got a and b"),
    ("eval --data a --model b --model c", "--model", "must be given once, got b and c"),
    ("eval --data a --scale 1 --scale 2", "--scale", "must be given once, got 1 and 2"),
    ("eval --data a --json a.json --json b.json", "--json", "given once, got a.json and b.json"),
    ("compare a.json b.json --seed 1 --seed 2", "--seed", "must be given once, got 1 and 2"),
    ("report a.json --out b.html --out c.html", "--out", "given once, got b.html and c.html"),
    ("demo --out a --out b", "--out", "must be given once, got a and b"),
)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(("line", "option", "phrase"), LINES, ids=[line for line, _, _ in LINES])
def test_a_wrong_line_is_told_by_its_option(
    line: str,
    option: str,
    phrase: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert 1 <= err.count("\n") <= 2
    assert option in err, err
    assert phrase in err, err
    assert "Traceback" not in err
    assert content(tmp_path) == before
