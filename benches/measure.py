"""What every bench shares: the machine's description, its rooflines, a clock that waits."""

import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from talos.app.costs.meters import (
    clock,
    copy_bandwidth,
    median_and_spread,
    median_seconds,
    peak_bytes,
    seconds,
    synchronise,
)

__all__ = [
    "ROOT",
    "alternated",
    "calls_for",
    "clock",
    "commit",
    "copy_bandwidth",
    "device_name",
    "folder_name",
    "load",
    "machine",
    "matrix_rate",
    "median_and_spread",
    "median_seconds",
    "peak_bytes",
    "rounds_for",
    "seconds",
    "synchronise",
    "target_device",
    "triton_version",
]

ROOT = Path(__file__).resolve().parent.parent
SHORT_SECONDS, SLOW_SECONDS = 4e-3, 5.0
MATRIX_WIDTH = {"cpu": 2048, "cuda": 8192}


def target_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rounds_for(first: float) -> int:
    """How often to repeat what took `first` seconds: about 8 seconds of it, 3 to 20 times.

    What takes more than SLOW_SECONDS is timed once: the slowest of torch's own ways take minutes.
    """
    return 1 if first > SLOW_SECONDS else max(3, min(20, int(8 / max(first, 1e-9))))


def calls_for(first: float, kind: str) -> int:
    """How often a round calls what took `first` seconds: on a GPU what is short, 10 times."""
    return 10 if kind == "cuda" and first < SHORT_SECONDS else 1


def alternated(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, in turns; the call before it, which is not timed, fills caches."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            work()
            times[name] += seconds(work, 1)
    return times


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of square matrices, a multiplication and a sum being two."""
    width = MATRIX_WIDTH[device.type]
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * width**3 / median_seconds(lambda: torch.mm(left, right, out=out))


@cache
def device_name() -> str:
    """The device as people name it, also the folder of its results."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model.replace('(R)', '')}, {os.cpu_count()} cores"


def folder_name(device: str) -> str:
    """A device's name as the name of a folder: lower case, words joined by dashes."""
    words = "".join(c if c.isalnum() else " " for c in device.lower()).split()
    return "-".join(words)


@cache
def commit() -> str:
    """The commit measured, with `+` if the tree differs from it; TALOS_COMMIT where git is not."""
    try:
        name = _git("rev-parse", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TALOS_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def load() -> float | None:
    """Processes that wanted a core in the last minute: a CPU's times mean little if others did."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def machine() -> dict[str, object]:
    """What a result must say about where it was measured."""
    return {
        "device": device_name(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "hip": torch.version.hip,
        "triton": triton_version(),
        "python": platform.python_version(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "commit": commit(),
    }
