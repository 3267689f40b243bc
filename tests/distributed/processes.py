"""Run a function in several processes that form a torch.distributed group (gloo, on the CPU).

A fork server imports torch once for each pytest process, so that a group starts in about a second.
"""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # a group that takes longer hangs
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["talos", "torch.distributed.tensor", "tests.distributed.processes"]
)


def in_processes(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function of a module in `size` processes and return what each returned, by rank.

    Function, arguments and results are pickled; results hold CPU tensors. An error in a process,
    or one that hangs, fails the test with that process' traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = _CONTEXT.Queue()
        there = [
            _CONTEXT.Process(
                target=_one, args=(rank, size, folder, queue, function, args), daemon=True
            )
            for rank in range(size)
        ]
        for process in there:
            process.start()
        found: dict[int, Any] = {}
        try:
            for _ in range(size):
                rank, ok, result = queue.get(timeout=SECONDS)
                assert ok, f"rank {rank} of {size}:\n{result}"
                found[rank] = torch.load(Path(result), weights_only=False)
        finally:
            for process in there:
                if len(found) == size:
                    process.join(SECONDS)
                process.kill()
                process.join()
    return [found[rank] for rank in range(size)]


def _one(
    rank: int, size: int, folder: str, queue: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    try:
        result = Path(folder, f"result-{rank}")
        torch.save(function(*args), result)
        queue.put((rank, True, str(result)))
        dist.barrier()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()
