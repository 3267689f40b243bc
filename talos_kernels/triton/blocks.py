"""What a program works on: its tensor, its block, and which entries of the block are selected.

Offsets and ranks inside a block fit in 32 bits. Where the block begins, in its tensor, in the
bitmaps and in the arrays of rank order, does not: block numbers are 64-bit before they are
multiplied.
"""

import triton
import triton.language as tl

from ..index import BLOCK_SIZE, SEGMENT_SIZE, Column
from ..tensor_index import ENCODINGS, WORD_SIZE

__all__ = [
    "BITS",
    "BLOCK",
    "CHUNK",
    "NUMEL",
    "RANK",
    "SEGMENT",
    "U16",
    "WORDS",
    "block_at",
    "block_chunk",
    "block_words",
    "encoding_of",
    "popcount",
    "program_block",
    "segment_chunk",
    "segment_ranks",
    "segment_search",
    "tensor_pointer",
]

BLOCK = tl.constexpr(BLOCK_SIZE)
SEGMENT = tl.constexpr(SEGMENT_SIZE)
BITS = tl.constexpr(WORD_SIZE)
WORDS = tl.constexpr(BLOCK_SIZE // WORD_SIZE)
BITMAP = tl.constexpr(ENCODINGS.index("bitmap"))
U16 = tl.constexpr(ENCODINGS.index("u16"))
COLUMNS = tl.constexpr(len(Column))
NUMEL = tl.constexpr(int(Column.NUMEL))
ENCODING = tl.constexpr(int(Column.ENCODING))
RANK = tl.constexpr(int(Column.RANK))
DATA = tl.constexpr(int(Column.DATA))
STARTS = tl.constexpr(int(Column.STARTS))
PROGRAM = tl.constexpr(int(Column.PROGRAM))

# Entries that a program takes at a time: four a thread, one beside the other's, so that a warp's
# lanes read one word's entries and one run of the arrays of rank order. Wider loads of the
# parameters would be fewer, but each access to the states, which are twice as many, would fall
# apart into as many runs. Chosen from the compiled code, unmeasured: the optimizer at sm_90, bf16
# with a master and 4 warps, has 233 registers at 2048 entries, 128 at 1024 and 80 at 512, without
# spills.
CHUNK = tl.constexpr(512)
ROWS = tl.constexpr(CHUNK // BITS)


@triton.jit
def program_block(table_ptr, programs_ptr):
    """The program's tensor (int64), its row of the table, its encoding, its block (int64)."""
    return block_at(tl.program_id(0), table_ptr, programs_ptr)


@triton.jit
def block_at(program, table_ptr, programs_ptr):
    """As `program_block`, for one of the index's programs by its number."""
    tensor = tl.load(programs_ptr + program).to(tl.int64)
    row_ptr = table_ptr + tensor * COLUMNS
    block = program.to(tl.int64) - tl.load(row_ptr + PROGRAM)
    return tensor, row_ptr, tl.load(row_ptr + ENCODING), block


@triton.jit
def encoding_of(tensor, table_ptr, programs_ptr, n_programs):
    """A tensor's row of the table and its encoding; U16 if nothing is selected."""
    row_ptr = table_ptr + tensor * COLUMNS
    first = tl.load(row_ptr + PROGRAM)
    owner = tl.load(programs_ptr + first, mask=first < n_programs, other=-1)
    return row_ptr, tl.where(owner == tensor, tl.load(row_ptr + ENCODING), U16)


@triton.jit
def tensor_pointer(address_ptr, DTYPE: tl.constexpr):
    """A tensor's data; the null pointer stands for a tensor that was not given."""
    return tl.load(address_ptr).to(tl.pointer_type(DTYPE))


@triton.jit
def popcount(words):
    """Bits set in uint32 words. LLVM knows this form and makes it one instruction."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def block_words(words_ptr, starts_ptr, row_ptr, encoding, block):
    """A block's words, the rank of its first selected entry (int64), its size (int32)."""
    block_ptr = words_ptr + (tl.load(row_ptr + DATA) + block * WORDS)
    first = tl.load(
        starts_ptr + tl.load(row_ptr + STARTS) + block,
        mask=encoding == BITMAP,
        other=tl.load(row_ptr + RANK) + block * BLOCK,
    )
    left = tl.load(row_ptr + NUMEL) - block * BLOCK
    return block_ptr, first, tl.minimum(left, BLOCK).to(tl.int32)


@triton.jit
def block_chunk(block_ptr, encoding, done, count):
    """CHUNK entries of a block of a `bitmap` tensor, or of a `full` one, whose bits are all ones.

    Returns:
        offsets in the block; which of them are selected; the ranks of those, from 0 in the chunk;
        the number of selected entries.
    """
    row = tl.arange(0, ROWS)
    bit = tl.arange(0, BITS)
    words = tl.load(block_ptr + done // BITS + row, mask=encoding == BITMAP, other=-1)
    words = words.to(tl.uint32, bitcast=True)
    counts = popcount(words)
    before = tl.cumsum(counts, 0) - counts
    lower_bits = ((1 << bit) - 1).to(tl.uint32, bitcast=True)
    ranks = before[:, None] + popcount(words[:, None] & lower_bits[None, :])
    selected = ((words[:, None] >> bit[None, :]) & 1) != 0
    # Flat: of a 2-D block whose ranks are not affine the compiler would put columns side by side.
    offs = done + tl.arange(0, CHUNK)
    selected = tl.reshape(selected, (CHUNK,)) & (offs < count)
    return offs, selected, tl.reshape(ranks, (CHUNK,)), tl.sum(counts, 0)


@triton.jit
def segment_ranks(positions_ptr, starts_ptr, row_ptr, block):
    """A segment's positions, the rank of its first selected entry (int64), their number (int32)."""
    start_ptr = starts_ptr + tl.load(row_ptr + STARTS) + block
    first = tl.load(start_ptr)
    count = (tl.load(start_ptr + 1) - first).to(tl.int32)
    segment_ptr = positions_ptr + (tl.load(row_ptr + DATA) + first - tl.load(row_ptr + RANK))
    return segment_ptr, first, count


@triton.jit
def segment_chunk(segment_ptr, done, count):
    """The next CHUNK selected entries: offsets in the segment, which of them exist, ranks in it."""
    ranks = done + tl.arange(0, CHUNK)
    selected = ranks < count
    offs = tl.load(segment_ptr + ranks, mask=selected, other=0).to(tl.int32)
    return offs, selected, ranks


@triton.jit
def segment_search(segment_ptr, count, offs, wanted):
    """Which of the `wanted` offsets in a segment are among its positions, and their ranks in it."""
    ranks = tl.zeros_like(offs)
    left = count
    while left > 1:  # all positions before a rank are below its offset
        half = left >> 1
        positions = tl.load(segment_ptr + ranks + (half - 1), mask=wanted, other=0).to(tl.int32)
        ranks += tl.where(positions < offs, half, 0)
        left -= half
    wanted &= count > 0
    positions = tl.load(segment_ptr + ranks, mask=wanted, other=0).to(tl.int32)
    return wanted & (positions == offs), ranks
