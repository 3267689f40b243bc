"""Weights on their way between ranks that share the state of one model.

Each rank steps its share of the selected entries. Afterwards all ranks need the weights of all: one
flat all-gather for each device and dtype sends every selected weight once, and nothing else.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from talos.masks.parts import Parts
from talos.optim.buckets import Bucket
from talos_kernels import Index, scatter_

__all__ = ["Exchange"]


class Exchange:
    """Sends the weights that this rank stepped, and writes those of the others.

    Args:
        parts: the entries of each rank.
        buckets: the optimizer's.
    """

    def __init__(self, parts: Parts, buckets: Sequence[Bucket]) -> None:
        assert parts.mesh is not None
        self._mesh = parts.mesh
        self._rank = parts.mesh.get_local_rank()
        self._launches: dict[
            tuple[torch.device, torch.dtype], list[tuple[Bucket, list[Index]]]
        ] = {}
        for bucket in buckets:
            indices = [
                Index.pack([parts.share(name, rank) for name in bucket.params], bucket.index.device)
                for rank in range(parts.mesh.size())
            ]
            indices[self._rank] = bucket.index
            kind = bucket.index.device, bucket.dtype
            self._launches.setdefault(kind, []).append((bucket, indices))

    @property
    def nbytes(self) -> int:
        """Bytes of the other ranks' indices."""
        launches = [each for alike in self._launches.values() for each in alike]
        every = sum(index.nbytes for _, indices in launches for index in indices)
        return every - sum(bucket.index.nbytes for bucket, _ in launches)

    @torch.no_grad()
    def run(self) -> None:
        """Send and write; all ranks call this."""
        for (device, dtype), launches in self._launches.items():
            sizes = [
                sum(indices[rank].nnz for _, indices in launches)
                for rank in range(self._mesh.size())
            ]
            own = torch.zeros(max(sizes), dtype=dtype, device=device)
            weights = [
                each for bucket, _ in launches for each in bucket.own_weights_by_name().values()
            ]
            torch.cat(weights, out=own[: sizes[self._rank]])
            every = own.new_empty(len(sizes), max(sizes))
            dist.all_gather_into_tensor(every.view(-1), own, group=self._mesh.get_group())
            for rank, values in enumerate(every):
                if rank != self._rank:
                    _write(launches, rank, values)


def _write(launches: Sequence[tuple[Bucket, list[Index]]], rank: int, values: Tensor) -> None:
    """Write the weights of a rank into the model."""
    for bucket, indices in launches:
        index = indices[rank]
        scatter_(bucket.held, index, values[: index.nnz])
        values = values[index.nnz :]
