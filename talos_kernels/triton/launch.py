"""Helpers of the launchers: tables of addresses, dtypes, the device guard."""

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

# Tables kept, 16 bytes a tensor: an optimizer needs one for each set of gradient addresses.
CACHE_SIZE = 64

_tables: dict[tuple[object, ...], Tensor] = {}
_lock = threading.Lock()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def architecture() -> tuple[str, int | str]:
    """Return what kernels are compiled for: ("cuda", 90), ("hip", "gfx942"), ("interpreter", 0)."""
    if triton.knobs.runtime.interpret:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def processors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; 1 in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tf32_allowed() -> bool:
    """Return whether torch may use TF32; `allow_tf32` cannot be read under torch's new API."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def shared_dtype(tensors: Sequence[Tensor]) -> tl.dtype:
    """Return Triton's name for the dtype of the tensors that have entries."""
    return DTYPES[next((each.dtype for each in tensors if each.numel()), torch.float32)]


def address_table(*columns: Sequence[Tensor]) -> Tensor:
    """Put the addresses of tensors on their device, without waiting for it.

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
    """Put integers on a device, without waiting for it: int64 `[len(values)]`.

    On a GPU a table is uploaded from pinned memory: a copy from pageable memory would wait for all
    queued work. torch keeps the pinned buffer until the copy is done. Tables are kept per stream,
    so that a kernel runs after the upload of its table, and freed memory returns to the stream
    whose kernels read it.

    A CUDA graph would read the pinned buffer again at every replay, and other calls could find its
    table before it is filled. Under capture the values are therefore arguments of kernels, which
    the graph keeps, and the table lies in the graph's own pool, where no other call finds it.
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
    """Allocate int64 `[size]` on the current stream, in memory that may be kept.

    While inductor's graph trees warm up, this thread allocates from their pool, and they raise an
    error for memory that stays. Another thread allocates outside it.
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
    """Fill int64 `[len(values)]` by kernels that take the values as arguments."""
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), list(values))
    return table
