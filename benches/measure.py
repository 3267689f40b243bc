"""What every bench shares: the machine's description, its rooflines, a clock that waits."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # several times every cache
MATRIX_WIDTH = {"cpu": 2048, "cuda": 8192}


def target_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds, after all work given to the device is done: the timer of every bench."""
    synchronise()
    return time.perf_counter()


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """The time of each of `rounds` calls of `work`, each call waited for."""
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        times.append(clock() - start)
    return times


def rounds_for(first: float) -> int:
    """How often to repeat what took `first` seconds: about 8 seconds of it, 3 to 20 times."""
    return max(3, min(20, int(8 / max(first, 1e-9))))


def median_seconds(work: Callable[[], object], rounds: int = 10, warmup: int = 3) -> float:
    """The median time of one call of `work`, each call waited for."""
    for _ in range(warmup):
        work()
    return median(seconds(work, rounds))


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """The median and the distance between the quartiles, 0 of a single time."""
    if len(times) == 1:
        return times[0], 0.0
    low, middle, high = quantiles(times, method="inclusive")
    return middle, high - low


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of one tensor copied into another, reads and writes counted: the roofline."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


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


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes that one call of `work` holds at most beyond what was allocated before.

    On the CPU: of torch's allocator, from its own record of every allocation, in their order.
    Memory from before the call that `work` gives back is not subtracted there.
    """
    if torch.cuda.is_available():
        synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = accumulate((event.nbytes() for event in changes), initial=0)
    return max(held)
