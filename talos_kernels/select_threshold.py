"""The k lowest or largest entries of a list of tensors, as a threshold, without concatenating.

The bits of a float that is not negative, read as an integer, have the order of the floats:

    key(s) = bits(s)                 lowest first
           = bits(max) - bits(s)     largest first; max is the largest finite float

So the k-th key is found digit by digit, from the highest. Each pass counts, by their next digit,
the entries that begin with the digits found so far. It takes the first digit whose running total
reaches the rest of k. A float32 key has 31 bits: three passes on a CPU (11, 10, 10 bits), four on a
GPU (7, 8, 8, 8), where reading is cheaper than counting among many bins. That reads 12 or 16 bytes
an entry, with at most 16 KB of counts. Counts are integers, so neither the order of adding nor a
split of the tensors over processes changes the result.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import PARAM_DTYPES, contiguous
from ._ops import define
from .errors import TalosTypeError, TalosValueError

__all__ = ["Threshold", "score_histogram_reference", "select_threshold"]

DIGITS = {torch.float32: (11, 10, 10), torch.float64: (11, 11, 11, 10, 10, 10)}
"""Bits of a key's digits from the highest: all bits of the float but the sign."""
GPU_DIGITS = (7, 8, 8, 8)
"""Those of float32 on a GPU, where a histogram costs by its number of bins; unmeasured."""


