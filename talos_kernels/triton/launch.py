"""What the launchers share: the table of addresses, the dtypes, the device guard."""

import contextlib
import sys
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "DTYPES",
    "address_table",
    "architecture",
    "device_guard",
    "integer_table",
    "processors",
    "shared_dtype",
    "tf32_allowed",
]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Tables kept, 16 bytes a tensor: an optimizer meets as many as its gradients alternate between.
CACHE_SIZE = 64

_tables: dict[tuple[object, ...], Tensor] = {}
_lock = threading.Lock()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def architecture() -> tuple[str, int | str]:
    """What kernels are compiled for: ("cuda", 90), ("hip", "gfx942") or ("interpreter", 0)."""
    if triton.knobs.runtime.interpret:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 in TF32; `allow_tf32` cannot be read under its new API."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def shared_dtype(tensors: Sequence[Tensor]) -> tl.dtype:
    """Triton's name of the dtype of the tensors with entries: an empty one says nothing."""
    return DTYPES[next((each.dtype for each in tensors if each.numel()), torch.float32)]


def address_table(*columns: Sequence[Tensor]) -> Tensor:
    """The addresses of tensors on their device, without waiting for it.

    Args:
        columns: equally long lists of tensors on one device.

    Returns:
        int64 `[tensors, columns]`; 0 for a tensor without entries.
    """
    addresses = [0] * (len(columns) * len(columns[0]))
    for i, column in enumerate(columns):
        addresses[i :: len(columns)] = map(Tensor.data_ptr, column)  # 0 of one without entries
    return integer_table(tuple(addresses), columns[0][0].device).view(-1, len(columns))


def integer_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers on a device, without waiting for it: int64 `[len(values)]`.

    On a GPU a table is uploaded from pinned memory: a copy from pageable memory would wait for all
    work queued before it. torch keeps the pinned buffer until the copy is done. Tables are kept
    per stream: a kernel that finds one comes after its upload, and the memory of one that is
    dropped goes back to the stream whose kernels read it.

    A captured CUDA graph would read the pinned buffer again at every replay, and has not filled its
    table when another call could find it. So under capture the values travel as arguments of
    kernels, which the graph keeps, into memory of the graph's own pool, and no other call finds the
    table.
    """
    on_gpu, stream = device.type == "cuda", 0
    if on_gpu:
        if torch.cuda.is_current_stream_capturing():
            return captured_table(values, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device.index, stream, *values)
    with _lock:
        table = _tables.pop(key, None)
        if table is None:
            table = torch.frombuffer(array("q", values), dtype=torch.int64)
            if on_gpu:
                host = table.pin_memory()
                table = empty_table(len(values), device).copy_(host, non_blocking=True)
        _tables[key] = table
        if len(_tables) > CACHE_SIZE:
            del _tables[next(iter(_tables))]
    return table


def empty_table(size: int, device: torch.device) -> Tensor:
    """int64 `[size]` of the current stream, in memory that may be kept.

    While inductor's graph trees warm up, what the thread allocates lies in a pool of theirs, and
    they raise where something stays in it. What another thread allocates does not.
    """
    stream = torch.cuda.current_stream(device)

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(size, dtype=torch.int64, device=device)

    if "torch._inductor.cudagraph_trees" not in sys.modules:
        return allocate()
    with ThreadPoolExecutor(1) as another:
        return another.submit(allocate).result()


def captured_table(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 `[len(values)]`, filled by kernels that carry the values as arguments."""
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), list(values))
    return table
