"""examples/: each command of its README is executed, and what it says of the outcome must hold."""

import ast
import doctest
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import talos
from talos_kernels._ops import compiled_library

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "examples" / "README.md").read_text()
NANOGPT = (ROOT / "examples" / "nanogpt.py").read_text()
# A changed line of nanogpt.py and the comment above it with the line that stood there.
CHANGED = re.compile(r"^( *)# was: (.+)\n.+\n", re.MULTILINE)
TEMPORARY = "temporary"
SMALL = ["--width=32", "--layers=1", "--block=32", "--pretrain=100", "--steps=60"]


# Runs an example and keeps the model that its main() returns.
KEEP_THE_MODEL = """
import runpy, sys, torch
model = runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
torch.save(model.state_dict(), "tuned.pt")
"""


def block(title: str, language: str) -> str:
    """The fenced block of a language under a heading of the README."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert section is not None, title
    found = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.M | re.S)
    assert len(found) == 1, (title, language)
    return str(found[0])


def run(command: list[str], folder: Path) -> str:
    """What a command prints; the folder stands for the top of the repository."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env["TMPDIR"] = str(folder / TEMPORARY)
    Path(env["TMPDIR"]).mkdir(exist_ok=True)
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def run_block(title: str, folder: Path, *options: str) -> str:
    """Execute a section's commands, with options behind the last, and compare the output."""
    commands = " ".join([block(title, "bash").rstrip(), *options])
    printed = run(["bash", "-euc", commands], folder)
    wanted = block(title, "text")
    assert doctest.OutputChecker().check_output(wanted, printed, doctest.ELLIPSIS), printed
    return printed


def numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


def losses(printed: str) -> dict[str, list[float]]:
    """Of each split the losses before and after."""
    return {
        split: [float(loss) for loss in re.findall(rf"{split} loss ([\d.]+)", printed)]
        for split in ("training", "validation")
    }


@pytest.mark.slow
def test_plain_pytorch_learns_the_mirrored_digits(tmp_path: Path) -> None:
    printed = run_block("plain_pytorch.py", tmp_path).splitlines()
    (digits, before), (_, after), (file, model), (_, half), taken_off = map(numbers, printed)
    assert digits > 90
    assert after > before + 15
    assert before < half < after
    assert taken_off == [digits, before]
    assert 6 * file < model
    assert {each.name for each in tmp_path.iterdir()} == {"examples", TEMPORARY}
    path = tmp_path / TEMPORARY / "mirrored.safetensors"
    assert path.stat().st_size == file
    vector = talos.TaskVector.load(path)
    assert vector.mask.density == pytest.approx(0.1, abs=1e-3)
    assert "3.weight" not in vector.mask.names  # the head, which was frozen


def test_plain_pytorch_is_about_thirty_lines() -> None:
    path = ROOT / "examples" / "plain_pytorch.py"
    body = ast.parse(path.read_text()).body[1:]  # without the docstring
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = path.read_text().splitlines()[imports[-1].lineno :]
    assert len([line for line in lines if line.strip()]) <= 36


@pytest.mark.slow
def test_nanogpt_learns_prose(tmp_path: Path) -> None:
    printed = run_block("nanogpt.py", tmp_path, *SMALL)
    assert {each.name for each in tmp_path.iterdir()} == {"examples", TEMPORARY}
    for before, after in losses(printed).values():
        assert after < before - 0.02


def test_the_readme_shows_the_three_changed_lines() -> None:
    changed = [textwrap.dedent(match[0]) for match in CHANGED.finditer(NANOGPT)]
    assert len(changed) == 3
    assert block("nanogpt.py", "python") == "\n".join(changed)


@pytest.mark.slow
def test_nanogpt_is_an_adamw_trainer_but_for_three_lines(tmp_path: Path) -> None:
    ordinary = CHANGED.sub(r"\1\2\n", NANOGPT).replace("import talos\n", "")
    names = {node.id for node in ast.walk(ast.parse(ordinary)) if isinstance(node, ast.Name)}
    assert "talos" not in names
    (tmp_path / "ordinary.py").write_text(ordinary)
    for before, after in losses(
        run(["python", "ordinary.py", *SMALL, "--lr=3e-3", "--out=."], tmp_path)
    ).values():
        assert after < before - 0.02

    # What it saved is the model that the sparse form begins with, here with a GradScaler.
    sparse = ["examples/nanogpt.py", *SMALL, "--init=model.pt", "--dtype=float16", "--out=."]
    printed = run(["python", "-c", KEEP_THE_MODEL, *sparse], tmp_path)
    before, after = losses(printed)["training"]
    assert after < before
    base, tuned = (
        torch.load(tmp_path / name, map_location="cpu", weights_only=True)
        for name in ("model.pt", "tuned.pt")
    )
    vector = talos.TaskVector.load(tmp_path / "prose.safetensors")
    moved = 0
    for name, old in base.items():
        selected = torch.zeros_like(old, dtype=torch.bool)
        if name in vector.mask.names:
            selected = vector.mask.to_dense(name)
            torch.testing.assert_close(tuned[name] - old, vector.to_dense(name))
        differs = tuned[name].view(torch.int32) != old.view(torch.int32)
        assert not differs[~selected].any(), name
        moved += int(differs.sum())
    assert 0.9 * vector.mask.nnz < moved <= vector.mask.nnz


needs_compiler = pytest.mark.skipif(
    compiled_library is None or shutil.which("c++") is None or sys.platform != "linux",
    reason="needs Linux, a C++ compiler and talos_kernels/_C, which an install with one builds",
)


@pytest.mark.slow
@needs_compiler
def test_the_cpp_program_steps_through_the_dispatcher(tmp_path: Path) -> None:
    run_block("cpp/step.cpp", tmp_path)
    missing = subprocess.run(
        ["./step", "nothing.so"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert "nothing.so" in missing.stderr


def test_the_cpp_program_prints_what_torch_computes() -> None:
    """Its second witness: the entries it says it trains, and how far torch's AdamW moves them."""

    def pattern(shape: tuple[int, ...], seed: int) -> torch.Tensor:
        i = torch.arange(torch.Size(shape).numel()) + seed
        return ((i * 7919 % 1999 - 999).double() / 1000).view(shape)

    params = [torch.nn.Parameter(pattern((50, 60), 1)), torch.nn.Parameter(pattern((50,), 2))]
    before = [param.detach().clone() for param in params]
    selected = [pattern(tuple(param.shape), 4) > 0.5 for param in params]
    for param in params:
        param.grad = pattern(tuple(param.shape), 3)
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
    moves = [
        (param.detach() - old).abs()[chosen]
        for param, old, chosen in zip(params, before, selected, strict=True)
    ]
    trained, entries = torch.cat(moves), sum(param.numel() for param in params)
    line = block("cpp/step.cpp", "text").splitlines()[0]
    assert line == (
        f"3 steps on {len(trained)} of {entries} entries, "
        f"which moved by {trained.mean().item():.5f} on average"
    )
