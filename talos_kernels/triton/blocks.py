"""The walk over an index, which all kernels share: blocks, and the selected entries of each.

A kernel finds its block with `find_block` and walks it with one loop, compiled for both kinds:

    for LISTED in tl.static_range(2):  # a block's bitmap, or a segment's listed positions
        done, count = 0, counts[LISTED]  # the other kind's count is 0
        while done < count:
            chunk = load_chunk(source, done, count, LISTED)
            offs, selected, ranks, found = next_chunk(chunk, done, count, LISTED)
            ...
            done += CHUNK

Offsets and ranks inside a block fit in 32 bits. Its begin, in the tensor, in the bitmaps and in
rank order, may not: block numbers are 64-bit before they are multiplied.
"""

import triton
import triton.language as tl

from ..index import BLOCK_SIZE, SEGMENT_SIZE, Column
from ..tensor_index import ENCODINGS, WORD_SIZE

__all__ = [
    "BITS",
    "BLOCK",
    "CHUNK",
    "SEGMENT",
    "WORDS",
    "find_block",
    "load_chunk",
    "next_chunk",
    "popcount",
    "tensor_pointer",
]

BLOCK = tl.constexpr(BLOCK_SIZE)
SEGMENT = tl.constexpr(SEGMENT_SIZE)
BITS = tl.constexpr(WORD_SIZE)
WORDS = tl.constexpr(BLOCK_SIZE // WORD_SIZE)
FULL = tl.constexpr(ENCODINGS.index("full"))
BITMAP = tl.constexpr(ENCODINGS.index("bitmap"))
U16 = tl.constexpr(ENCODINGS.index("u16"))
COLUMNS = tl.constexpr(len(Column))
NUMEL = tl.constexpr(int(Column.NUMEL))
ENCODING = tl.constexpr(int(Column.ENCODING))
RANK = tl.constexpr(int(Column.RANK))
DATA = tl.constexpr(int(Column.DATA))
STARTS = tl.constexpr(int(Column.STARTS))

# Entries that a program takes at a time: four a thread, neighbours in neighbouring lanes, so that a
# warp reads the entries of one word and one run in rank order. Wider loads would be fewer for the
# parameters, but would split each access to the states, which are twice as many. Chosen from the
# compiled code, unmeasured: the optimizer at sm_90, bf16 with a master and 4 warps, has 233
# registers at 2048 entries, 128 at 1024 and 80 at 512, without spills.
CHUNK = tl.constexpr(512)
ROWS = tl.constexpr(CHUNK // BITS)


@triton.jit
def tensor_pointer(address_ptr, DTYPE: tl.constexpr):
    """Return a tensor's data pointer; null stands for a missing tensor."""
    return tl.load(address_ptr).to(tl.pointer_type(DTYPE))


@triton.jit
def popcount(words):
    """Count the bits of uint32 words. LLVM turns this form into one instruction."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def find_block(words_ptr, positions_ptr, starts_ptr, table_ptr, programs_ptr):
    """Find the block or segment that this program works on.

    Returns:
        tensor: int64, the number of its tensor;
        begin: int64, its first entry in the tensor;
        first: int64, the rank of its first selected entry;
        tensor_first: int64, the rank of the tensor's first selected entry;
        source: what `load_chunk` and `next_chunk` read;
        counts: the dense entries of a block and the selected ones of a segment; one of them is 0.
    """
    program_ptr = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program_ptr).to(tl.int64)
    block = tl.load(program_ptr + 1).to(tl.int64)
    row_ptr = table_ptr + tensor * COLUMNS
    encoding = tl.load(row_ptr + ENCODING)
    tensor_first = tl.load(row_ptr + RANK)
    data = tl.load(row_ptr + DATA)
    start_ptr = starts_ptr + tl.load(row_ptr + STARTS) + block
    listed = encoding == U16
    begin = block * tl.where(listed, SEGMENT, BLOCK)
    first = tl.load(start_ptr, mask=encoding != FULL, other=tensor_first + begin)
    end = tl.load(start_ptr + 1, mask=listed, other=first)
    dense = tl.minimum(tl.load(row_ptr + NUMEL) - begin, BLOCK)
    counts = tl.where(listed, 0, dense).to(tl.int32), (end - first).to(tl.int32)
    source = (
        words_ptr + data + block * WORDS,
        positions_ptr + data + first - tensor_first,
        encoding == BITMAP,
    )
    return tensor, begin, first, tensor_first, source, counts


@triton.jit
def load_chunk(source, done, count, LISTED: tl.constexpr):
    """Load the positions or the bitmap words of the CHUNK entries from `done` on.

    `done` and `count` are selected entries of a segment where LISTED, else dense ones of a block.
    """
    words_ptr, positions_ptr, has_words = source
    if LISTED:
        rank = done + tl.arange(0, CHUNK)
        chunk = tl.load(positions_ptr + rank, mask=rank < count, other=0)
    else:
        row = done // BITS + tl.arange(0, ROWS)
        # All bits of a `full` tensor are ones, which no memory holds.
        chunk = tl.load(words_ptr + row, mask=has_words & (row * BITS < count), other=-1)
    return chunk


@triton.jit
def next_chunk(chunk, done, count, LISTED: tl.constexpr):
    """Decode a chunk that `load_chunk` has loaded.

    Returns:
        offs: int32 [CHUNK], offsets in the block or segment;
        selected: which of them are selected;
        ranks: int32 [CHUNK], the ranks of those, from 0 in the chunk;
        found: how many are selected, the ranks before the next chunk.
    """
    lane = tl.arange(0, CHUNK)
    if LISTED:
        offs, ranks, found = chunk.to(tl.int32), lane, CHUNK
        selected = done + lane < count
    else:
        bit = tl.arange(0, BITS)
        words = chunk.to(tl.uint32, bitcast=True)
        counts = popcount(words)
        before = tl.cumsum(counts, 0) - counts
        lower_bits = ((1 << bit) - 1).to(tl.uint32, bitcast=True)
        ranks = before[:, None] + popcount(words[:, None] & lower_bits[None, :])
        chosen = ((words[:, None] >> bit[None, :]) & 1) != 0
        offs, found = done + lane, tl.sum(counts, 0)
        # Flat: in a 2-D block with such ranks the compiler would put columns side by side.
        ranks = tl.reshape(ranks, (CHUNK,))
        selected = tl.reshape(chosen, (CHUNK,)) & (offs < count)
    return offs, selected, ranks, found
