"""Add a scaled sparse delta to many tensors: see `talos_kernels.add_delta`."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._ops import serve_cuda
from .blocks import CHUNK, find_block, load_chunk, next_chunk, tensor_pointer
from .launch import DTYPES, address_table, device_guard

__all__ = ["add_delta_", "add_delta_kernel"]

# Chosen from the compiled code, unmeasured: at most 40 registers at sm_90 and no spills, so that
# twelve programs share a multiprocessor and hide each other's loads.
NUM_WARPS = 4


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
    tensor, begin, first, _, source, counts = find_block(
        words_ptr, positions_ptr, starts_ptr, table_ptr, programs_ptr
    )
    param_ptr = tensor_pointer(addresses_ptr + tensor, PARAM_DTYPE) + begin
    for LISTED in tl.static_range(2):
        done, count = 0, counts[LISTED]
        while done < count:
            chunk = load_chunk(source, done, count, LISTED)
            offs, selected, ranks, found = next_chunk(chunk, done, count, LISTED)
            stored = tl.load(param_ptr + offs, mask=selected)
            values = tl.load(values_ptr + first + ranks, mask=selected).to(tl.float32)
            if saved_ptr is not None:
                tl.store(saved_ptr + first + ranks, stored, mask=selected)
            edited = stored.to(tl.float32) + scale * values
            tl.store(param_ptr + offs, edited.to(stored.dtype), mask=selected)
            first += found
            done += CHUNK


def add_delta_(
    params: Sequence[Tensor],
    index: Sequence[Tensor],
    values: Tensor,
    scale: float,
    saved: Tensor | None,
) -> None:
    """Launch one program for each block; product and sum are rounded separately."""
    programs = index[4]
    if programs.shape[0] == 0:
        return
    with device_guard(values.device):
        add_delta_kernel[(programs.shape[0],)](
            *index, address_table(params), values, saved, scale,
            PARAM_DTYPE=DTYPES[params[0].dtype], num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


serve_cuda("add_delta_", "triton", add_delta_)
