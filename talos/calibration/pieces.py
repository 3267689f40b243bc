"""Rows of a batch's samples as blocks [outer, samples, inner, features], as the kernels take them.

Where the rows have a layout, a block is a view of them. Where each has an owner of its own, they
are sorted by sample and every sample's are padded with zeros, which add nothing to any sum, to the
most that one of them has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.calibration.listeners import Sink

__all__ = ["Piece", "blocks"]

# Padding may take as many rows as there are, or as many as nobody minds. Where samples have very
# unequal numbers of rows, those of like numbers go together.
_MOST_PADDING = 2
_FEW_ROWS = 4096


@dataclass(frozen=True)
class Piece:
    """What one use says of a part of a parameter.

    Attributes:
        sink: the use.
        dy: gradient of its output, [rows, features].
        inputs: what it multiplied, [rows, features], or looked up, [rows]; None: neither.
        layout: `outer`, with which rows are [outer, samples, inner]; or the sample of each row,
            int64 [rows], -1 for rows that are nobody's.
    """

    sink: Sink
    dy: Tensor
    inputs: Tensor | None
    layout: int | Tensor

    def owners(self, samples: int) -> Tensor:
        """The sample of each row."""
        if isinstance(self.layout, Tensor):
            return self.layout
        inner = len(self.dy) // (self.layout * samples)
        numbers = torch.arange(samples, dtype=torch.int64, device=self.dy.device)
        return numbers.repeat_interleave(inner).repeat(self.layout)


def blocks(pieces: Sequence[Piece], samples: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The rows of several uses, joined as further rows of the samples.

    Args:
        pieces: of one part.
        samples: the batch size.

    Yields:
        dY [outer, samples, inner, features], and inputs [outer, samples, inner, features] or ids
        [outer, samples, inner] where there are any. Each sample's rows are in one block.
    """
    first = pieces[0]
    if len(pieces) == 1 and isinstance(first.layout, int):
        outer, x = first.layout, first.inputs
        yield _split(first.dy, outer, samples), None if x is None else _split(x, outer, samples)
        return
    dys = [piece.dy for piece in pieces]
    inputs = [piece.inputs for piece in pieces if piece.inputs is not None]
    layouts = [piece.layout for piece in pieces if isinstance(piece.layout, int)]
    if len(layouts) == len(pieces):
        yield _joined(dys, layouts, samples), _joined(inputs, layouts, samples) if inputs else None
        return
    owners = torch.cat([piece.owners(samples) for piece in pieces])
    dy, x = torch.cat(dys), torch.cat(inputs) if inputs else None
    for rows, slots, shape in _slots(owners):
        yield _padded(dy, rows, slots, shape), None if x is None else _padded(x, rows, slots, shape)


def _joined(rows: list[Tensor], layouts: list[int], samples: int) -> Tensor:
    """Rows of several uses, of which each has a layout, as one block."""
    split = [_split(each, outer, samples) for each, outer in zip(rows, layouts, strict=True)]
    return torch.cat([each.transpose(0, 1).flatten(1, 2) for each in split], 1)[None]


def _split(rows: Tensor, outer: int, samples: int) -> Tensor:
    return rows.view(outer, samples, len(rows) // (outer * samples), *rows.shape[1:])


def _slots(owners: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Blocks of samples: which rows, their places in the block, and samples by rows of it."""
    owners, order = owners.sort(stable=True)
    nobody = int((owners < 0).sum())
    owners, order = owners[nobody:], order[nobody:]
    if len(owners) == 0:
        return
    counts = owners.unique_consecutive(return_counts=True)[1]
    sample = torch.arange(len(counts), dtype=torch.int64, device=owners.device)
    sample = sample.repeat_interleave(counts)
    ranks = torch.arange(len(owners), dtype=torch.int64, device=owners.device)
    ranks -= (counts.cumsum(0) - counts)[sample]  # of each row among its sample's
    largest = int(counts.max())
    if len(counts) * largest <= max(_MOST_PADDING * len(owners), _FEW_ROWS):
        sizes = torch.zeros_like(counts)
    else:
        sizes = counts.log2().long()
    for size in sizes.unique():
        number = (sizes == size).cumsum(0) - 1  # of each sample in its block
        mine = (sizes == size)[sample]
        longest = int(counts[sizes == size].max())
        slots = number[sample[mine]] * longest + ranks[mine]
        yield order[mine], slots, (int((sizes == size).sum()), longest)


def _padded(x: Tensor, rows: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """Some rows of `x` at their slots of a block that is zero elsewhere."""
    block = x.new_zeros((shape[0] * shape[1], *x.shape[1:]))
    block[slots] = x[rows]
    return block.view(1, *shape, *x.shape[1:])
