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
FOLDERS = ("csrc", "talos", "talos_kernels")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"TALOS_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def built_wheel(folder: Path) -> Path:
    """Build in a copy of the sources, so that nothing of an earlier build gets in."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "setup.py", "-q", "bdist_wheel", cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def clean_environment(folder: Path) -> Path:
    """Return the Python of a new environment that sees torch and the like, but not talos."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # Python does not read the .pth files of a folder that is added so: no editable install gets in.
    Path(own.strip(), "outside.pth").write_text(sysconfig.get_path("purelib"))
    code = "from importlib.util import find_spec as f; print(f('talos'), f('torch') is not None)"
    assert run(python, "-c", code, cwd=folder).split() == ["None", "True"]
    return python


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the environment's programs lie elsewhere")
def test_the_wheel_serves_every_python_and_takes_the_demos_first_step(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    wheel = built_wheel(tmp_path / "sources")
    assert "-py3-none-" in wheel.name
    python = clean_environment(tmp_path / "environment")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=tmp_path)
    where = "import talos, talos_kernels as t; print(talos.__file__, t.compiled_library)"
    package, library = run(python, "-c", where, cwd=tmp_path).split()
    assert Path(package).is_relative_to(tmp_path / "environment")
    assert compiled_library is None or Path(library) == Path(package).parents[1].joinpath(
        "talos_kernels", "_C.so"
    )
    talos = python.with_name("talos")
    options = ("--data", "character_kind", "--samples", "32", "--rounds", "1")
    run(talos, "calibrate", *options, "--out", "mask.safetensors", cwd=tmp_path)
    assert "0.1" in run(talos, "inspect", "mask.safetensors", cwd=tmp_path)
