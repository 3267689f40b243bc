"""Which rows of a layer's input belong to which sample.

Rows are counted over the leading dimensions of a layer's input. Most models lay them out as
[outer, samples, inner] for some split of the rows, so such a layout is one number, `outer`:

    first    [B, ..., D] or [B * T, D]    outer = 1
    second   [T, B, ..., D]               outer = T
    last     [T * B, ..., D]              outer = T

Shapes do not always tell them apart: [B, T, D] with T = B, or a flattened dimension. A probe does.
It is a backward in which the b-th loss is scaled by 2^code(b), an exact operation: a row of one
sample then comes out scaled by that sample's factor, and the ratio to the unscaled backward names
the sample.

The samples may also have changed places, as in a batch that is sorted: the sum of their squares is
the same, so a layout is good that gives each of them the rows of another one, unless a tensor is
used several times, in which case the uses must agree.

Rows that fit no layout may still be one sample's each, in any order and any number: those of a
batch that is packed, those that a router hands to an expert. Further probes name their
samples one by one, with codes of which no two samples have all in common, and one probe more than
that takes. Rows that all probes together do not name hold several samples, which no squared
gradient may do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError, TalosValueError

__all__ = ["Layouts", "Use", "leading"]

Origin = Literal["layer", "attention", "image"]

# How many codes there are: they span what the gradients' dtype has exponents for. Where samples are
# more, those of the first probe come at random, so that they keep step with nothing.
_PERIOD = 31
_FP16_PERIOD = 7
_TOLERANCE = 0.02  # of log2 of a ratio; two codes differ by 1 or more


@dataclass(eq=False)
class Use:
    """One use of a scored tensor in the forward of a batch.

    Attributes:
        name: the tensor.
        lead: the leading dimensions of the layer's input.
        origin: "attention" inside `multi_head_attention_forward`, whose inputs are [T, B, D] or
            [T * B, D]; "image" for patches, [B, L, D]; "layer" for all else.
        tensors: all tensors that it uses, the bias too.
        ordinal: how many uses of the tensor came before it in the forward.
        routed: whether it is one of many parts of a tensor, of which data may decide what rows it
            gets, so that its layout is no other batch's.
        outer: the layout, once it is known.
        owners: the sample of each row, int64 [rows], once it is known that there is no layout;
            -1 for rows without a gradient so far.
        signatures: the largest magnitude in each row of dY, one for each probe, fp32 or fp64
            [rows].
    """

    name: str
    lead: tuple[int, ...]
    origin: Origin
    routed: bool = False
    tensors: tuple[str, ...] = ()
    ordinal: int = 0
    outer: int | None = None
    owners: Tensor | None = None
    signatures: list[Tensor] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """What this use has in common with that of another batch."""
        return self.name, self.ordinal

    def layouts(self, samples: int) -> dict[str, int]:
        """The layouts that the shape allows: kind and `outer`, no two with the same rows."""
        if samples == 1 or 0 in self.lead:
            return {"first": 1}
        first, second = (*self.lead, 0, 0)[:2]
        if self.origin == "attention":
            if second % samples:
                return {}
            also = {} if second == samples else {"last": first * second // samples}
            return {"second": first} | also
        found = {}
        if first and first % samples == 0:
            found = {"first": 1} | ({} if first == samples else {"last": first // samples})
        if self.origin == "layer" and second == samples:
            found["second"] = first
        return found


class Layouts:
    """What is known of the layouts of one model.

    A layout belongs to the code of the model, so one that a probe decided holds for later batches.
    Flattened rows are the exception: they may be packed sequences of unequal lengths and are probed
    in every batch. So are the rows of a tensor of which some once had no layout.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int], str] = {}
        self._probed = False
        self._seen: set[str] = set()  # tensors that a probe has reached
        self._scattered: set[str] = set()  # tensors some of whose rows had no layout
        self._again: set[str] = set()  # tensors that the forward of the batch uses more than once
        self._half = False
        self._codes = torch.zeros(1, 0, dtype=torch.int64, device="cpu")  # [probes, B]

    def probes(self, uses: Sequence[Use], samples: int, *, half: bool) -> int:
        """Settles the layouts that are known and tells how many probes the rest wants.

        Args:
            uses: of one batch.
            samples: the batch size B.
            half: whether gradients are fp16 anywhere on their way.

        Returns:
            0; or 1 where a layout is unknown, and for the first batch of more than one sample; or
            as many as name the sample of every row.
        """
        self._half = half
        self._codes = _codes(samples, _FP16_PERIOD if half else _PERIOD)
        times = Counter(name for use in uses for name in use.tensors)
        self._again = {name for name, count in times.items() if count > 1}
        wanted = 0 if self._probed or samples == 1 else 1
        for use in uses:
            if use.outer is not None or use.owners is not None:
                continue
            allowed = use.layouts(samples)
            if not allowed or (use.name in self._scattered and samples > 1):
                wanted = len(self._codes)
            elif samples == 1 or (len(allowed) == 1 and use.name in self._seen and not use.routed):
                use.outer = next(iter(allowed.values()))
            elif self._kinds.get(use.key) in allowed:
                use.outer = allowed[self._kinds[use.key]]
            else:
                wanted = max(wanted, 1)
        return wanted

    @property
    def most(self) -> int:
        """How many probes name the sample of every row."""
        return len(self._codes)

    def scales(self, losses: Tensor, probe: int) -> Tensor:
        """The factors of the losses in a probe: powers of two, shaped as `losses` [B].

        Args:
            losses: of the samples.
            probe: its number, below `most`.
        """
        return torch.ldexp(torch.ones_like(losses), self._codes[probe].to(losses.device))

    def listen(self, use: Use, rows: Tensor) -> None:
        """Keeps what the decision needs of dY [rows, features] in a probe."""
        use.signatures.append(_row_sizes(rows))

    def decide(self, use: Use, rows: Tensor, samples: int) -> int | Tensor | None:
        """The layout of a use, from its probes where there were some.

        Args:
            use: a use whose layout is known or that was probed.
            rows: dY of the unscaled backward, [rows, features].
            samples: the batch size B.

        Returns:
            outer, with which `rows` is [outer, samples, inner]; or the sample of each row, int64
            [rows], -1 for nobody's; or None where that takes more probes than there were.

        Raises:
            TalosValueError: dY is not finite, or too small to be told apart.
            TalosRuntimeError: a row belongs to several samples.
        """
        if not use.signatures and use.outer is None and use.owners is None:
            raise TalosRuntimeError(
                f"{use.name} must be reached by every backward of a batch, got one that the "
                "first did not reach; leave it out with params="
            )
        if not use.signatures and use.outer is not None:
            return use.outer
        size = _row_sizes(rows)
        if not bool(torch.isfinite(size).all()):
            raise TalosValueError(
                f"scores of {use.name} must be finite, got a gradient with NaN or infinity; look "
                "for overflow in the model, or calibrate in float32"
            )
        coarsest = torch.float16 if self._half else rows.dtype
        floor = torch.finfo(coarsest).tiny * 16  # below, numbers are too coarse for a ratio
        if use.owners is None:
            outer = self._layout(use, size, floor, samples)
            if outer is not None:
                return outer
            self._scattered.add(use.name)
            use.outer = None
        elif not use.signatures:  # a later backward of the batch
            new = (use.owners < 0) & (size > (0 if self._half else floor))
            return None if bool(new.any()) else use.owners
        if len(use.signatures) < self.most:
            return None
        use.owners = self._owners(use, size, floor)
        return use.owners

    def _layout(self, use: Use, size: Tensor, floor: float, samples: int) -> int | None:
        """The layout that the probes show, if there is one."""
        allowed, fitting = use.layouts(samples), {}
        signatures = torch.stack(use.signatures)  # [probes, rows]
        heard = (size > floor) & (signatures > floor)
        codes = self._codes[: len(signatures)].to(size.device)
        shift = torch.log2(signatures / size)
        for kind, outer in allowed.items():
            inner = len(size) // (outer * samples)
            wrong = (shift - codes.repeat_interleave(inner, 1).repeat(1, outer)).abs() > _TOLERANCE
            if not bool(wrong[heard].any()):
                fitting[kind] = outer
        if not fitting and self._again.isdisjoint(use.tensors):
            split = {kind: (outer, samples, -1) for kind, outer in allowed.items()}
            fitting = {
                kind: allowed[kind]
                for kind, shape in split.items()
                if _exchanged(shift[0].view(shape), heard[0].view(shape), codes[0])
            }
        self._probed = self._probed or bool(heard.any())
        self._seen.add(use.name)
        if not fitting:
            return None
        if len(fitting) == 1 < len(allowed) and len(use.lead) > 1:
            self._kinds[use.key] = next(iter(fitting))
        # Where several fit they give each row that is not zero to samples of the same code. That is
        # enough for this backward; another one of the batch may tell more.
        outer = next(iter(fitting.values()))
        use.outer = outer if len(fitting) == 1 else None
        return outer

    def _owners(self, use: Use, size: Tensor, floor: float) -> Tensor:
        """The sample of each row, by all probes: the one whose codes are all those of the row."""
        signatures = torch.stack(use.signatures)  # [probes, rows]
        heard = (size > floor) & (signatures > floor).all(0)
        if self._half and bool(((size > 0) & ~heard).any()):
            raise TalosValueError(
                f"gradients of {use.name} must be large enough to tell whose they are, got some "
                "too small for float16; calibrate in bfloat16 or float32, or pass batches of one "
                "sample"
            )
        shift = torch.log2(signatures / size)
        found = shift.round()
        wrong = (shift - found).abs().amax(0) > _TOLERANCE
        codes = self._codes.to(size.device)
        largest = int(codes.abs().max())
        wrong |= found.abs().amax(0) > largest
        places = (2 * largest + 1) ** torch.arange(self.most, dtype=torch.int64, device=size.device)
        keys, order = ((codes + largest) * places[:, None]).sum(0).sort()
        own = found.nan_to_num(0, 0, 0).long().clamp(-largest, largest) + largest
        own = (own * places[:, None]).sum(0)
        nearest = torch.searchsorted(keys, own).clamp_(max=len(keys) - 1)
        wrong |= keys[nearest] != own
        if use.owners is not None:  # of another backward of the batch
            wrong |= (use.owners >= 0) & (use.owners != order[nearest])
        if bool(wrong[heard].any()):
            raise TalosRuntimeError(
                f"the samples of a batch must not influence one another, got rows of {use.name} "
                "that belong to several; look for statistics over the batch, losses across samples "
                "or projections that a batch shares, pass batches of one sample, or leave the "
                "tensor out with params="
            )
        nobody = torch.full_like(order[nearest], -1) if use.owners is None else use.owners
        return torch.where(heard, order[nearest], nobody)


