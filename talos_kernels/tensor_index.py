"""The compressed index: which entries of which tensors are selected.

Every tensor is encoded by its own density d:

| encoding | layout                                           | bytes a selected entry | used      |
|----------|--------------------------------------------------|------------------------|-----------|
| `full`   | nothing                                          | 0                      | d = 1     |
| `bitmap` | 1 bit an entry, an int64 rank a 2048 entries     | 1.03 / (8 d)           | d >= 1/16 |
| `u16`    | 16-bit position in a segment of 65536, its rank  | 2                      | d < 1/16  |

Selected entries are numbered in (tensor, flat position) order. That number is the entry's *rank*,
and every per-entry array (values, exp_avg, master, ...) is one flat array in rank order. Flat
positions and ranks are int64: a tensor may have more than 2**31 entries.

`TensorIndex` encodes one tensor; `index.Index` packs many of them for one kernel launch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._bits import pack_bits, popcount, unpack_bits
from .errors import TalosTypeError, TalosValueError

__all__ = ["BLOCK_SIZE", "ENCODINGS", "SEGMENT_SIZE", "Encoding", "TensorIndex", "blocks_of"]

Encoding = Literal["full", "bitmap", "u16"]
ENCODINGS: tuple[Encoding, ...] = ("full", "bitmap", "u16")

# Dense entries of one block of a `full` or `bitmap` tensor, the share of one program: with an int64
# rank a block the bitmap costs 1 + 64/2048 = 1.03 bits an entry.
BLOCK_SIZE = 2048
WORD_SIZE = 32
# Dense entries of one segment of a `u16` tensor: what a 16-bit position can address.
SEGMENT_SIZE = 1 << 16
# Below this density two bytes a selected entry are fewer than one bit a dense entry.
U16_DENSITY = 1 / 16
# Dense entries that encoding and decoding expand at a time, so that a tensor of 2**31 entries costs
# no int64 temporary of its own size.
CHUNK_SIZE = 1 << 24
# Numbers of a file that are checked at a time: a cast to more bytes costs no memory to speak of.
CHECKED_SIZE = 1 << 18


@dataclass(frozen=True, eq=False)
class TensorIndex:
    """The selected entries of one tensor, compressed.

    Attributes:
        numel: entries of the dense tensor.
        nnz: selected entries.
        encoding: `full`, `bitmap` or `u16`.
        words: int32 `[ceil(numel / 2048) * 64]`; bit j of word w is entry 32 w + j (`bitmap` only).
        positions: uint16 `[nnz]`, ascending inside each segment (`u16` only).
        starts: int64 `[blocks + 1]`, rank of the first selected entry of each block (`bitmap`) or
            segment (`u16`); the last is `nnz`. Empty for `full`.

    Example:
        >>> index = TensorIndex.encode(torch.tensor([True, False, True, True]))
        >>> index.encoding, index.nnz, index.positions_int64().tolist()
        ('bitmap', 3, [0, 2, 3])
    """

    numel: int
    nnz: int
    encoding: Encoding
    words: Tensor
    positions: Tensor
    starts: Tensor

    @classmethod
    def encode(cls, dense: Tensor) -> "TensorIndex":
        """Encode a dense selection.

        Args:
            dense: bool, any shape; read in row-major order.

        Returns:
            The index, on the CPU.

        Raises:
            TalosTypeError: `dense` is not bool.
        """
        if dense.dtype != torch.bool:
            raise TalosTypeError(
                f"dense must be a bool tensor, got {dense.dtype}; compare first, e.g. `mask != 0`"
            )
        flat = dense.detach().reshape(-1).cpu()
        numel, nnz = flat.numel(), int(flat.count_nonzero())
        if nnz == numel and numel > 0:
            return cls._full(numel)
        if nnz >= U16_DENSITY * numel and nnz > 0:
            return cls._from_words(pack_bits(flat, BLOCK_SIZE), numel)
        chunks = flat.split(CHUNK_SIZE) if numel else ()
        positions = [part.nonzero()[:, 0] + i * CHUNK_SIZE for i, part in enumerate(chunks)]
        return cls._from_sorted(torch.cat(positions) if positions else _empty_int64(), numel)

    @classmethod
    def from_positions(cls, positions: Tensor, numel: int) -> "TensorIndex":
        """Encode from flat positions.

        Args:
            positions: integer `[nnz]`, strictly ascending, in `[0, numel)`.
            numel: entries of the dense tensor.

        Returns:
            The index, on the CPU.

        Raises:
            TalosTypeError: `positions` is not an integer tensor.
            TalosValueError: a position is out of range, repeated or out of order.
        """
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise TalosTypeError(f"positions must be an integer tensor, got {positions.dtype}")
        flat = positions.detach().reshape(-1).cpu().to(torch.int64)
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= numel):
            raise TalosValueError(
                f"positions must lie in [0, {numel}), got {int(flat.min())} .. {int(flat.max())}"
            )
        steps = flat.diff()
        if bool((steps <= 0).any()):
            where = int((steps <= 0).nonzero()[0, 0]) + 1
            raise TalosValueError(
                f"positions must be strictly ascending, got {int(flat[where])} after "
                f"{int(flat[where - 1])} at {where}; sort them and drop repeats"
            )
        if flat.numel() == numel and numel > 0:
            return cls._full(numel)
        if flat.numel() >= U16_DENSITY * numel and flat.numel() > 0:
            dense = torch.zeros(numel, dtype=torch.bool, device="cpu")
            dense[flat] = True
            return cls._from_words(pack_bits(dense, BLOCK_SIZE), numel)
        return cls._from_sorted(flat, numel)

    @classmethod
    def from_buffers(
        cls,
        encoding: str,
        numel: int,
        *,
        words: Tensor | None = None,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> "TensorIndex":
        """Rebuild an index from a file's buffers; check all of them.

        Args:
            encoding: `full`, `bitmap` or `u16`.
            numel: entries of the dense tensor.
            words: int32 `[ceil(numel / 2048) * 64]` (`bitmap`).
            positions: uint16 `[nnz]` (`u16`).
            counts: int32 `[ceil(numel / 65536)]`, selected entries a segment (`u16`).

        Returns:
            The index, on the CPU.

        Raises:
            TalosValueError: a buffer is missing, has the wrong length or dtype, selects an entry
                past the end, or its positions are out of order or repeated.
        """
        if encoding == "full":
            return cls._full(numel)
        if encoding == "bitmap":
            length = blocks_of(numel, BLOCK_SIZE) * (BLOCK_SIZE // WORD_SIZE)
            words = _expect(words, "words", torch.int32, length)
            index = cls._from_words(words, numel)
            tail = unpack_bits(words[-(BLOCK_SIZE // WORD_SIZE) :])
            used = numel - (blocks_of(numel, BLOCK_SIZE) - 1) * BLOCK_SIZE
            if numel and bool(tail[used:].any()):
                raise TalosValueError(f"words must select entries below {numel}, got one above")
            return index
        if encoding == "u16":
            counts = _expect(counts, "counts", torch.int32, blocks_of(numel, SEGMENT_SIZE))
            if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > SEGMENT_SIZE):
                raise TalosValueError(f"counts must lie in [0, {SEGMENT_SIZE}]")
            starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device="cpu")
            starts[1:] = counts
            starts.cumsum_(0)
            nnz = int(starts[-1])
            positions = _expect(positions, "positions", torch.uint16, nnz)
            where = _first_descent(positions, starts)
            if where is not None:
                raise TalosValueError(f"positions must be strictly ascending, broken at {where}")
            if nnz:
                last = int(counts.nonzero()[-1, 0]) * SEGMENT_SIZE + int(positions[-1])
                if last >= numel:
                    raise TalosValueError(f"positions must lie in [0, {numel}), got {last}")
            return cls(numel, nnz, "u16", _empty_int32(), positions, starts)
        raise TalosValueError(f"encoding must be one of {ENCODINGS}, got {encoding!r}")

    @classmethod
    def _full(cls, numel: int) -> "TensorIndex":
        return cls(numel, numel, "full", _empty_int32(), _empty_uint16(), _empty_int64())

    @classmethod
    def _from_words(cls, words: Tensor, numel: int) -> "TensorIndex":
        per_block = words.view(-1, BLOCK_SIZE // WORD_SIZE)
        starts = torch.zeros(per_block.shape[0] + 1, dtype=torch.int64, device="cpu")
        parts = per_block.split(CHECKED_SIZE // BLOCK_SIZE * WORD_SIZE)
        starts[1:] = torch.cat([popcount(part).sum(1, dtype=torch.int64) for part in parts])
        starts.cumsum_(0)
        return cls(numel, int(starts[-1]), "bitmap", words, _empty_uint16(), starts)

    @classmethod
    def _from_sorted(cls, positions: Tensor, numel: int) -> "TensorIndex":
        segments = blocks_of(numel, SEGMENT_SIZE)
        starts = torch.zeros(segments + 1, dtype=torch.int64, device="cpu")
        if positions.numel():
            end = (segments + 1) * SEGMENT_SIZE
            edges = torch.arange(0, end, SEGMENT_SIZE, dtype=torch.int64, device="cpu")
            starts = torch.searchsorted(positions, edges)
        local = (positions & (SEGMENT_SIZE - 1)).to(torch.uint16)
        return cls(numel, positions.numel(), "u16", _empty_int32(), local, starts)

    @property
    def density(self) -> float:
        """Selected entries over all entries; 0 for an empty tensor."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded buffers."""
        return self.words.nbytes + self.positions.nbytes + self.starts.nbytes

    @property
    def counts(self) -> Tensor:
        """int32 `[segments]`: selected entries of each segment of a `u16` index."""
        return self.starts.diff().to(torch.int32)

    def decode(self) -> Tensor:
        """Return the dense selection: bool `[numel]` on the CPU."""
        if self.encoding == "full":
            return torch.ones(self.numel, dtype=torch.bool, device="cpu")
        if self.encoding == "bitmap":
            return unpack_bits(self.words)[: self.numel].clone()
        dense = torch.zeros(self.numel, dtype=torch.bool, device="cpu")
        dense[self.positions_int64()] = True
        return dense

    def positions_int64(self) -> Tensor:
        """Return the selected flat positions: int64 `[nnz]`, ascending, on the CPU."""
        if self.encoding == "full":
            return torch.arange(self.numel, dtype=torch.int64, device="cpu")
        if self.encoding == "u16":
            segment = torch.arange(
                self.starts.numel() - 1, dtype=torch.int64, device="cpu"
            ).repeat_interleave(self.starts.diff())
            return segment * SEGMENT_SIZE + self.positions.to(torch.int64)
        words = self.words.split(CHUNK_SIZE // WORD_SIZE)
        return torch.cat(
            [unpack_bits(part).nonzero()[:, 0] + i * CHUNK_SIZE for i, part in enumerate(words)]
        )

    def rank(self, positions: Tensor) -> Tensor:
        """Return the rank of each flat position; -1 where it is not selected.

        Args:
            positions: int64, any shape, in `[0, numel)`.

        Returns:
            int64, the shape of `positions`.
        """
        if self.encoding == "full":
            return positions.clone()
        if self.encoding == "u16":
            own = self.positions_int64()
            rank = torch.searchsorted(own, positions)
            found = own[rank.clamp(max=max(self.nnz - 1, 0))] == positions if self.nnz else rank < 0
            return torch.where(found, rank, -1)
        word, bit = positions // WORD_SIZE, positions % WORD_SIZE
        bits = self.words[word].to(torch.int64) & 0xFFFFFFFF
        lower = popcount((bits & ((1 << bit) - 1)).to(torch.int32))
        return torch.where((bits >> bit) & 1 == 1, self._word_starts()[word] + lower, -1)

    def select(self, ranks: Tensor) -> Tensor:
        """Return the flat position of each rank, without decoding the whole index for a few.

        Args:
            ranks: int64 `[n]`, in `[0, nnz)`.

        Returns:
            int64 `[n]`.
        """
        if self.encoding == "full":
            return ranks.clone()
        if self.encoding == "u16":
            segment = torch.searchsorted(self.starts, ranks, right=True) - 1
            local = self.positions.view(torch.int16)[ranks].to(torch.int64) & (SEGMENT_SIZE - 1)
            return segment * SEGMENT_SIZE + local
        if ranks.numel() * WORD_SIZE > self.numel:  # then decoding is less work
            return self.positions_int64()[ranks]
        before = self._word_starts()
        word = torch.searchsorted(before, ranks, right=True) - 1
        bits = unpack_bits(self.words[word]).view(-1, WORD_SIZE)
        nth = (ranks - before[word] + 1)[:, None]
        bit = (bits.cumsum(1, dtype=torch.uint8) >= nth).to(torch.uint8).argmax(1)  # the first such
        return word * WORD_SIZE + bit

    def _word_starts(self) -> Tensor:
        """Return the rank of the first selected entry of each word, then nnz: int64."""
        before = torch.zeros(self.words.numel() + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(popcount(self.words), 0, out=before[1:])
        return before

    def intersection_nnz(self, other: "TensorIndex") -> int:
        """Return the number of entries that both select."""
        return (self & other).nnz

    def __and__(self, other: "TensorIndex") -> "TensorIndex":
        """Return the entries that both select."""
        return self._combined(other, torch.bitwise_and)

    def __or__(self, other: "TensorIndex") -> "TensorIndex":
        """Return the entries that either selects."""
        return self._combined(other, torch.bitwise_or)

    def _combined(
        self, other: "TensorIndex", operation: Callable[[Tensor, Tensor], Tensor]
    ) -> "TensorIndex":
        """Combine two selections: bitmaps word by word, others as dense ones."""
        if self.numel != other.numel:
            raise TalosValueError(
                "indices must cover tensors of one size, "
                f"got {self.numel} and {other.numel} entries"
            )
        if self.encoding == other.encoding == "bitmap":
            return self._from_words(operation(self.words, other.words), self.numel)._recoded()
        return self.encode(operation(self.decode(), other.decode()))

    def __eq__(self, other: object) -> bool:
        """Equal when the same entries of a tensor of the same size are selected."""
        if not isinstance(other, TensorIndex):
            return NotImplemented
        return (
            (self.numel, self.nnz, self.encoding) == (other.numel, other.nnz, other.encoding)
            and torch.equal(self.words, other.words)
            and torch.equal(self.positions.view(torch.int16), other.positions.view(torch.int16))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the positions as int16: torch pickles no uint16 storage."""
        positions = self.positions.view(torch.int16)
        return _restore, (
            self.numel, self.nnz, self.encoding, self.words, positions, self.starts,
        )  # fmt: skip

    def _recoded(self) -> "TensorIndex":
        """Return the same selection in the encoding for its density."""
        if self.nnz == self.numel or self.nnz < U16_DENSITY * self.numel or self.nnz == 0:
            return self.from_positions(self.positions_int64(), self.numel)
        return self


def _restore(
    numel: int, nnz: int, encoding: Encoding, words: Tensor, positions: Tensor, starts: Tensor
) -> TensorIndex:
    return TensorIndex(numel, nnz, encoding, words, positions.view(torch.uint16), starts)


def blocks_of(numel: int, size: int) -> int:
    """Return the number of blocks of `size` entries that cover `numel` entries."""
    return -(-numel // size)


def _first_descent(positions: Tensor, starts: Tensor) -> int | None:
    """Return the first rank whose position is not above the one before it in its segment.

    A chunk at a time: as int64 the positions of a file would take four times its size.
    """
    for first in range(1, positions.numel(), CHECKED_SIZE):
        part = positions[first - 1 : first + CHECKED_SIZE].to(torch.int32)
        descends = part.diff() <= 0
        begins = starts[(starts >= first) & (starts < first + len(descends))]
        descends[begins - first] = False
        if bool(descends.any()):
            return first + int(descends.to(torch.uint8).argmax())
    return None


def _empty_int32() -> Tensor:
    return torch.zeros(0, dtype=torch.int32, device="cpu")


def _empty_int64() -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device="cpu")


def _empty_uint16() -> Tensor:
    return torch.zeros(0, dtype=torch.uint16, device="cpu")


def _expect(buffer: Tensor | None, name: str, dtype: torch.dtype, length: int) -> Tensor:
    if buffer is None:
        raise TalosValueError(f"{name} must be given for this encoding, got none")
    if buffer.dtype != dtype or buffer.dim() != 1 or buffer.numel() != length:
        raise TalosValueError(
            f"{name} must be {dtype} of {length} entries, "
            f"got {buffer.dtype} of shape {tuple(buffer.shape)}"
        )
    return buffer.cpu().contiguous()
