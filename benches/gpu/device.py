"""What is CUDA's alone, behind one small interface: streams, events, capture, memory, host syncs.

`Cpu` answers the same calls without a device, so that a rehearsal passes through every line that
asks: it calls what would be replayed, and waits for nothing. Times are seconds of one call each.
"""

import contextlib
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from talos.app.costs import meters

Work = Callable[[], object]

WARMUP = 3
LEAST = 2e-3
"""Seconds of a round: what is shorter is repeated within it, so that a clock's tick is nothing."""
MOST_CALLS = 50


class Device(Protocol):
    """A device as the stages use it."""

    kind: str
    torch: torch.device

    def synchronise(self) -> None:
        """Waits for all work given to the device."""

    def capture(self, work: Work, warmup: int = WARMUP) -> Work:
        """Calls `work` `warmup` times, then records it; the result does the recorded work again."""

    def time_eager(self, work: Work, rounds: int = 10) -> list[float]:
        """Seconds a call in each round: what a loop in Python waits for, the host's time too."""

    def time_replayed(self, work: Work, rounds: int = 10) -> list[float]:
        """Seconds a replay of the captured work in each round: the device's time."""

    def peak_bytes(self, work: Work) -> int:
        """Bytes that a call holds at most beyond what was allocated before."""

    def launches(self, work: Work) -> int:
        """Kernels, copies and fills of a call; on the CPU operators."""

    def no_host_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it a call that makes the host wait for the device raises."""

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Work within it runs on another stream, after what came before it and before the rest."""

    def free(self) -> None:
        """Waits for the device, and gives memory back that nothing holds any longer."""


def find_device() -> Device:
    return Cuda() if torch.cuda.is_available() else Cpu()


def calls_a_round(first: float) -> int:
    """How often a round calls what took `first` seconds."""
    return max(1, min(MOST_CALLS, round(LEAST / max(first, 1e-9))))


class Cuda:
    kind = "cuda"

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def capture(self, work: Work, warmup: int = WARMUP) -> Work:
        with self.side_stream():
            for _ in range(warmup):
                work()
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def time_eager(self, work: Work, rounds: int = 10) -> list[float]:
        for _ in range(WARMUP):
            work()
        (first,) = meters.seconds(work, 1)
        return _in_rounds(work, rounds, calls_a_round(first))

    def time_replayed(self, work: Work, rounds: int = 10) -> list[float]:
        with uploaded_tables():
            replay = self.capture(work)
            replay()
            (first,) = self._between_events(replay, 1, 1)
            return self._between_events(replay, rounds, calls_a_round(first))

    def _between_events(self, work: Work, rounds: int, calls: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(calls):
                work()
            mark.record()
        self.synchronise()
        return [
            before.elapsed_time(after) * 1e-3 / calls for before, after in itertools.pairwise(marks)
        ]

    def peak_bytes(self, work: Work) -> int:
        return meters.peak_bytes(work)

    def launches(self, work: Work) -> int:
        return meters.launches(work)

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def free(self) -> None:
        self.synchronise()
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def uploaded_tables() -> Iterator[None]:
    """Within it a capture finds the tables of addresses that its warm-up has uploaded.

    A graph that outlives the cache of those fills tables of its own, by small kernels at each
    replay that an eager call does not launch: they would be timed with ours and with no other.
    """
    launch = sys.modules.get("talos_kernels.triton.launch")
    if launch is None:
        yield
        return
    fill, kept = launch.captured_table, []

    def find(values: Sequence[int], device: torch.device) -> torch.Tensor:
        for (index, _, *found), table in launch._tables.items():
            if index == device.index and found == list(values):
                kept.append(table)
                return table
        return fill(values, device)

    launch.captured_table = find
    try:
        yield
    finally:
        launch.captured_table = fill


class Cpu:
    kind = "cpu"
    torch = torch.device("cpu")

    def synchronise(self) -> None:
        pass

    def capture(self, work: Work, warmup: int = WARMUP) -> Work:
        for _ in range(warmup):
            work()
        return work

    def time_eager(self, work: Work, rounds: int = 10) -> list[float]:
        return _in_rounds(work, rounds, 1)

    def time_replayed(self, work: Work, rounds: int = 10) -> list[float]:
        return _in_rounds(self.capture(work, 1), rounds, 1)

    def peak_bytes(self, work: Work) -> int:
        return meters.peak_bytes(work)

    def launches(self, work: Work) -> int:
        return meters.launches(work)

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def free(self) -> None:
        gc.collect()


def _in_rounds(work: Work, rounds: int, calls: int) -> list[float]:
    times = []
    for _ in range(rounds):
        meters.synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        meters.synchronise()
        times.append((time.perf_counter() - start) / calls)
    return times
