"""DARE: drop entries at random, rescale the others, then merge.

    dare(tau_t) = tau_t / density at entries kept with probability `density`, 0 elsewhere
    tau         = merge of the dare(tau_t)

Source: Yu et al. 2024, "Language Models are Super Mario", arXiv 2311.03099; `density` is
1 - p there.

Whether an entry is kept depends on the seed, the vector's content, the tensor's name and the
entry's flat position, and on nothing else: not on the order of vectors or tensors, nor on threads.
A vector that comes several times is drawn anew each time. The draw is a counter-based hash: the
position goes twice through the 32-bit mixer "lowbias32" of C. Wellons (Hash Prospector, 2018), each
time with 32 bits of a key.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.files import digest
from talos.merging.base import Merge, Source
from talos.merging.task_arithmetic import Mean, TaskArithmetic
from talos.merging.ties import Ties
from talos.options import fraction, read_seed
from talos.task_vectors import TaskVector
from talos.task_vectors.sums import Overlay, Part

__all__ = ["Dare"]

_FOLLOWERS: dict[str, type[Merge]] = {each.name: each for each in (TaskArithmetic, Mean, Ties)}
_CHUNK = 1 << 18  # entries whose draws stay in a cache
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1))


@dataclass(frozen=True, kw_only=True)
class Dare(Merge):
    """Random entries of each vector, rescaled, in another merge.

    Attributes:
        density: the probability to keep an entry, in (0, 1].
        seed: of the draws.
        follow: the merge that comes after: a `Merge`, or `task_arithmetic`, `mean` or `ties` with
            their defaults. The coefficients are those of `Dare`.

    Example:
        >>> Dare(density=0.5, follow="ties").follow
        Ties(scaling_coef=1.0, scaling_coefs=None, density=0.2)
    """

    name = "dare"
    density: float = 0.1
    seed: int = 0
    follow: Merge | str = "task_arithmetic"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        self._store(density=fraction("density", self.density), seed=read_seed(self.seed))
        if isinstance(self.follow, str) and self.follow in _FOLLOWERS:
            self._store(follow=_FOLLOWERS[self.follow]())
        if not isinstance(self.follow, Merge) or isinstance(self.follow, Dare):
            raise TalosValueError(
                f"follow must be {', '.join(_FOLLOWERS)} or another Merge, got {self.follow!r}"
            )
        if self.follow.scaling_coef != 1.0 or self.follow.scaling_coefs is not None:
            raise TalosValueError(
                f"follow must leave the coefficients to dare, got {self.follow!r}; pass "
                "scaling_coef and scaling_coefs beside follow"
            )

    @property
    def averages(self) -> bool:
        """As the merge that follows."""
        return self._next.averages

    @property
    def _next(self) -> Merge:
        assert isinstance(self.follow, Merge)
        return self.follow

    def _scale(self, count: int) -> float:
        return self.scaling_coef * self._next._scale(count)

    def _choose(self, vectors: Sequence[Source]) -> Sequence[Source]:
        times: Counter[str] = Counter()
        drawn = []
        for each in vectors:
            content = _content(each.vector)
            drawn.append(each.then(_Draw(self.density, f"{self.seed}|{content}|{times[content]}")))
            times[content] += 1
        return self._next._choose(drawn)

    def _merge_entries(self, overlay: Overlay) -> tuple[Tensor, Tensor | None]:
        return self._next._merge_entries(overlay)


@dataclass(frozen=True)
class _Draw:
    """Keeps entries of a vector at random and rescales them; see the module.

    Attributes:
        density: the probability to keep an entry.
        key: of the vector and the seed.
    """

    density: float
    key: str

    def __call__(self, name: str, part: Part) -> Part:
        """Choose among a tensor's entries."""
        limit = round(self.density * 2**32) - 2**31
        if limit < 2**31:
            keys = hashlib.sha256(f"{self.key}|{name}".encode()).digest()
            first, second = (int.from_bytes(keys[i : i + 4], "big", signed=True) for i in (0, 4))
            chunks = part.positions().split(_CHUNK)
            part = part.where(torch.cat([_hash(each, first, second) < limit for each in chunks]))
        return Part(part.index, part.values.float() / self.density, part.kept)


def _content(vector: TaskVector) -> str:
    """Return a key that is the same only for vectors of equal entries and values."""
    own = hashlib.sha256(vector.mask.fingerprint.encode())
    source = Source(vector)
    for name in sorted(vector.mask.names):  # their order does not count
        own.update(digest(source.part(name).values).encode())
    return own.hexdigest()


def _hash(positions: Tensor, first: int, second: int) -> Tensor:
    """Hash flat positions (int64) with a key of two words: int32, evenly distributed."""
    bits = positions.to(torch.int32).bitwise_xor_(first)
    _mix_(bits)
    bits ^= (positions >> 32).to(torch.int32)
    _mix_(bits.bitwise_xor_(second))
    return bits


def _mix_(bits: Tensor) -> None:
    """Mix the bits of int32 in place; products wrap around."""
    for shift, factor in _ROUNDS:
        bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        bits *= factor
