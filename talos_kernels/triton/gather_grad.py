"""Dense gradient -> compact gradient, and back: see `talos_kernels.gather_grad`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    BLOCK,
    CHUNK,
    SEGMENT,
    U16,
    block_chunk,
    block_words,
    program_block,
    segment_chunk,
    segment_ranks,
    tensor_pointer,
)
from .launch import DTYPES, address_table, device_guard

__all__ = ["gather_grad_", "gather_grad_kernel", "scatter_", "scatter_kernel"]

# Chosen from the compiled code, unmeasured: at most 40 registers at sm_90 and no spills, so that
# twelve programs share a multiprocessor and hide each other's loads.
NUM_WARPS = 4


@triton.jit
def gather(grad_ptr, out_ptr, offs, given, selected, ranks, ACCUMULATE: tl.constexpr):
    """Gathers the selected entries at `offs` into `out_ptr + ranks`; returns them, 0 elsewhere."""
    values = tl.load(grad_ptr + offs, mask=selected & given, other=0.0).to(tl.float32)
    if ACCUMULATE:
        values += tl.load(out_ptr + ranks, mask=selected, other=0.0)
    tl.store(out_ptr + ranks, values, mask=selected)
    return values


@triton.jit
def gather_grad_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    addresses_ptr,
    out_ptr,
    partials_ptr,
    GRAD_DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program gathers one block and sums its squares; a gradient not given counts as 0."""
    tensor, row_ptr, encoding, block = program_block(table_ptr, programs_ptr)
    given = tl.load(addresses_ptr + tensor) != 0
    grad_ptr = tensor_pointer(addresses_ptr + tensor, GRAD_DTYPE)
    squares = tl.zeros((CHUNK,), tl.float32)
    if encoding == U16:
        grad_ptr += block * SEGMENT
        segment_ptr, first, count = segment_ranks(positions_ptr, starts_ptr, row_ptr, block)
        done = 0
        while done < count:
            offs, selected, ranks = segment_chunk(segment_ptr, done, count)
            values = gather(grad_ptr, out_ptr + first, offs, given, selected, ranks, ACCUMULATE)
            squares += values * values
            done += CHUNK
    else:
        grad_ptr += block * BLOCK
        block_ptr, first, count = block_words(words_ptr, starts_ptr, row_ptr, encoding, block)
        done = 0
        while done < count:
            offs, selected, ranks, found = block_chunk(block_ptr, encoding, done, count)
            values = gather(grad_ptr, out_ptr + first, offs, given, selected, ranks, ACCUMULATE)
            squares += values * values
            first += found
            done += CHUNK
    tl.store(partials_ptr + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def scatter(param_ptr, values_ptr, offs, selected, ranks, PARAM_DTYPE: tl.constexpr):
    """Writes `values_ptr + ranks` to the selected entries at `offs`."""
    values = tl.load(values_ptr + ranks, mask=selected)
    tl.store(param_ptr + offs, values.to(PARAM_DTYPE), mask=selected)


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
    tensor, row_ptr, encoding, block = program_block(table_ptr, programs_ptr)
    param_ptr = tensor_pointer(addresses_ptr + tensor, PARAM_DTYPE)
    if encoding == U16:
        param_ptr += block * SEGMENT
        segment_ptr, first, count = segment_ranks(positions_ptr, starts_ptr, row_ptr, block)
        done = 0
        while done < count:
            offs, selected, ranks = segment_chunk(segment_ptr, done, count)
            scatter(param_ptr, values_ptr + first, offs, selected, ranks, PARAM_DTYPE)
            done += CHUNK
    else:
        param_ptr += block * BLOCK
        block_ptr, first, count = block_words(words_ptr, starts_ptr, row_ptr, encoding, block)
        done = 0
        while done < count:
            offs, selected, ranks, found = block_chunk(block_ptr, encoding, done, count)
            scatter(param_ptr, values_ptr + first, offs, selected, ranks, PARAM_DTYPE)
            first += found
            done += CHUNK


def gather_grad_(
    out: Tensor, grads: Sequence[Tensor], index: Sequence[Tensor], accumulate: bool
) -> Tensor:
    """Launch one program a block of all tensors; the blocks' sums are added in a fixed order."""
    programs = index[4]
    if programs.numel() == 0:
        return out.new_zeros(())
    with device_guard(out.device):
        partials = torch.empty(programs.numel(), dtype=torch.float32, device=out.device)
        gather_grad_kernel[(programs.numel(),)](
            *index, address_table(grads), out, partials,
            GRAD_DTYPE=DTYPES[grads[0].dtype], ACCUMULATE=accumulate, num_warps=NUM_WARPS,
        )  # fmt: skip
    return partials.sum()


def scatter_(params: Sequence[Tensor], index: Sequence[Tensor], values: Tensor) -> None:
    """Launch one program a block of all tensors."""
    programs = index[4]
    if programs.numel() == 0:
        return
    with device_guard(values.device):
        scatter_kernel[(programs.numel(),)](
            *index, address_table(params), values,
            PARAM_DTYPE=DTYPES[params[0].dtype], num_warps=NUM_WARPS,
        )  # fmt: skip


torch.library.register_kernel("talos::gather_grad_", "cuda", gather_grad_)
torch.library.register_kernel("talos::scatter_", "cuda", scatter_)
