"""The command line starts at once: torch is imported where work begins, and public names show."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import talos

LOADED = """
import sys
from talos.app.cli import main
for line in ("--version", "--help", "calibrate --help", "calibrate --nonsense", "bogus", "train",
             "train --data a --data b --out v.safetensors", "calibrate --data a --density 2",
             "calibrate --data a --out m.pt", "train --data a --out v.safetensors --steps 0"):
    main(line.split())
    heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""


def test_what_needs_no_tensor_does_not_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import talos, talos_kernels; talos_kernels.errors",
        "import talos, torch; talos.Mask; import talos_kernels; talos_kernels.errors",
        "import talos_kernels.errors as own, talos; assert talos.TalosError is own.TalosError",
    ],
)
def test_the_errors_are_found_in_either_package(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "talos.app.cli", "--version"]
    assert subprocess.check_output(words, text=True) == f"talos {talos.__version__}\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_torch_is_imported_prints_a_line() -> None:
    code = """
import sys
import time
from talos.app.cli import main

class Waiting:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("ready", flush=True)
            time.sleep(60)  # until the signal comes

sys.meta_path.insert(0, Waiting())
sys.exit(main(["train", "--data", "a", "--out", "v.safetensors"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "\ninterrupted: nothing was written\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    ("target", "message"),
    [(">/dev/full", "must be writable, got No space left on device"), (">&-", "must be open")],
)
def test_results_that_cannot_be_printed_are_an_error(target: str, message: str) -> None:
    line = f"{sys.executable} -m talos.app.cli --version {target}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: stdout {message}")
    assert done.stderr.count("\n") == 1


def test_dir_shows_what_is_public() -> None:
    assert dir(talos) == sorted([*talos.__all__, "__version__"])
    with pytest.raises(AttributeError, match="module 'talos' has no attribute 'nonsense'"):
        _ = talos.nonsense
