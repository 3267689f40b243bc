"""Which rows of a layer's input belong to which sample.

Rows are counted over the leading dimensions of a layer's input. Every layout in use is
[outer, samples, inner] for some split of the rows, so a layout is one number, `outer`:

    first    [B, ..., D] or [B * T, D]    outer = 1
    second   [T, B, ..., D]               outer = T
    last     [T * B, ..., D]              outer = T

Shapes do not always tell them apart: [B, T, D] with T = B, or a flattened dimension. A probe does.
It is a backward in which the b-th loss is scaled by 2^code(b), an exact operation: a row of one
sample then comes out scaled by that sample's factor, and the ratio to the unscaled backward names
the sample. Rows that fit no layout hold several samples, which no squared gradient may do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import TalosRuntimeError, TalosValueError

__all__ = ["Layouts", "Use", "leading"]

Origin = Literal["layer", "attention", "image"]

# How many codes there are: they span what the gradients' dtype has exponents for. Where samples are
# more, codes come at random, so that they keep step with nothing.
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
        ordinal: how many uses of the tensor came before it in the forward.
        outer: the layout, once it is known.
        signature: the largest magnitude in each row of dY in the probe, fp32 or fp64 [rows].
    """

    name: str
    lead: tuple[int, ...]
    origin: Origin
    ordinal: int = 0
    outer: int | None = None
    signature: Tensor | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What this use has in common with that of another batch."""
        return self.name, self.ordinal

    def layouts(self, samples: int) -> dict[str, int]:
        """The layouts that the shape allows: kind and `outer`, no two with the same rows."""
        if samples == 1:
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
    in every batch.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int], str] = {}
        self._probed = False
        self._half = False
        self._codes = torch.zeros(0, dtype=torch.int64, device="cpu")

    def needs_probe(self, uses: Sequence[Use], samples: int) -> bool:
        """Settles the layouts that are known and tells whether the rest wants a probe.

        Args:
            uses: of one batch.
            samples: the batch size B.

        Returns:
            True where a layout is unknown, and for the first batch of more than one sample.

        Raises:
            TalosValueError: the rows of a tensor cannot be split into samples.
        """
        unknown = not self._probed and samples > 1
        for use in uses:
            if use.outer is not None:
                continue
            allowed = use.layouts(samples)
            if not allowed:
                raise TalosValueError(
                    f"{use.name} must see the {samples} samples of a batch in dimension 0 or 1 of "
                    f"its input, got leading dimensions {list(use.lead)}; pass batches of one "
                    "sample, leave it out with params= or requires_grad_(False), or turn sequence "
                    "packing off"
                )
            if len(allowed) == 1:
                use.outer = next(iter(allowed.values()))
            elif self._kinds.get(use.key) in allowed:
                use.outer = allowed[self._kinds[use.key]]
            else:
                unknown = True
        return unknown

    def probe_scales(self, losses: Tensor, *, half: bool) -> Tensor:
        """The factors of the losses in the probe: powers of two, shaped as `losses` [B].

        Args:
            losses: of the samples.
            half: whether their gradients are fp16 anywhere on their way.
        """
        self._half = half
        period, count = _FP16_PERIOD if half else _PERIOD, len(losses)
        codes = torch.linspace(
            0, period - 1, count, dtype=torch.float32, device="cpu"
        ).round()  # far apart where there are few
        if count > period:
            codes = torch.randint(
                period,
                (count,),
                generator=torch.Generator().manual_seed(0),
                dtype=torch.int64,
                device="cpu",
            )
        self._codes = (codes.long() - period // 2).to(losses.device)
        return torch.ldexp(torch.ones_like(losses), self._codes)

    def listen(self, use: Use, rows: Tensor) -> None:
        """Keeps what the decision needs of dY [rows, features] in the probe."""
        use.signature = _row_sizes(rows)

    def decide(self, use: Use, rows: Tensor, samples: int) -> int:
        """The layout of a use, from its probe where there was one.

        Args:
            use: a use whose layout is known or that was probed.
            rows: dY of the unscaled backward, [rows, features].
            samples: the batch size B.

        Returns:
            outer, with which `rows` is [outer, samples, inner].

        Raises:
            TalosValueError: dY is not finite.
            TalosRuntimeError: a row belongs to several samples.
        """
        if use.signature is None:
            if use.outer is None:
                raise TalosRuntimeError(
                    f"{use.name} must be reached by every backward of a batch, got one that the "
                    "first did not reach; leave it out with params="
                )
            return use.outer
        size = _row_sizes(rows)
        if not bool(torch.isfinite(size).all()):
            raise TalosValueError(
                f"scores of {use.name} must be finite, got a gradient with NaN or infinity; look "
                "for overflow in the model, or calibrate in float32"
            )
        allowed, fitting = use.layouts(samples), {}
        coarsest = torch.float16 if self._half else rows.dtype
        floor = torch.finfo(coarsest).tiny * 16  # below, numbers are too coarse for a ratio
        heard = (size > floor) & (use.signature > floor)
        codes, shift = self._codes.to(rows.device), torch.log2(use.signature / size)
        for kind, outer in allowed.items():
            inner = len(rows) // (outer * samples)
            wrong = (shift - codes.repeat_interleave(inner).repeat(outer)).abs() > _TOLERANCE
            if not bool(wrong[heard].any()):
                fitting[kind] = outer
        if not fitting:
            raise TalosRuntimeError(
                f"the samples of a batch must not influence one another, got rows of {use.name} "
                "that belong to several; look for statistics over the batch, losses across samples "
                "or packed sequences, pass batches of one sample, or leave the tensor out with "
                "params="
            )
        if len(fitting) == 1 < len(allowed) and len(use.lead) > 1:
            self._kinds[use.key] = next(iter(fitting))
        self._probed = self._probed or bool(heard.any())
        use.signature = None
        # Where several fit they give each row that is not zero to samples of the same code. That is
        # enough for this backward; another one of the batch may tell more.
        outer = next(iter(fitting.values()))
        use.outer = outer if len(fitting) == 1 else None
        return outer


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
