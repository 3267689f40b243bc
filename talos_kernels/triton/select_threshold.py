"""Count the digits of scores' keys: see `talos_kernels.select_threshold`."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._ops import serve_cuda
from .launch import DTYPES, device_guard, integer_table

__all__ = ["score_histogram", "score_histogram_kernel"]

# Entries counted at a time, and blocks that a program counts before it adds its counts to the
# total: at most 256 atomic additions in 64 K entries. Chosen from the code compiled for sm_90,
# unmeasured: a lane keeps 8 of 256 bins and takes 8 population counts for 32 entries; at most 64
# registers let four programs of 8 warps share a multiprocessor. Loads take one entry a lane: wider
# ones would go through shared memory.
BLOCK_SIZE = 1024
STEPS = 64
NUM_WARPS = 8
COLUMNS = tl.constexpr(3)  # of the table: address, entries, first program


@triton.jit
def program_tensor(table_ptr, n_tensors):
    """Return the tensor of this program: the last whose first program is not beyond it."""
    low, high = tl.zeros((), tl.int64), tl.cast(n_tensors, tl.int64)
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(table_ptr + middle * COLUMNS + 2) > tl.program_id(0)
        low = tl.where(after, low, middle)
        high = tl.where(after, middle, high)
    return low


@triton.jit
def score_histogram_kernel(
    table_ptr,
    n_tensors,
    prefix_ptr,
    counts_ptr,
    refused_ptr,
    shift,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program counts STEPS blocks of one tensor."""
    HIGHEST: tl.constexpr = 0x7F7FFFFF  # the key of the largest finite score, or of 0
    EXCLUDED: tl.constexpr = 0x7FFFFFFF if LARGEST else 0x7F800000  # the key of the infinity
    NUM_BINS: tl.constexpr = 1 << BITS
    FEW: tl.constexpr = BLOCK_SIZE // 16
    tensor = program_tensor(table_ptr, n_tensors)
    row_ptr = table_ptr + tensor * COLUMNS
    score_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    numel = tl.load(row_ptr + 1)
    begin = (tl.program_id(0) - tl.load(row_ptr + 2)) * (BLOCK_SIZE * STEPS)
    end = tl.minimum(begin + BLOCK_SIZE * STEPS, numel)
    prefix = tl.load(prefix_ptr).to(tl.uint32)
    counts = tl.zeros((NUM_BINS,), tl.int32)
    refused = tl.zeros((BLOCK_SIZE,), tl.int32)
    while begin < end:
        offs = begin + tl.arange(0, BLOCK_SIZE)
        given = offs < end
        score = tl.load(score_ptr + offs, mask=given, other=0.0)
        bits = score.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = tl.where(bits == 0x80000000, 0, bits)  # -0.0 is 0.0
        keys = HIGHEST - bits if LARGEST else bits
        refused += (given & (keys > HIGHEST) & (keys != EXCLUDED)).to(tl.int32)
        found = given & (keys <= HIGHEST) & ((keys >> shift >> BITS) == prefix)
        digits = ((keys >> shift) & (NUM_BINS - 1)).to(tl.int32)
        n_found = tl.sum(found.to(tl.int32), 0)
        if n_found > FEW:
            counts += tl.histogram(digits, NUM_BINS, mask=found)
        elif n_found > 0:  # most blocks of the later passes: a histogram would cost more
            one = tl.full((BLOCK_SIZE,), 1, tl.int64)
            tl.atomic_add(counts_ptr + digits, one, mask=found, sem="relaxed")
        begin += BLOCK_SIZE
    bins = tl.arange(0, NUM_BINS)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    bad = tl.sum(refused, 0)
    tl.atomic_add(refused_ptr + tensor, bad.to(tl.int64), mask=bad > 0, sem="relaxed")


def score_histogram(
    scores: Sequence[Tensor], prefix: Tensor, shift: int, bits: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """Launch one program for each 64 K entries; integers may be added in any order."""
    counts, refused = prefix.new_zeros(1 << bits), prefix.new_zeros(len(scores))
    rows, programs = [], 0
    for score in scores:
        rows += [score.data_ptr(), score.numel(), programs]
        programs += triton.cdiv(score.numel(), BLOCK_SIZE * STEPS)
    if programs == 0:
        return counts, refused
    with device_guard(prefix.device):
        score_histogram_kernel[(programs,)](
            integer_table(tuple(rows), prefix.device), len(scores), prefix, counts, refused, shift,
            DTYPE=DTYPES[scores[0].dtype],
            BITS=bits, LARGEST=largest, BLOCK_SIZE=BLOCK_SIZE, STEPS=STEPS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return counts, refused


serve_cuda("score_histogram", "triton", score_histogram)
