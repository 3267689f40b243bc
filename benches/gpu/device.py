"""What only CUDA has: streams, events, capture, memory, host syncs.

`Device` does the same calls on the CPU, so that a rehearsal passes through every line that uses
one: it calls what would be replayed, and waits for nothing.
"""

import contextlib
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benches import measure

Run = Callable[[], object]

WARMUP = 3
LEAST = 2e-3
"""Seconds of a round: what is shorter is repeated within it, so that a clock's tick is nothing."""
MOST_CALLS = 50


class Device:
    """The CPU, behind the calls that the stages make of a device."""

    kind = "cpu"
    torch = torch.device("cpu")

    def capture(self, work: Run, warmup: int = WARMUP) -> Run:
        """Call `work` `warmup` times and record it; the result does the recorded work again."""
        for _ in range(warmup):
            work()
        return work

    def time_eager(self, work: Run, rounds: int = 10) -> list[float]:
        """Return seconds a call in each round: what a loop in Python waits for."""
        return _in_rounds(work, rounds, 1)

    def time_replayed(self, work: Run, rounds: int = 10) -> list[float]:
        """Return seconds a replay of the captured work in each round: the device's time."""
        return _in_rounds(self.capture(work, 1), rounds, 1)

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        """Raise where a call within the block makes the host wait for the device."""
        yield

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run the block on another stream, after what came before it and before the rest."""
        yield

    def free(self) -> None:
        """Wait for the device, and free memory that nothing holds any longer."""
        gc.collect()


class Cuda(Device):
    kind = "cuda"

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())

    def capture(self, work: Run, warmup: int = WARMUP) -> Run:
        with self.side_stream():
            for _ in range(warmup):
                work()
        measure.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def time_eager(self, work: Run, rounds: int = 10) -> list[float]:
        for _ in range(WARMUP):
            work()
        (first,) = measure.seconds(work, 1)
        return _in_rounds(work, rounds, _calls_a_round(first))

    def time_replayed(self, work: Run, rounds: int = 10) -> list[float]:
        with uploaded_tables():
            replay = self.capture(work)
            replay()
            (first,) = self._between_events(replay, 1, 1)
            return self._between_events(replay, rounds, _calls_a_round(first))

    def _between_events(self, work: Run, rounds: int, calls: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(calls):
                work()
            mark.record()
        measure.synchronise()
        return [
            before.elapsed_time(after) * 1e-3 / calls for before, after in itertools.pairwise(marks)
        ]

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
        measure.synchronise()
        gc.collect()
        torch.cuda.empty_cache()


def find_device() -> Device:
    return Cuda() if torch.cuda.is_available() else Device()


@contextlib.contextmanager
def uploaded_tables() -> Iterator[None]:
    """Let a capture within the block use the address tables that its warm-up has uploaded.

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


def _calls_a_round(first: float) -> int:
    """Return how often a round calls what took `first` seconds."""
    return max(1, min(MOST_CALLS, round(LEAST / max(first, 1e-9))))


def _in_rounds(work: Run, rounds: int, calls: int) -> list[float]:
    times = []
    for _ in range(rounds):
        measure.synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        measure.synchronise()
        times.append((time.perf_counter() - start) / calls)
    return times
