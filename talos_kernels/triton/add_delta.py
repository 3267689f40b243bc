"""Add a scaled sparse delta to many tensors: see `talos_kernels.add_delta`."""

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

__all__ = ["add_delta_", "add_delta_kernel"]

# Chosen from the compiled code, unmeasured: at most 40 registers at sm_90 and no spills, so that
# twelve programs share a multiprocessor and hide each other's loads.
NUM_WARPS = 4


@triton.jit
def add(param_ptr, values_ptr, saved_ptr, offs, selected, ranks, first, scale):
    """Adds `values` to the selected entries at `offs`, once their old bits are in `saved`."""
    stored = tl.load(param_ptr + offs, mask=selected)
    values = tl.load(values_ptr + first + ranks, mask=selected).to(tl.float32)
    if saved_ptr is not None:
        tl.store(saved_ptr + first + ranks, stored, mask=selected)
    edited = stored.to(tl.float32) + scale * values
    tl.store(param_ptr + offs, edited.to(stored.dtype), mask=selected)


@triton.jit
def add_delta_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    addresses_ptr,
    values_ptr,
    saved_ptr,
    scale: tl.float32,
    PARAM_DTYPE: tl.constexpr,
):
    """One program edits one block."""
    tensor, row_ptr, encoding, block = program_block(table_ptr, programs_ptr)
    param_ptr = tensor_pointer(addresses_ptr + tensor, PARAM_DTYPE)
    if encoding == U16:
        param_ptr += block * SEGMENT
        segment_ptr, first, count = segment_ranks(positions_ptr, starts_ptr, row_ptr, block)
        done = 0
        while done < count:
            offs, selected, ranks = segment_chunk(segment_ptr, done, count)
            add(param_ptr, values_ptr, saved_ptr, offs, selected, ranks, first, scale)
            done += CHUNK
    else:
        param_ptr += block * BLOCK
        block_ptr, first, count = block_words(words_ptr, starts_ptr, row_ptr, encoding, block)
        done = 0
        while done < count:
            offs, selected, ranks, found = block_chunk(block_ptr, encoding, done, count)
            add(param_ptr, values_ptr, saved_ptr, offs, selected, ranks, first, scale)
            first += found
            done += CHUNK


def add_delta_(
    params: Sequence[Tensor],
    index: Sequence[Tensor],
    values: Tensor,
    scale: float,
    saved: Tensor | None,
) -> None:
    """Launch one program a block of all tensors; product and sum are rounded in turn."""
    programs = index[4]
    if programs.numel() == 0:
        return
    with device_guard(values.device):
        add_delta_kernel[(programs.numel(),)](
            *index, address_table(params), values, saved, scale,
            PARAM_DTYPE=DTYPES[params[0].dtype], num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


torch.library.register_kernel("talos::add_delta_", "cuda", add_delta_)
