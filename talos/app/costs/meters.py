"""Clocks and counters: seconds, bytes held, launches, and the bandwidth of a copy."""

import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "clock",
    "copy_bandwidth",
    "held_bytes",
    "launches",
    "median_and_spread",
    "median_seconds",
    "peak_bytes",
    "seconds",
    "synchronise",
]

_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # several times every cache


def synchronise() -> None:
    """Waits for all work given to the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Reads the time after all work given to the device is done.

    Returns:
        Seconds from some moment.
    """
    synchronise()
    return time.perf_counter()


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Times calls, each waited for.

    Args:
        work: what is called.
        rounds: how often.

    Returns:
        Seconds of each call.
    """
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        times.append(clock() - start)
    return times


def median_seconds(work: Callable[[], object], rounds: int = 10, warmup: int = 3) -> float:
    """Times calls after some that do not count.

    Args:
        work: what is called.
        rounds: how often it is timed.
        warmup: how often it is called before.

    Returns:
        The median of the seconds of a call.
    """
    for _ in range(warmup):
        work()
    return median(seconds(work, rounds))


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Sums up times.

    Args:
        times: at least one.

    Returns:
        The median and the distance between the quartiles, 0 of a single time.

    Example:
        >>> median_and_spread([3.0, 1.0, 2.0])
        (2.0, 1.0)
    """
    if len(times) == 1:
        return times[0], 0.0
    low, middle, high = quantiles(times, method="inclusive")
    return middle, high - low


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Measures the roofline of work that moves bytes.

    Args:
        device: where.

    Returns:
        Bytes a second of one tensor copied into another, reads and writes counted.
    """
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def peak_bytes(work: Callable[[], object]) -> int:
    """Measures the bytes that one call holds at most beyond what was allocated before.

    On the CPU: of torch's allocator, from its own record of every allocation, in their order.
    Memory from before the call that `work` gives back is not subtracted there.

    Args:
        work: what is called, once.

    Returns:
        Bytes.
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


def held_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Adds up the memory behind tensors, views of one memory counted once.

    Args:
        tensors: any.
        device: those elsewhere are passed over.

    Returns:
        Bytes.

    Example:
        >>> x = torch.zeros(10)
        >>> held_bytes([x, x[2:]], x.device)
        40
    """
    memory = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in tensors
        if each.device.type == device.type
    }
    return sum(memory.values())


def launches(work: Callable[[], object]) -> int:
    """Counts what one call gives to the device.

    Args:
        work: what is called, once.

    Returns:
        Kernels, copies and fills on a GPU; on the CPU operators that torch dispatches.

    Example:
        >>> launches(lambda: torch.zeros(3).add_(1))  # on the CPU: zeros and add_
        2
    """
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
