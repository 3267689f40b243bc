"""Dense gradient -> compact gradient, and back: see `talos_kernels.gather_grad`."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._ops import serve_cuda
from .blocks import CHUNK, find_block, load_chunk, next_chunk, tensor_pointer
from .launch import DTYPES, address_table, device_guard, shared_dtype

__all__ = ["gather_grad_", "gather_grad_kernel", "scatter_", "scatter_kernel"]

# Chosen from the compiled code, unmeasured: at most 40 registers at sm_90 and no spills, so that
# twelve programs share a multiprocessor and hide each other's loads.
NUM_WARPS = 4


@triton.jit
def gather_grad_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    addresses_ptr,
    out_ptr,
    GRAD_DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program gathers one block; a missing gradient counts as 0."""
    tensor, begin, first, _, source, counts = find_block(
        words_ptr, positions_ptr, starts_ptr, table_ptr, programs_ptr
    )
    given = tl.load(addresses_ptr + tensor) != 0
    grad_ptr = tensor_pointer(addresses_ptr + tensor, GRAD_DTYPE) + begin
    out_ptr += first
    for LISTED in tl.static_range(2):
        done, count = 0, counts[LISTED]
        while done < count:
            chunk = load_chunk(source, done, count, LISTED)
            offs, selected, ranks, found = next_chunk(chunk, done, count, LISTED)
            values = tl.load(grad_ptr + offs, mask=selected & given, other=0.0).to(tl.float32)
            if ACCUMULATE:
                values += tl.load(out_ptr + ranks, mask=selected, other=0.0)
            tl.store(out_ptr + ranks, values, mask=selected)
            out_ptr += found
            done += CHUNK


@triton.jit
def scatter_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    addresses_ptr,
    values_ptr,
    PARAM_DTYPE: tl.constexpr,
):
    """One program writes one block."""
    tensor, begin, first, _, source, counts = find_block(
        words_ptr, positions_ptr, starts_ptr, table_ptr, programs_ptr
    )
    param_ptr = tensor_pointer(addresses_ptr + tensor, PARAM_DTYPE) + begin
    values_ptr += first
    for LISTED in tl.static_range(2):
        done, count = 0, counts[LISTED]
        while done < count:
            chunk = load_chunk(source, done, count, LISTED)
            offs, selected, ranks, found = next_chunk(chunk, done, count, LISTED)
            values = tl.load(values_ptr + ranks, mask=selected)
            tl.store(param_ptr + offs, values.to(PARAM_DTYPE), mask=selected)
            values_ptr += found
            done += CHUNK


def gather_grad_(
    out: Tensor, grads: Sequence[Tensor], index: Sequence[Tensor], accumulate: bool
) -> None:
    """Launch one program for each block of all tensors."""
    programs = index[4]
    if programs.shape[0] == 0:
        return
    with device_guard(out.device):
        gather_grad_kernel[(programs.shape[0],)](
            *index, address_table(grads), out,
            GRAD_DTYPE=shared_dtype(grads), ACCUMULATE=accumulate, num_warps=NUM_WARPS,
        )  # fmt: skip


def scatter_(params: Sequence[Tensor], index: Sequence[Tensor], values: Tensor) -> None:
    """Launch one program for each block of all tensors."""
    programs = index[4]
    if programs.shape[0] == 0:
        return
    with device_guard(values.device):
        scatter_kernel[(programs.shape[0],)](
            *index, address_table(params), values,
            PARAM_DTYPE=DTYPES[params[0].dtype], num_warps=NUM_WARPS,
        )  # fmt: skip


serve_cuda("gather_grad_", "triton", gather_grad_)
serve_cuda("scatter_", "triton", scatter_)
