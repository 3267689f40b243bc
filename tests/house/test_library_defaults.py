"""Suites under other default dtypes and another default device: they must pass as they do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from talos import tensors as buffers
from tests.library_defaults import DEFAULTS, LibraryDefaults

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SUITES = (
    *("optim/test_optim.py", "optim/test_states.py", "optim/test_clipping.py"),
    *("task_vectors/test_task_vectors.py", "task_vectors/test_resident_vectors.py"),
    *("training/test_loop.py", "masks/test_masks.py"),
)


@pytest.mark.parametrize("name", DEFAULTS)
def test_suites_pass_under_other_defaults(name: str) -> None:
    """Two cases of each test: a factory without a dtype fails in any of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--quick", "-p", "no:cacheprovider"]
    command += [f"tests/{suite}" for suite in SUITES]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TALOS_LIBRARY_DEFAULTS": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_defaults_are_the_librarys_alone() -> None:
    source = "import torch\ndef make(): return torch.zeros(2)"
    library: dict[str, Any] = {}
    exec(compile(source, buffers.__file__, "exec"), library)
    make = library["make"]
    with LibraryDefaults("float64"):
        assert torch.zeros(2).dtype == torch.float32
        assert make().dtype == torch.float64
    with LibraryDefaults("meta"):
        assert make().is_meta