@cache
def _codes(samples: int, period: int) -> Tensor:
    """The code of each sample in each probe, int64 [probes, B]: no two samples' are the same.

    Of two samples that are in one row, the first probe shows the weaker where its code is the
    larger; where samples are no more than codes, the second probe shows it in the other case.
    """
    if samples <= period:
        codes = torch.linspace(0, period - 1, samples, dtype=torch.float32, device="cpu")
        first = codes.round().long() - period // 2  # far apart where there are few
        return torch.stack([first, -first])
    generator = torch.Generator().manual_seed(0)
    digits = [
        torch.randint(period, (samples,), generator=generator, dtype=torch.int64, device="cpu")
    ]
    rest = torch.arange(samples, dtype=torch.int64, device="cpu")
    while bool(rest.any()):
        digits.append(rest % period)
        rest = rest // period
    return torch.stack(digits) - period // 2


def _exchanged(shift: Tensor, heard: Tensor, codes: Tensor) -> bool:
    """Whether the samples of rows [outer, B, inner] have changed places, as far as codes tell."""
    low = shift.where(heard, torch.inf).amin((0, 2))
    high = shift.where(heard, -torch.inf).amax((0, 2))
    some = heard.any(2).any(0)
    found = high[some].round()
    near = torch.maximum((high[some] - found).abs(), (low[some] - found).abs()) <= _TOLERANCE
    distinct = len(codes.unique()) == len(codes) and len(found.unique()) == len(found)
    return distinct and bool((near & torch.isin(found, codes.to(found.dtype))).all())


def _row_sizes(rows: Tensor) -> Tensor:
    """The largest magnitude in each row, fp32 or fp64 [rows]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows), dtype=wide)
    return rows.abs().amax(1).to(wide)


def leading(x: Tensor) -> tuple[int, ...]:
    """The leading dimensions of an input [..., D]; of rows that a view flattened, those before it.

    Flattened rows are probed in every batch, so it pays to know that they are none.

    Args:
        x: the input.

    Returns:
        Their sizes.

    Example:
        >>> leading(torch.zeros(2, 3, 4).view(-1, 4))
        (2, 3)
    """
    base = x._base
    if base is None or x.dim() != 2 or base.dim() == 2 or base.shape[-1:] != x.shape[-1:]:
        return tuple(x.shape[:-1])
    whole = base.numel() == x.numel() and base.is_contiguous() and x.is_contiguous()
    return tuple((base if whole else x).shape[:-1])
