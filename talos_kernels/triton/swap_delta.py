"""Take one sparse delta off and put another one on: see `talos_kernels.swap_delta`.

No program waits for another, and none reads what another thread wrote: every entry that either
index selects is read and written by one thread, which looks its rank up in both. Which program it
is in depends on the two encodings of the tensor:

- `full` and `bitmap` against any other: the programs of blocks, the new index's where both have
  them, walk all entries of their block.
- `u16` against `u16` or nothing: the new index's programs take its entries, the old one's those
  of its own that the new one does not select.

The programs of the new index come first in the grid, then those of the old one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    BLOCK,
    CHUNK,
    NUMEL,
    SEGMENT,
    U16,
    block_at,
    block_chunk,
    block_words,
    encoding_of,
    segment_chunk,
    segment_ranks,
    segment_search,
    tensor_pointer,
)
from .launch import DTYPES, address_table, device_guard

__all__ = ["swap_delta_", "swap_delta_kernel"]

# Chosen from the compiled code, unmeasured: at most 70 registers at sm_90 and no spills, so that
# seven programs share a multiprocessor.
NUM_WARPS = 4

BLOCKS_PER_SEGMENT = tl.constexpr(SEGMENT.value // BLOCK.value)


@triton.jit
def swap(
    param_ptr, old_saved_ptr, values_ptr, saved_ptr, offs, old, old_ranks, new, ranks, scale
):  # fmt: skip
    """Reverts the entries that `old` selects and adds to those that `new` does."""
    stored = tl.load(param_ptr + offs, mask=new & ~old)
    reverted = tl.load(old_saved_ptr + old_ranks, mask=old)
    values = tl.load(values_ptr + ranks, mask=new).to(tl.float32)
    base = tl.where(old, reverted, stored)
    tl.store(saved_ptr + ranks, base, mask=new)
    edited = (base.to(tl.float32) + scale * values).to(base.dtype)
    tl.store(param_ptr + offs, tl.where(new, edited, base), mask=old | new)


@triton.jit
def selected_chunk(words_ptr, positions_ptr, starts_ptr, row_ptr, encoding, block, done, before):
    """What a tensor of any encoding selects of CHUNK dense entries of a block.

    `before` is the number of the block's selected entries before them; `u16` does not use it.

    Returns:
        which are selected; their ranks, int32, from a first one on; that rank, int64; how many are
        selected, 0 of a `u16` tensor.
    """
    offs = done + tl.arange(0, CHUNK)
    if encoding == U16:
        segment_ptr, first, count = segment_ranks(
            positions_ptr, starts_ptr, row_ptr, block // BLOCKS_PER_SEGMENT
        )
        offs += (block % BLOCKS_PER_SEGMENT * BLOCK).to(tl.int32)
        selected, ranks = segment_search(segment_ptr, count, offs, offs >= 0)
        found = 0
    else:
        block_ptr, first, count = block_words(words_ptr, starts_ptr, row_ptr, encoding, block)
        _, selected, ranks, found = block_chunk(block_ptr, encoding, done, count)
        first += before
    return selected, ranks, first, found


@triton.jit
def swap_delta_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    old_words_ptr,
    old_positions_ptr,
    old_starts_ptr,
    old_table_ptr,
    old_programs_ptr,
    addresses_ptr,
    old_saved_ptr,
    values_ptr,
    saved_ptr,
    n_programs,
    n_old_programs,
    scale: tl.float32,
    PARAM_DTYPE: tl.constexpr,
):
    """One program swaps what it owns of one block or segment; see the module."""
    program = tl.program_id(0)
    is_new = program < n_programs
    if is_new:
        tensor, row_ptr, encoding, block = block_at(program, table_ptr, programs_ptr)
        old_row_ptr, old_encoding = encoding_of(
            tensor, old_table_ptr, old_programs_ptr, n_old_programs
        )
    else:
        tensor, old_row_ptr, old_encoding, block = block_at(
            program - n_programs, old_table_ptr, old_programs_ptr
        )
        row_ptr, encoding = encoding_of(tensor, table_ptr, programs_ptr, n_programs)
    param_ptr = tensor_pointer(addresses_ptr + tensor, PARAM_DTYPE)
    sparse = (encoding == U16) & (old_encoding == U16)
    if sparse:
        param_ptr += block * SEGMENT
        segment_ptr, first, count = segment_ranks(positions_ptr, starts_ptr, row_ptr, block)
        old_segment_ptr, old_first, old_count = segment_ranks(
            old_positions_ptr, old_starts_ptr, old_row_ptr, block
        )
        done = 0
        if is_new:
            while done < count:
                offs, new, ranks = segment_chunk(segment_ptr, done, count)
                old, old_ranks = segment_search(old_segment_ptr, old_count, offs, new)
                swap(
                    param_ptr, old_saved_ptr + old_first, values_ptr + first, saved_ptr + first,
                    offs, old, old_ranks, new, ranks, scale,
                )  # fmt: skip
                done += CHUNK
        else:
            while done < old_count:
                offs, old, old_ranks = segment_chunk(old_segment_ptr, done, old_count)
                new, _ = segment_search(segment_ptr, count, offs, old)
                old &= ~new
                reverted = tl.load(old_saved_ptr + old_first + old_ranks, mask=old)
                tl.store(param_ptr + offs, reverted, mask=old)
                done += CHUNK
    elif tl.where(is_new, encoding != U16, encoding == U16):
        param_ptr += block * BLOCK
        left = tl.load(row_ptr + NUMEL) - block * BLOCK
        size = tl.minimum(left, BLOCK).to(tl.int32)
        done, before, old_before = 0, 0, 0
        while done < size:
            new, ranks, first, found = selected_chunk(
                words_ptr, positions_ptr, starts_ptr, row_ptr, encoding, block, done, before
            )
            old, old_ranks, old_first, old_found = selected_chunk(
                old_words_ptr, old_positions_ptr, old_starts_ptr, old_row_ptr, old_encoding,
                block, done, old_before,
            )  # fmt: skip
            swap(
                param_ptr, old_saved_ptr + old_first, values_ptr + first, saved_ptr + first,
                done + tl.arange(0, CHUNK), old, old_ranks, new, ranks, scale,
            )  # fmt: skip
            before += found
            old_before += old_found
            done += CHUNK


def swap_delta_(
    params: Sequence[Tensor],
    old_index: Sequence[Tensor],
    old_saved: Tensor,
    index: Sequence[Tensor],
    values: Tensor,
    scale: float,
    saved: Tensor,
) -> None:
    """Launch the programs of both indices; of one index given twice, they own all its entries."""
    n_programs, n_old_programs = index[4].numel(), old_index[4].numel()
    same = index[3].data_ptr() == old_index[3].data_ptr()
    grid = n_programs if same else n_programs + n_old_programs
    if grid == 0:
        return
    with device_guard(values.device):
        swap_delta_kernel[(grid,)](
            *index, *old_index, address_table(params), old_saved, values, saved,
            n_programs, n_old_programs, scale,
            PARAM_DTYPE=DTYPES[params[0].dtype], num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


torch.library.register_kernel("talos::swap_delta_", "cuda", swap_delta_)
