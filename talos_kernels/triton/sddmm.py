"""A weight gradient at its selected entries only: see `talos_kernels.sddmm`.

A program accumulates one tile of dY^T X in registers and stores its selected entries at their
ranks. A row of a tile is a run of the flattened tensor that may begin at any bit of a word. Its
bits are shifted out of two words each; its first rank is its block's first rank plus the earlier
bits of the block. A tile without a selected entry is not multiplied. If there are too few tiles for
the device, the tokens are split: each part writes its own entries, which a second kernel adds in
order.

A 16-bit index cannot be read by runs, so a small kernel first turns it into a bitmap.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import serve_cuda
from ..index import BLOCK_SIZE, SEGMENT_SIZE
from ..sddmm import sddmm_reference
from ..tensor_index import WORD_SIZE
from .blocks import BITS, BLOCK, CHUNK, SEGMENT, WORDS, load_chunk, next_chunk, popcount
from .launch import device_guard, processors, tf32_allowed

__all__ = ["add_parts_kernel", "bitmap", "bitmap_kernel", "sddmm_", "sddmm_kernel"]


class Config(NamedTuple):
    """Sizes of a tile, what a launch needs of them, and what it costs.

    Attributes:
        resident: programs that a multiprocessor holds at a time, by their registers at sm_90.
        multiply: cycles in which a multiprocessor's units multiply a step.
        issue: cycles in which a lone program issues the other instructions of a step.
        outside: those of what a program does outside of its loop.
    """

    rows: int
    cols: int
    tokens: int
    num_warps: int
    num_stages: int
    resident: int
    multiply: int
    issue: int
    outside: int


# By precision, largest first. Chosen from the compiled code, unmeasured: none spills at sm_80,
# sm_90, sm_100 and gfx942. Cycles are instructions at sm_90 over its four schedulers
# (benches/results/compiled/triton.json), of products those of its units' peak rates.
CONFIGS = {
    "half": (
        Config(128, 128, 64, 8, 3, resident=1, multiply=512, issue=250, outside=5100),
        Config(64, 64, 64, 4, 3, resident=3, multiply=128, issue=120, outside=1400),
    ),
    "tf32": (
        Config(128, 64, 32, 8, 3, resident=1, multiply=256, issue=280, outside=3100),
        Config(64, 64, 32, 8, 3, resident=2, multiply=128, issue=210, outside=2800),
    ),
    "ieee": (Config(64, 64, 16, 4, 3, resident=3, multiply=512, issue=110, outside=1400),),
}
# Parts of the tokens, and programs a multiprocessor from which on they are left whole.
MOST_PARTS, PROGRAMS_TO_SPLIT = 8, 2
# Estimated for an H200: bytes that a multiprocessor gets from the L2 cache in a cycle while all
# read, and cycles of a further launch.
CACHE_RATE, LAUNCH = 30, 5000
ADD_BLOCK = tl.constexpr(1024)  # entries of a program that adds parts; unmeasured

# Entries of a tile whose bits, ranks and values are in registers at a time.
MOST_STORED = tl.constexpr(8192)
# Ranks inside a tile are counted from its first entry, in 32 bits: 128 rows of fewer columns.
WIDEST = 1 << 24
BLOCKS = tl.constexpr(SEGMENT_SIZE // BLOCK_SIZE)


@triton.jit
def first_bits(count):
    """Return uint32 words with the lowest `count` bits set: none below 0, all above 31."""
    some = (1 << tl.minimum(tl.maximum(count, 0), BITS - 1)) - 1
    return tl.where(count < BITS, some, -1).to(tl.uint32, bitcast=True)


@triton.jit
def run_words(words_ptr, n_words, begins, counts, FULL: tl.constexpr, RUN: tl.constexpr):
    """Return the bits of runs of entries: uint32 `[runs, RUN / 32]`.

    `begins`, int64 `[runs]`, is where each begins in the tensor; `counts`, int32 `[runs]`, how many
    of its RUN entries exist.
    """
    column = tl.arange(0, RUN // BITS)[None, :]
    left = counts[:, None] - column * BITS
    if FULL:
        return first_bits(left)
    at = (begins // BITS)[:, None] + column
    shift = (begins % BITS).to(tl.int32)[:, None]
    low = tl.load(words_ptr + at, mask=left > 0, other=0).to(tl.uint32, bitcast=True)
    both = (left + shift > BITS) & (at + 1 < n_words)
    high = tl.load(words_ptr + at + 1, mask=both, other=0).to(tl.uint32, bitcast=True)
    # A shift by 32 is undefined, so the upper word goes left by one and then by 31 - shift.
    return ((low >> shift) | ((high << 1) << (shift ^ (BITS - 1)))) & first_bits(left)


@triton.jit
def first_ranks(words_ptr, starts_ptr, first, begins, exists, FULL: tl.constexpr):
    """Return the first ranks of runs: their blocks' ranks and the earlier bits in these.

    Returns:
        int64, the rank of the block of the entry `first`; int32 `[runs]`, the ranks from there.
    """
    if FULL:
        return first, (begins - first).to(tl.int32)
    start = tl.load(starts_ptr + first // BLOCK)
    block = begins // BLOCK
    column = tl.arange(0, WORDS)[None, :]
    before = (begins % BLOCK).to(tl.int32)[:, None] - column * BITS
    wanted = exists[:, None] & (before > 0)
    words = tl.load(words_ptr + block[:, None] * WORDS + column, mask=wanted, other=0)
    bits = words.to(tl.uint32, bitcast=True) & first_bits(before)
    starts = tl.load(starts_ptr + block, mask=exists, other=0)
    return start, (starts - start).to(tl.int32) + tl.sum(popcount(bits), 1)


@triton.jit
def earlier(counts, N: tl.constexpr):
    """Sum the counts before each of a few columns: `[runs, N]`."""
    column = tl.arange(0, N)
    before = column[None, None, :] < column[None, :, None]
    return tl.sum(tl.where(before, counts[:, None, :], 0), 2)


@triton.jit
def store_selected(
    places, product, first, begins, counts, FULL: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """Store the selected entries of runs of a product, float32 `[runs, RUN]`, at their ranks."""
    words_ptr, n_words, starts_ptr, out_ptr = places
    RUN: tl.constexpr = product.shape[1]
    SIZE: tl.constexpr = product.shape[0] * RUN
    words = run_words(words_ptr, n_words, begins, counts, FULL, RUN)
    start, ranks = first_ranks(words_ptr, starts_ptr, first, begins, counts > 0, FULL)
    ranks = ranks[:, None] + earlier(popcount(words), RUN // BITS)
    bit = tl.arange(0, BITS)
    lower_bits = ((1 << bit) - 1).to(tl.uint32, bitcast=True)
    ranks = ranks[:, :, None] + popcount(words[:, :, None] & lower_bits[None, None, :])
    selected = ((words[:, :, None] >> bit[None, None, :]) & 1) != 0
    # Flat: in a 2-D tile with such ranks the compiler would put columns side by side.
    ranks, selected = tl.reshape(ranks, (SIZE,)), tl.reshape(selected, (SIZE,))
    values = tl.reshape(product, (SIZE,))
    out_ptr += start
    if ACCUMULATE:
        values += tl.load(out_ptr + ranks, mask=selected, other=0.0)
    tl.store(out_ptr + ranks, values, mask=selected)


@triton.jit(do_not_specialize=["tokens", "n_words", "n_selected"])
def sddmm_kernel(
    words_ptr,
    starts_ptr,
    n_words,
    dy_ptr,
    x_ptr,
    out_ptr,
    n_selected,
    parts,
    tokens,
    rows,
    cols,
    dy_token,
    x_token,
    FULL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program computes the selected entries of one tile, from one part of the tokens."""
    tiles = tl.cdiv(cols, BLOCK_I)
    n_tiles = tl.num_programs(0) // parts
    part = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = (tl.program_id(0) % n_tiles).to(tl.int64)
    first_col = tile % tiles * BLOCK_I
    offs_o = tile // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = first_col + tl.arange(0, BLOCK_I)
    in_rows, in_cols = offs_o < rows, offs_i < cols
    begins = offs_o * cols + first_col
    counts = tl.where(in_rows, tl.minimum(cols - first_col, BLOCK_I), 0).to(tl.int32)
    words = run_words(words_ptr, n_words, begins, counts, FULL, BLOCK_I)
    some = tl.max(tl.max(words, 1), 0) != 0

    share = tl.cdiv(tl.cdiv(tokens, BLOCK_T), parts).to(tl.int64) * BLOCK_T
    tokens = tl.maximum(tl.minimum(tokens - part * share, share), 0).to(tl.int32)
    out_ptr += part * n_selected
    offs_t = tl.arange(0, BLOCK_T)
    dy_token, x_token = tl.cast(dy_token, tl.int64), tl.cast(x_token, tl.int64)
    dy_ptrs = dy_ptr + (part * share + offs_t)[:, None] * dy_token + offs_o[None, :]
    x_ptrs = x_ptr + (part * share + offs_t)[:, None] * x_token + offs_i[None, :]
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for begin in tl.range(0, tl.where(some, tokens, 0), BLOCK_T):
        exist = (offs_t < tokens - begin)[:, None]
        dy = tl.load(dy_ptrs, mask=exist & in_rows[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=exist & in_cols[None, :], other=0.0)
        product = tl.dot(tl.trans(dy), x, product, input_precision=PRECISION)
        dy_ptrs += BLOCK_T * dy_token
        x_ptrs += BLOCK_T * x_token

    places = words_ptr, n_words, starts_ptr, out_ptr
    first = tile // tiles * BLOCK_O * cols + first_col
    HALF: tl.constexpr = BLOCK_I // 2
    if BLOCK_O * BLOCK_I > MOST_STORED:
        halves = tl.permute(tl.reshape(product, (BLOCK_O, 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        store_selected(places, left, first, begins, counts, FULL, ACCUMULATE)
        store_selected(places, right, first, begins + HALF, counts - HALF, FULL, ACCUMULATE)
    else:
        store_selected(places, product, first, begins, counts, FULL, ACCUMULATE)


@triton.jit(do_not_specialize=["n_selected", "parts"])
def add_parts_kernel(parts_ptr, out_ptr, n_selected, parts, ACCUMULATE: tl.constexpr):
    """One program adds ADD_BLOCK entries of all parts, in order."""
    offs = tl.program_id(0).to(tl.int64) * ADD_BLOCK + tl.arange(0, ADD_BLOCK)
    mask = offs < n_selected
    total = tl.zeros((ADD_BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += n_selected
    if ACCUMULATE:
        total += tl.load(out_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total, mask=mask)


@triton.jit
def bitmap_kernel(positions_ptr, starts_ptr, words_ptr, word_starts_ptr):
    """One program sets the bits of one segment, and stores the first rank of each of its blocks."""
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + segment)
    count = (tl.load(starts_ptr + segment + 1) - first).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    ranks = tl.zeros((BLOCKS,), tl.int32)
    words_ptr += segment * (SEGMENT // BITS)
    source = words_ptr, positions_ptr + first, False
    done = 0
    while done < count:
        chunk = load_chunk(source, done, count, LISTED=True)
        offs, selected, _, _ = next_chunk(chunk, done, count, LISTED=True)
        bits = (1 << (offs % BITS)).to(tl.int32)
        tl.atomic_or(words_ptr + offs // BITS, bits, mask=selected, sem="relaxed")
        before = selected[None, :] & (offs[None, :] < (block * BLOCK)[:, None])
        ranks += tl.sum(before.to(tl.int32), 1)
        done += CHUNK
    tl.store(word_starts_ptr + segment * BLOCKS + block, first + ranks)


def bitmap(positions: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bitmap words and block ranks of a selection by 16-bit positions.

    Args:
        positions: uint16 `[nnz]`, ascending inside each segment.
        starts: int64 `[segments + 1]`, the rank of each segment's first.

    Returns:
        int32 `[segments * 2048]` and int64 `[segments * 32]`, the last segment filled up with
        entries that are not selected.
    """
    segments = starts.numel() - 1
    words = starts.new_zeros(segments * (SEGMENT_SIZE // WORD_SIZE), dtype=torch.int32)
    word_starts = starts.new_empty(segments * BLOCKS.value)
    bitmap_kernel[(segments,)](positions, starts, words, word_starts, num_warps=4)
    return words, word_starts


def sddmm_(out: Tensor, dy: Tensor, x: Tensor, index: Sequence[Tensor], accumulate: bool) -> None:
    """Launch one program for each tile and part of the tokens; add the parts."""
    words, positions, starts, _, programs = index
    if programs.numel() == 0:
        return
    if x.shape[1] >= WIDEST:
        sddmm_reference(out, dy, x, index, accumulate)
        return
    exact = dy.dtype == torch.float32 and not tf32_allowed()
    precision = "ieee" if exact else "tf32" if dy.dtype == torch.float32 else "half"
    (tokens, rows), cols = dy.shape, x.shape[1]
    held = programs.shape[0] * (SEGMENT_SIZE if positions.numel() else BLOCK_SIZE)
    share = min(held / (rows * cols), 1.0)
    config, parts = plan(precision, tokens, rows, cols, share, out.numel(), processors(out.device))
    with device_guard(out.device):
        if positions.numel():
            words, starts = bitmap(positions, starts)
        launch(out, dy, x, words, starts, accumulate, precision, config, parts)


@functools.lru_cache(maxsize=256)  # a layer asks at every backward
def plan(
    precision: str, tokens: int, rows: int, cols: int, share: float, nnz: int, processors: int
) -> tuple[Config, int]:
    """Return the tile and the number of parts of the tokens with the least predicted time.

    Args:
        precision: of `CONFIGS`.
        tokens: rows of dY and X.
        rows: columns of dY.
        cols: columns of X.
        share: of the tiles, those that hold selected entries, more or less.
        nnz: selected entries.
        processors: multiprocessors of the device.
    """
    itemsize, cache = 2 if precision == "half" else 4, CACHE_RATE * processors

    def programs(config: Config) -> int:
        tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
        return max(round(tiles * share), 1)

    def cycles(choice: tuple[Config, int]) -> float:
        """Of the busiest multiprocessor, or of the cache where that takes longer."""
        config, parts = choice
        steps = triton.cdiv(triton.cdiv(tokens, config.tokens), parts)
        rounds = triton.cdiv(programs(config) * parts, processors)
        waves = triton.cdiv(rounds, config.resident)
        busiest = steps * max(rounds * config.multiply, waves * (config.multiply + config.issue))
        read = steps * config.tokens * (config.rows + config.cols) * itemsize
        adding = LAUNCH + 8 * parts * nnz / cache if parts > 1 else 0
        return (
            max(busiest, programs(config) * parts * read / cache) + waves * config.outside + adding
        )

    choices = [
        (config, parts)
        for config in CONFIGS[precision]
        for parts in range(1, MOST_PARTS + 1)
        if parts == 1
        or (parts * config.tokens <= tokens and programs(config) <= PROGRAMS_TO_SPLIT * processors)
    ]
    return min(choices, key=cycles)


def launch(
    out: Tensor,
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    starts: Tensor,
    accumulate: bool,
    precision: str,
    config: Config,
    parts: int,
) -> None:
    """Launch the kernels of one choice; without words every entry is selected."""
    (tokens, rows), cols = dy.shape, x.shape[1]
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    entries = out if parts == 1 else out.new_empty(parts, out.numel())
    sddmm_kernel[(tiles * parts,)](
        words, starts, words.numel(), dy, x, entries, out.numel(), parts,
        tokens, rows, cols, dy.stride(0), x.stride(0),
        FULL=words.numel() == 0, ACCUMULATE=accumulate and parts == 1,
        PRECISION="tf32" if precision == "tf32" else "ieee",
        BLOCK_O=config.rows, BLOCK_I=config.cols, BLOCK_T=config.tokens,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if parts > 1:
        add_parts_kernel[(triton.cdiv(out.numel(), ADD_BLOCK.value),)](
            entries, out, out.numel(), parts, ACCUMULATE=accumulate, num_warps=4
        )


serve_cuda("sddmm_", "triton", sddmm_)
