"""The compressed index of many tensors, packed for one kernel launch.

`tensor_index.TensorIndex` encodes one tensor. `Index` joins the buffers of many and adds the launch
table, from which each program of a kernel reads its tensor and its block:

| buffer      | dtype, shape         | holds                                                |
|-------------|----------------------|------------------------------------------------------|
| `words`     | int32 `[W]`          | the bitmaps                                          |
| `positions` | uint16 `[P]`         | the 16-bit positions                                 |
| `starts`    | int64 `[S]`          | first rank of each block, counted over all tensors   |
| `table`     | int64 `[tensors, 5]` | numel, encoding, first rank, first word or position, |
|             |                      | first block in `starts`                              |
| `programs`  | int32 `[programs, 2]`| the tensor of each program, and its block in it      |

A program takes one block of 2048 dense entries (`full`, `bitmap`) or one segment of 65536 (`u16`).
A block without a selected entry has no program, as in the values' third of a fused QKV.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import TalosValueError
from .tensor_index import (
    BLOCK_SIZE,
    ENCODINGS,
    SEGMENT_SIZE,
    WORD_SIZE,
    Encoding,
    TensorIndex,
    blocks_of,
)

__all__ = ["BLOCK_SIZE", "SEGMENT_SIZE", "Column", "Encoding", "Index", "TensorIndex"]


class Column(IntEnum):
    """Columns of `Index.table`."""

    NUMEL = 0
    ENCODING = 1
    RANK = 2
    DATA = 3
    STARTS = 4


@dataclass(frozen=True, eq=False)
class Index:
    """The selected entries of a list of tensors; see the module's table.

    Example:
        >>> parts = [TensorIndex.encode(torch.ones(3) > 0), TensorIndex.encode(torch.eye(2) > 0)]
        >>> index = Index.pack(parts)
        >>> index.nnz, index.slices
        (5, (slice(0, 3, None), slice(3, 5, None)))
    """

    numels: tuple[int, ...]
    nnzs: tuple[int, ...]
    words: Tensor
    positions: Tensor
    starts: Tensor
    table: Tensor
    programs: Tensor

    @classmethod
    def pack(cls, parts: Sequence[TensorIndex], device: torch.device | str = "cpu") -> "Index":
        """Pack the indices of many tensors.

        Args:
            parts: one `TensorIndex` a tensor, in the order of the tensors.
            device: where the packed buffers go.
        """
        rows, programs, starts = [], [], []
        rank = word = position = block = 0
        for tensor, part in enumerate(parts):
            data = {"full": 0, "bitmap": word, "u16": position}[part.encoding]
            code = ENCODINGS.index(part.encoding)
            rows.append([part.numel, code, rank, data, block])
            programs.append(_programs(tensor, part))
            starts.append(part.starts + rank)
            rank += part.nnz
            word += part.words.numel()
            position += part.positions.numel()
            block += part.starts.numel()

        def joined(buffers: list[Tensor], dtype: torch.dtype) -> Tensor:
            return torch.cat([torch.zeros(0, dtype=dtype, device="cpu"), *buffers]).to(device)

        return cls(
            tuple(part.numel for part in parts),
            tuple(part.nnz for part in parts),
            joined([part.words for part in parts], torch.int32),
            joined([part.positions for part in parts], torch.uint16),
            joined(starts, torch.int64),
            torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, len(Column)).to(device),
            joined(programs, torch.int32).view(-1, 2),
        )

    @classmethod
    def from_buffers(cls, buffers: Sequence[Tensor]) -> "Index":
        """Rebuild an index from its `buffers`; reads the table (a host sync on a GPU)."""
        words, positions, starts, table, programs = buffers
        rows = table.cpu()
        numels = tuple(int(n) for n in rows[:, Column.NUMEL])
        host_starts = starts.cpu()
        nnzs = []
        for numel, row in zip(numels, rows, strict=True):
            encoding = ENCODINGS[int(row[Column.ENCODING])]
            size = SEGMENT_SIZE if encoding == "u16" else BLOCK_SIZE
            first = int(row[Column.STARTS])
            last = first + blocks_of(numel, size)
            nnz = numel if encoding == "full" else int(host_starts[last] - host_starts[first])
            nnzs.append(nnz)
        return cls(numels, tuple(nnzs), words, positions, starts, table, programs)

    @property
    def buffers(self) -> list[Tensor]:
        """The `index` argument of every op: words, positions, starts, table, programs."""
        return [self.words, self.positions, self.starts, self.table, self.programs]

    @property
    def device(self) -> torch.device:
        """The buffers' device."""
        return self.table.device

    @property
    def nnz(self) -> int:
        """Number of selected entries in all tensors."""
        return sum(self.nnzs)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded selection and of the launch table."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Each tensor's range in an array of rank order."""
        ends = [0]
        for nnz in self.nnzs:
            ends.append(ends[-1] + nnz)
        return tuple(slice(a, b) for a, b in pairwise(ends))

    def split(self) -> "list[Index]":
        """Return one index for each tensor; bitmaps and positions are views of this one's."""
        parts = []
        for part in _parts(self.buffers, self.numels, self.nnzs):  # a host sync on a GPU
            alone = [part.numel, ENCODINGS.index(part.encoding), 0, 0, 0]
            parts.append(
                Index(
                    (part.numel,),
                    (part.nnz,),
                    part.words,
                    part.positions,
                    part.starts,
                    torch.tensor([alone], dtype=torch.int64, device="cpu").to(self.device),
                    _programs(0, part).view(-1, 2).to(self.device),
                )
            )
        return parts

    def to(self, device: torch.device | str) -> "Index":
        """Return the index on another device."""
        moved = [buffer.to(device) for buffer in self.buffers]
        return Index(self.numels, self.nnzs, *moved)

    def unpack(self) -> list[TensorIndex]:
        """Return a `TensorIndex` for each tensor, on the CPU."""
        return list(_parts([buffer.cpu() for buffer in self.buffers], self.numels, self.nnzs))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the positions as int16: torch pickles no uint16 storage."""
        words, positions, *others = self.buffers
        return _restore, (self.numels, self.nnzs, words, positions.view(torch.int16), *others)

    def check_tensors(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors that do not fit this index.

        Raises:
            TalosValueError: their number, sizes or device differ from the index's.
        """
        if len(tensors) != len(self.numels):
            raise TalosValueError(
                f"{name} must hold {len(self.numels)} tensors, one an index, got {len(tensors)}"
            )
        for i, (tensor, numel) in enumerate(zip(tensors, self.numels, strict=True)):
            if tensor.numel() != numel:
                raise TalosValueError(
                    f"{name}[{i}] must have {numel} entries, got shape {tuple(tensor.shape)}"
                )
            if tensor.device != self.device:
                raise TalosValueError(
                    f"{name}[{i}] must be on the index's device {self.device}, "
                    f"got {tensor.device}; move one with .to()"
                )


