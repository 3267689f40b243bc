"""A calibration on several ranks: which batch each scores, and what must be the same on all.

The sums of scores do not depend on who scored which batch, and labels depend on the number of a
sample. So a mask is the one of a single process that goes through the same batches in this order:
wave by wave, a batch of each rank in a wave, in the order of the ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from math import isfinite
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from talos.batches import digest_of, known_length
from talos.calibration.capture import REMEDY, Capture
from talos.distributed import errors_on_all_ranks, local, rank, world_size
from talos.errors import TalosRuntimeError, TalosValueError
from talos.names import named_parameters
from talos.params import Candidates
from talos.tensors import sums_of_bits

__all__ = ["AGREE", "Waves", "facts_of", "total"]

AGREE = "pass the same model and the same settings on each rank"


class Waves:
    """The batches of a round in waves: at most one batch of each rank in a wave.

    Where the first batch is the same on all ranks, all batches are, and of `n` ranks rank r takes
    the batches r, r + n, r + 2n and so on. Where no two first batches are the same, each rank has
    batches of its own.

    Args:
        batches: what this rank goes through.
        group: the ranks.

    Attributes:
        length: the number of batches of all ranks; None if it is unknown.
        idle: the ranks that have no batch at all.

    Raises:
        TalosValueError: some first batches are the same and others are not.
    """

    def __init__(self, batches: Iterable[Any], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.length = known_length(batches)
        self.idle: list[int] = []
        self._first: Any = None
        stream = iter(batches) if world_size(group) == 1 else self._shared(batches)
        self._stream: Iterator[Any] = stream

    def _shared(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return this rank's batches."""
        with errors_on_all_ranks(self._group) as found:
            stream = iter(batches)
            first = list(islice(stream, 1))
            found.append((digest_of(first[0]) if first else None, self.length))
        self._first = first[0] if first else None
        digests = [digest for digest, _ in found]
        self.idle = [number for number, digest in enumerate(digests) if digest is None]
        lengths = [length for _, length in found]
        stream = chain(first, stream)
        if len(set(digests)) == 1:
            return islice(stream, rank(self._group), None, len(digests))
        there = [digest for digest in digests if digest is not None]
        if len(set(there)) < len(there):
            raise TalosValueError(
                "batches must be the same on all ranks or different on each, got the same first "
                f"batch on ranks {_alike(digests)} of {len(digests)} only; pass the same list on "
                "each, or a DataLoader with a DistributedSampler"
            )
        self.length = None if None in lengths else sum(lengths)
        return stream

    def until(self, cut: int | None) -> Iterator[tuple[Any, list[bool]]]:
        """Go through the waves.

        Args:
            cut: a batch, counted over all ranks, that must begin a wave.

        Yields:
            This rank's batch, or another one if it has none in the wave (None if it never had
            one); and which ranks have a batch in the wave.
        """
        count, own = 0, self._first
        while True:
            with errors_on_all_ranks(self._group) as there:
                following = list(islice(self._stream, 1))
                there.append(bool(following))
            own = following[0] if following else own
            if not any(there):
                return
            early = sum(there) if cut is None or cut < count else cut - count
            ordinals = [sum(there[:each]) for each in range(len(there))]
            for one in (True, False):
                wave = [
                    here and (ordinal < early) == one
                    for here, ordinal in zip(there, ordinals, strict=True)
                ]
                if any(wave):
                    yield own, wave
            count += sum(there)


def total(capture: Capture, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Take the sums of a capture, add those of all ranks, and round them to float32.

    Args:
        capture: of this rank.
        group: the ranks.

    Returns:
        Scores by name, float32, the same on all ranks, or sharded where the sums are.

    Raises:
        TalosRuntimeError: no rank ever reached a parameter.
        TalosValueError: a score is NaN or infinite.
    """
    sums = capture.take()
    with errors_on_all_ranks(group) as reached:
        reached.append(capture.reached)
    if len(reached) > 1 and not capture.sharded:
        for work in [dist.all_reduce(each, group=group, async_op=True) for each in sums.values()]:
            work.wait()
    scores = {}
    for name in list(sums):
        scores[name] = sums.pop(name).float()  # tensor by tensor, for the memory
    with errors_on_all_ranks(group):
        _check(scores, set().union(*reached))
    return scores


def _check(scores: Mapping[str, Tensor], reached: set[str]) -> None:
    """Refuse scores that mean nothing: never reached, or not finite."""
    for name, score in scores.items():
        if name not in reached:
            raise TalosRuntimeError(
                f"{name} must influence the logits, got no gradient of it in any batch, and "
                f"zero scores would be selected first; {REMEDY}"
            )
        part = local(score)
        if part.numel() and not isfinite(part.max()):  # squares: NaN is the largest
            raise TalosValueError(
                f"scores of {name} must be finite, got NaN or infinity; look for overflow in "
                "the model, or calibrate in float32"
            )


def facts_of(model: nn.Module, candidates: Candidates) -> dict[str, object]:
    """Return what ranks must agree on of a model: its candidates and its weights, as hashes."""
    chosen = [(name, tuple(each.param.shape), each.rows) for name, each in candidates.items()]
    params = named_parameters(model)
    sums = sums_of_bits({name: each for name, each in params.items() if each.is_floating_point()})
    return {
        "the selected parameters of the model": digest_of(repr(chosen)),
        "the weights of the model": digest_of(repr(list(sums.values()))),
    }


def _alike(digests: list[str | None]) -> str:
    """Return the ranks that share a first batch with another one."""
    return ", ".join(
        str(number)
        for number, digest in enumerate(digests)
        if digest is not None and digests.count(digest) > 1
    )