def score_histogram_reference(
    scores: Sequence[Tensor], prefix: Tensor, shift: int, bits: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """Define the op, one tensor after another.

    Among keys with `key >> (shift + bits) == prefix` it counts each digit, the `bits` bits above
    `shift`; and in each tensor the entries that are no scores. 16-bit floats count as float32. The
    infinity that sorts last has no key.
    """
    counts, refused = prefix.new_zeros(1 << bits), prefix.new_zeros(len(scores))
    for i, score in enumerate(scores):
        if score.dtype != torch.float64:
            score = score.float()
        integer = torch.int64 if score.dtype == torch.float64 else torch.int32
        usable = score.isfinite() & (score >= 0)
        excluded = score == (-math.inf if largest else math.inf)
        refused[i] = score.numel() - (usable | excluded).count_nonzero()
        keys = score[usable].abs().view(integer).long()  # abs: -0.0 is 0.0
        if largest:
            highest = torch.tensor(torch.finfo(score.dtype).max, dtype=score.dtype, device="cpu")
            keys = int(highest.view(integer)) - keys
        keys = keys[keys >> (shift + bits) == prefix]
        counts += (keys >> shift & (1 << bits) - 1).bincount(minlength=1 << bits)
    return counts, refused


def _fake(
    scores: Sequence[Tensor], prefix: Tensor, shift: int, bits: int, largest: bool
) -> tuple[Tensor, Tensor]:
    return prefix.new_empty(1 << bits), prefix.new_empty(len(scores))


define(
    "score_histogram",
    "(Tensor[] scores, Tensor prefix, int shift, int bits, bool largest) -> (Tensor, Tensor)",
    score_histogram_reference,
    fake=_fake,
)


@dataclass(frozen=True)
class Threshold:
    """A selection in a list of tensors: entries beyond a value, and some equal to it.

    Attributes:
        value: the score of the last selected entry.
        largest: whether larger scores come first.
        ties: how many entries equal to `value` each tensor selects, first positions first; None:
            all of them.

    Example:
        >>> threshold = Threshold(value=1.0, largest=False, ties=(2,))
        >>> threshold.select(0, torch.tensor([1.0, 0.0, 1.0, 1.0]))
        tensor([ True,  True,  True, False])
    """

    value: float
    largest: bool
    ties: tuple[int, ...] | None

    def select(self, i: int, score: Tensor) -> Tensor:
        """Return the selected entries of tensor `i`.

        Args:
            i: the tensor's number in the list of scores.
            score: that tensor.

        Returns:
            bool, in the shape of `score` and on its device.

        Example:
            >>> scores = [torch.tensor([3.0, 1.0]), torch.tensor([[0.0], [2.0]])]
            >>> select_threshold(scores, 2).select(1, scores[1])
            tensor([[ True],
                    [False]])
        """
        score = self._comparable(score)
        if self.ties is None:
            return score >= self.value if self.largest else score <= self.value
        chosen = score > self.value if self.largest else score < self.value
        chosen = chosen.contiguous()
        if self.ties[i]:
            equal = (score == self.value).flatten().nonzero()[: self.ties[i], 0]
            chosen.view(-1)[equal] = True
        return chosen

    def count_ties(self, score: Tensor) -> Tensor:
        """Count the entries equal to `value`: int64 0-dim, on the device of `score`."""
        return (self._comparable(score) == self.value).count_nonzero()

    def _comparable(self, score: Tensor) -> Tensor:
        """Return the tensor, in float64 if its dtype would round `value`."""
        score = score.detach()
        exact = torch.tensor(self.value, dtype=score.dtype, device="cpu").item() == self.value
        return score if exact else score.double()


def select_threshold(
    scores: Sequence[Tensor],
    k: int,
    largest: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    names: Sequence[str] | None = None,
    magnitudes: bool = False,
) -> Threshold:
    """Find the k lowest of all entries of many tensors: exactly k, one launch a pass.

    Equal scores are selected in (tensor, flat position) order, under a group in (tensor, rank, flat
    position) order. On a GPU the host waits once, and once more where equal scores have to be cut.

    Args:
        scores: float32, bfloat16, float16 or float64, any shapes, one device; not negative. An
            entry that may not be selected holds inf, or -inf where `largest`. Tensors that are not
            contiguous are copied.
        k: how many entries to select, on all ranks together.
        largest: select the largest.
        group: processes that hold shards of the same tensors, in the same order and dtypes; a shard
            may be empty. Each calls this and receives its own `ties`.
        names: of the tensors, for errors.
        magnitudes: compare absolute values, which are made of one tensor at a time; `select` then
            takes a tensor's absolute values.

    Returns:
        The threshold; its `select` gives the selection of one tensor at a time.

    Raises:
        TalosTypeError: a dtype is not supported.
        TalosValueError: a score is NaN, negative or the other infinity, on any rank; fewer than `k`
            entries may be selected; `k` is negative; devices differ; names do not fit.

    Example:
        >>> scores = [torch.tensor([1.0, 0.0, torch.inf]), torch.tensor([[1.0, 2.0]])]
        >>> select_threshold(scores, 2)
        Threshold(value=1.0, largest=False, ties=(1, 0))
    """
    names = _check(scores, k, names)
    wide = any(score.dtype == torch.float64 for score in scores)
    dtype = torch.float64 if wide else torch.float32
    rows = contiguous(scores)
    device = scores[0].device if scores else torch.device("cpu")
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    left = torch.full_like(prefix, k)
    digits = _digits(dtype, device)
    shift = sum(digits)
    checked: list[Tensor] = []
    for bits in digits:
        shift -= bits
        found = _histogram(rows, wide, prefix, shift, bits, largest, magnitudes)
        if group is not None:
            dist.all_reduce(found, group=group)
        counts = found[: 1 << bits]
        totals = counts.cumsum(0)
        if not checked:
            checked = [totals[-1:], found[1 << bits :]]
        # `take`, because indexing by a tensor would wait for the device
        digit = torch.searchsorted(totals, left).clamp(max=counts.numel() - 1)
        equal = counts.take(digit)
        left = left - totals.take(digit) + equal
        prefix = (prefix << bits) | digit
    key, last, equal_keys, entries, *refused = torch.cat(
        [torch.stack([prefix, left, equal]), *checked]
    ).tolist()
    for name, count in zip(names, refused, strict=True):
        if count:
            raise TalosValueError(
                f"scores[{name}] must be finite and not negative, got {count} entries that are "
                "not; look for overflow in the model's loss or leave the tensor out"
            )
    if k > entries:
        raise TalosValueError(
            f"k must be at most {entries}, the number of entries that are not excluded, got {k}; "
            "select fewer or exclude fewer"
        )
    threshold = Threshold(_value(key, dtype, largest), largest, None)
    if last == equal_keys:
        return threshold
    ties = _cut(threshold, rows, last, group, magnitudes)
    return Threshold(threshold.value, largest, ties)


def _check(scores: Sequence[Tensor], k: int, names: Sequence[str] | None) -> list[str]:
    """Refuse unusable arguments; return the tensors' names for error messages."""
    if names is not None and len(names) != len(scores):
        raise TalosValueError(
            f"names must hold {len(scores)} entries, one a tensor, got {len(names)}"
        )
    shown = [repr(name) for name in (range(len(scores)) if names is None else names)]
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise TalosValueError(f"k must be an integer of at least 0, got {k!r}")
    for name, score in zip(shown, scores, strict=True):
        if score.dtype not in PARAM_DTYPES:
            raise TalosTypeError(
                f"scores[{name}] must be float32, bfloat16, float16 or float64, got {score.dtype}"
            )
        if score.device != scores[0].device:
            raise TalosValueError(
                f"scores[{name}] must be on {scores[0].device}, got {score.device}"
            )
    return shown


def _digits(dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    on_gpu = device.type == "cuda" and dtype == torch.float32  # 64-bit keys have no kernel
    return GPU_DIGITS if on_gpu else DIGITS[dtype]


def _histogram(
    rows: Sequence[Tensor],
    wide: bool,
    prefix: Tensor,
    shift: int,
    bits: int,
    largest: bool,
    magnitudes: bool,
) -> Tensor:
    """Return int64 [2^bits + tensors]: counts of a digit, and refused entries of each tensor.

    Tensors of several dtypes and magnitudes are counted one by one; the 64-bit keys have no kernel.
    """
    if not wide and not magnitudes and len({row.dtype for row in rows}) <= 1:
        return torch.cat(torch.ops.talos.score_histogram(rows, prefix, shift, bits, largest))
    counts, refused = prefix.new_zeros(1 << bits), []
    for each in rows:
        row = each.abs() if magnitudes else each
        count = score_histogram_reference if wide else torch.ops.talos.score_histogram
        found = count([row.double() if wide else row], prefix, shift, bits, largest)
        counts += found[0]
        refused.append(found[1])
    return torch.cat([counts, *refused])


def _value(key: int, dtype: torch.dtype, largest: bool) -> float:
    """Return the float with this key."""
    integer, real = ("<q", "<d") if dtype == torch.float64 else ("<i", "<f")
    if largest:
        highest = struct.pack(real, torch.finfo(dtype).max)
        key = int(struct.unpack(integer, highest)[0]) - key
    return float(struct.unpack(real, struct.pack(integer, key))[0])


def _cut(
    threshold: Threshold,
    rows: Sequence[Tensor],
    left: int,
    group: dist.ProcessGroup | None,
    magnitudes: bool,
) -> tuple[int, ...]:
    """Share `left` ties among tensors, then ranks, in order; return this rank's."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    counts = torch.zeros(ranks, len(rows), dtype=torch.int64, device=rows[0].device)
    counts[rank] = torch.stack(
        [threshold.count_ties(row.abs() if magnitudes else row) for row in rows]
    )
    if group is not None:
        dist.all_reduce(counts, group=group)
    counts = counts.T.contiguous()  # [tensors, ranks]
    before = counts.view(-1).cumsum(0).view_as(counts) - counts
    taken = torch.minimum((left - before).clamp(min=0), counts)
    return tuple(taken[:, rank].tolist())
