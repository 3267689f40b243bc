"""What every bench shares: the machine's description, clocks, counters and rooflines."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from talos.tensors import trim_heap

ROOT = Path(__file__).resolve().parent.parent
SHORT_SECONDS, SLOW_SECONDS = 4e-3, 5.0
MATRIX_WIDTH = {"cpu": 2048, "cuda": 8192}
_STATUS, RESIDENT_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # several times every cache


def target_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait for all work given to the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Return the time in seconds, after all work given to the device is done."""
    synchronise()
    return time.perf_counter()


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each call; each is waited for."""
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        times.append(clock() - start)
    return times


def median_seconds(work: Callable[[], object], rounds: int = 10, warmup: int = 3) -> float:
    for _ in range(warmup):
        work()
    return median(seconds(work, rounds))


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Return the median and the distance between the quartiles, 0 for a single time."""
    if len(times) == 1:
        return times[0], 0.0
    low, middle, high = quantiles(times, method="inclusive")
    return middle, high - low


def rounds_for(first: float) -> int:
    """Return how often to repeat what took `first` seconds: for about 8 seconds, 3 to 20 times.

    What takes more than SLOW_SECONDS is timed once: the slowest of torch's own ways take minutes.
    """
    return 1 if first > SLOW_SECONDS else max(3, min(20, int(8 / max(first, 1e-9))))


def calls_for(first: float, kind: str) -> int:
    """Return the calls in a round of what took `first` seconds: 10 if it is short on a GPU."""
    return 10 if kind == "cuda" and first < SHORT_SECONDS else 1


def alternated(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each work, timed in turns; an untimed call before each fills caches."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            work()
            times[name] += seconds(work, 1)
    return times


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second of a copy, with reads and writes: the roofline of moving bytes."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a matrix product; a multiplication and a sum are two."""
    width = MATRIX_WIDTH[device.type]
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * width**3 / median_seconds(lambda: torch.mm(left, right, out=out))


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that one call holds beyond what was allocated before.

    On the CPU these are read from the profiler's record of torch's allocator. Memory that existed
    before the call and that `work` frees is not subtracted there.
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
    recorded: Any = profiled.profiler
    changes = [each for each in recorded.kineto_results.events() if each.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((int(each.nbytes()) for each in changes), initial=0))


def resident(field: str) -> int:
    """Return a figure of this process's memory in bytes: "VmRSS", or "VmHWM", its peak."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{field}:")


def resident_peak(work: Callable[[], object]) -> int:
    """Return the most resident memory that one call takes beside what was there before, in bytes.

    It counts what torch's allocator does not know: NumPy's arrays, and holes in the heap.
    """
    trim_heap()
    before = resident("VmRSS")
    RESIDENT_PEAK.write_text("5")  # forgets the peak
    work()
    return resident("VmHWM") - before


def held_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes behind the tensors on a device; views of one memory count once."""
    memory = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in tensors
        if each.device.type == device.type
    }
    return sum(memory.values())


def launches(work: Callable[[], object]) -> int:
    """Return the kernels, copies and fills of one call; on the CPU the operators dispatched."""
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            work()
            synchronise()
        events: Any = profiled.events()
        return sum(1 for each in events if each.device_type.name == "CUDA")
    counter: Any = _Dispatched
    with counter() as counted:
        work()
    return int(counted.calls)


class _Dispatched(TorchDispatchMode):
    """Counts the operators that reach a device."""

    calls: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@cache
def device_name() -> str:
    """Return the device's name; the folder of its results is named after it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model.replace('(R)', '')}, {os.cpu_count()} cores"


@cache
def commit() -> str:
    """Return the commit, with `+` if the tree differs from it; TALOS_COMMIT where git is not."""
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
    """Return the processes that wanted a core in the last minute: others slow a CPU's times."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def machine() -> dict[str, object]:
    """Return what a result must state about where it was measured."""
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
