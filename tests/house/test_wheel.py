"""The release: one wheel for every Python, which works in a clean environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from talos_kernels import compiled_library

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "talos", "talos_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = outside | {"TALOS_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def built_wheel(folder: Path) -> Path:
    """Build from a copy, so that nothing of an earlier build gets in."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": ignored} if (ROOT / name).is_dir() else {}))
    run(sys.executable, "setup.py", "-q", "bdist_wheel", cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def clean_environment(folder: Path) -> Path:
    """Return the Python of a new environment that sees torch and the like, but no talos."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # Of a folder in a .pth file, its own .pth files, an editable install's, are not read.
    Path(own.strip(), "outside.pth").write_text(sysconfig.get_path("purelib"))
    missing = "import importlib.util as util; print(util.find_spec('talos'), util.find_spec('torch'))"
    talos, torch = run(python, "-c", missing, cwd=folder).split(" ", 1)
    assert talos == "None" and "ModuleSpec" in torch
    return python


@pytest.mark.slow
@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="environments lie elsewhere on Windows")
def test_the_wheel_serves_every_python_and_takes_the_demos_first_step(tmp_path: Path) -> None:
    sources, outside = tmp_path / "sources", tmp_path / "outside"
    sources.mkdir(), outside.mkdir()
    wheel = built_wheel(sources)
    assert "-py3-none-" in wheel.name
    python = clean_environment(tmp_path / "environment")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=outside)
    where = "import talos, talos_kernels as t; print(talos.__file__, t.compiled_library)"
    package, library = run(python, "-c", where, cwd=outside).split()
    assert Path(package).is_relative_to(tmp_path)
    if compiled_library is not None:
        assert Path(library).name == "_C.so"
    first_step = ("calibrate", "--data", "character_kind", "--samples", "32", "--rounds", "1")
    run(python.with_name("talos"), *first_step, "--out", "mask.safetensors", cwd=outside)
    assert (outside / "mask.safetensors").stat().st_size > 1_000_000