def _programs(tensor: int, part: TensorIndex) -> Tensor:
    """Return a tensor's programs, flat: its number and each block with a selected entry."""
    if part.encoding == "full":
        blocks = torch.arange(blocks_of(part.numel, BLOCK_SIZE), dtype=torch.int64, device="cpu")
    else:
        blocks = part.starts.cpu().diff().nonzero()[:, 0]
    return torch.stack([torch.full_like(blocks, tensor), blocks], 1).to(torch.int32).flatten()


def _parts(
    buffers: Sequence[Tensor], numels: Sequence[int], nnzs: Sequence[int]
) -> Iterator[TensorIndex]:
    """Yield each tensor's own index, on the buffers' device; words and positions are views."""
    words, positions, starts, table, _ = buffers
    for row, numel, nnz in zip(table.tolist(), numels, nnzs, strict=True):
        encoding = ENCODINGS[row[Column.ENCODING]]
        data, first = row[Column.DATA], row[Column.STARTS]
        blocks = blocks_of(numel, SEGMENT_SIZE if encoding == "u16" else BLOCK_SIZE)
        word_count = blocks * (BLOCK_SIZE // WORD_SIZE) if encoding == "bitmap" else 0
        position_count = nnz if encoding == "u16" else 0
        start_count = 0 if encoding == "full" else blocks + 1
        yield TensorIndex(
            numel,
            nnz,
            encoding,
            words[data : data + word_count] if word_count else words[:0],
            positions[data : data + position_count] if position_count else positions[:0],
            starts[first : first + start_count] - row[Column.RANK],
        )


def _restore(
    numels: tuple[int, ...], nnzs: tuple[int, ...], words: Tensor, positions: Tensor, *rest: Tensor
) -> Index:
    return Index(numels, nnzs, words, positions.view(torch.uint16), *rest)
