"""Tell the samples of a batch apart: which rows of a layer's input belong to which sample.

Rows are counted over the leading dimensions of the input. Most models lay them out as
[outer, samples, inner], so a layout is one number, `outer`:

    first             [B, ..., D] or [B * T, D]    outer = 1
    last of first     [T * B, ..., D]              outer = T
    second            [T, B, ..., D]               outer = T
    last of second    [T, W * B, ..., D]           outer = T * W

The shape alone does not always decide: [B, T, D] with T = B, or a flattened dimension. Then a probe
does. A probe is a backward in which the b-th loss is multiplied by 2^code(b), which is exact. A row
of sample b comes out larger by that factor, so its ratio to the plain backward names the sample.

Rows without a layout may still belong to one sample each, in any order and number: a sorted batch,
packed sequences, the tokens that a router sends to an expert. Further probes then name the sample
of every row, with one probe more than that takes. A row that the probes do not name mixes samples,
and no squared gradient can be right: it is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError, TalosValueError

__all__ = ["Layouts", "Rows", "Use", "blocks", "leading"]

# How many codes there are: they span what the gradients' dtype has exponents for. With more samples
# than codes, the first probe takes random ones, so that no pattern of the batch repeats them.
_PERIOD = 31
_FP16_PERIOD = 7
_TOLERANCE = 0.02  # of log2 of a ratio; two codes differ by 1 or more

# Padding may take this many times the rows, or this many rows. Beyond that, samples with like
# numbers of rows share a block.
_MOST_PADDING = 2
_FEW_ROWS = 4096


@dataclass(eq=False)
class Use:
    """One use of a scored tensor in the forward of a batch.

    Attributes:
        name: the tensor.
        lead: the leading dimensions of the layer's input.
        ordinal: how many uses of the tensor came before it in the forward.
        routed: whether data may decide which rows it gets (one of many parts of a tensor), so that
            each batch has its own layout.
        outer: the layout, once known.
        owners: the sample of each row, int64 [rows], once it is known that there is no layout; -1
            for rows that had no gradient yet.
        signatures: the largest magnitude in each row of dY, one tensor a probe, fp32 or fp64
            [rows].
    """

    name: str
    lead: tuple[int, ...]
    routed: bool = False
    ordinal: int = 0
    outer: int | None = None
    owners: Tensor | None = None
    signatures: list[Tensor] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """What this use has in common with the same use in another batch."""
        return self.name, self.ordinal

    def layouts(self, samples: int) -> dict[str, int]:
        """Return the layouts that the shape allows: kind and `outer`, no two with the same rows."""
        if samples == 1 or 0 in self.lead:
            return {"first": 1}
        found, outer = {}, 1
        for kind, size in zip(("first", "second"), self.lead, strict=False):
            if size % samples == 0:
                found[kind] = outer
                if size > samples:
                    found[f"last of {kind}"] = outer * size // samples
            outer *= size
        return found


class Layouts:
    """What is known of the layouts of one model.

    A layout follows from the model's code, so what a probe decided holds for later batches. There
    are two exceptions, which every batch probes: flattened rows, which may be packed sequences, and
    tensors some of whose rows once had no layout.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int], str] = {}
        self._probed = False
        self._seen: set[str] = set()  # tensors that a probe has reached
        self._scattered: set[str] = set()  # tensors some of whose rows had no layout
        self._half = False
        self._codes = torch.zeros(1, 0, dtype=torch.int64, device="cpu")  # [probes, B]

    def probes(self, uses: Sequence[Use], samples: int, *, half: bool) -> int:
        """Settle the layouts that are known and return how many probes the others need.

        Args:
            uses: of one batch.
            samples: the batch size B.
            half: whether any gradient of the batch is fp16.

        Returns:
            0 if all layouts are known; 1 if one is not, and for the first batch of more than one
            sample; `most` if every row has to be named.
        """
        self._half = half
        self._codes = _codes(samples, _FP16_PERIOD if half else _PERIOD)
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
        """Return the factors of the losses [B] in a probe: powers of two, shaped as `losses`."""
        return torch.ldexp(torch.ones_like(losses), self._codes[probe].to(losses.device))

    def probe(self, use: Use, dy: Tensor) -> None:
        """Keep what `decide` needs of dY [rows, features] in a probe."""
        use.signatures.append(_row_sizes(dy))

    def decide(self, use: Use, dy: Tensor, samples: int) -> int | Tensor | None:
        """Decide the layout of a use, from its probes if there were any.

        Args:
            use: a use whose layout is known, or that was probed.
            dy: of the plain backward, [rows, features].
            samples: the batch size B.

        Returns:
            `outer`, so that the rows are [outer, samples, inner]; or the sample of each row, int64
            [rows], -1 for rows without one; or None if that takes more probes.

        Raises:
            TalosValueError: dY is not finite, or too small to tell samples apart.
            TalosRuntimeError: a row belongs to several samples.
        """
        if not use.signatures and use.outer is None and use.owners is None:
            raise TalosRuntimeError(
                f"{use.name} must be reached by every backward of a batch, got one that the "
                "first did not reach; leave it out with params="
            )
        if not use.signatures and use.outer is not None:
            return use.outer
        size = _row_sizes(dy)
        if not bool(torch.isfinite(size).all()):
            raise TalosValueError(
                f"scores of {use.name} must be finite, got a gradient with NaN or infinity; look "
                "for overflow in the model, or calibrate in float32"
            )
        coarsest = torch.float16 if self._half else dy.dtype
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
        """Return the layout that the probes show, if there is one."""
        allowed, fitting = use.layouts(samples), {}
        signatures = torch.stack(use.signatures)  # [probes, rows]
        visible = (size > floor) & (signatures > floor)
        codes = self._codes[: len(signatures)].to(size.device)
        shift = torch.log2(signatures / size)
        for kind, outer in allowed.items():
            inner = len(size) // (outer * samples)
            wrong = (shift - codes.repeat_interleave(inner, 1).repeat(1, outer)).abs() > _TOLERANCE
            if not bool(wrong[visible].any()):
                fitting[kind] = outer
        self._probed = self._probed or bool(visible.any())
        self._seen.add(use.name)
        if not fitting:
            return None
        kind = next(iter(fitting))
        # A second dimension longer than the batch may be packed sequences, [1, rows].
        lasting = kind.endswith("first") or use.lead[1] == samples
        if len(fitting) == 1 and len(use.lead) > 1 and lasting:
            self._kinds[use.key] = kind
        # Where several fit, each gives the rows that are not zero to samples of the same code. That
        # is enough for this backward; another one of the batch may show more.
        outer = next(iter(fitting.values()))
        use.outer = outer if len(fitting) == 1 else None
        return outer

    def _owners(self, use: Use, size: Tensor, floor: float) -> Tensor:
        """Return the sample of each row: in every probe its code is the row's."""
        signatures = torch.stack(use.signatures)  # [probes, rows]
        visible = (size > floor) & (signatures > floor).all(0)
        if self._half and bool(((size > 0) & ~visible).any()):
            raise TalosValueError(
                f"gradients of {use.name} must be large enough to tell samples apart, got some too "
                "small for float16; calibrate in bfloat16 or float32, or pass batches of one sample"
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
        if use.owners is not None:  # from another backward of the batch
            wrong |= (use.owners >= 0) & (use.owners != order[nearest])
        if bool(wrong[visible].any()):
            raise TalosRuntimeError(
                f"the samples of a batch must not influence one another, got rows of {use.name} "
                "that belong to several; look for statistics over the batch, losses across samples "
                "or projections that a batch shares, pass batches of one sample, or leave the "
                "tensor out with params="
            )
        before = torch.full_like(order[nearest], -1) if use.owners is None else use.owners
        return torch.where(visible, order[nearest], before)


@cache
def _codes(samples: int, period: int) -> Tensor:
    """Return the codes of the samples, int64 [probes, B]: no two samples have the same ones.

    If two samples are mixed in a row, the first probe shows the weaker one where its code is the
    larger. Where samples are no more than codes, the second probe shows it in the other case.
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


def _row_sizes(dy: Tensor) -> Tensor:
    """Return the largest magnitude in each row, fp32 or fp64 [rows]."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    if dy.shape[1] == 0:
        return dy.new_zeros(len(dy), dtype=wide)
    return dy.abs().amax(1).to(wide)


def leading(x: Tensor) -> tuple[int, ...]:
    """Return the leading dimensions of an input [..., D], before a view flattened them.

    Flattened rows are probed in every batch. To know what they were before saves those probes.

    Args:
        x: the input.

    Returns:
        Their sizes.

    Example:
        >>> leading(torch.zeros(2, 3, 4).view(-1, 4))
        (2, 3)
    """
    base, flat = x._base, tuple(x.shape[:-1])
    if base is None or len(flat) != 1 or base.dim() == 2 or base.numel() != x.numel():
        return flat
    order = sorted(range(base.dim()), key=base.stride, reverse=True)  # as it lies in memory
    base = base.permute(order)
    lead, rows = [], len(x)
    for size in base.shape if base.is_contiguous() and x.is_contiguous() else ():
        if rows == 1 or size == 0 or (rows % size and size % rows):
            break
        lead.append(min(size, rows))
        rows //= lead[-1]
    return tuple(lead) if lead and rows == 1 else flat


@dataclass(frozen=True)
class Rows:
    """The rows of one use.

    Attributes:
        dy: the gradient of the use's output, [rows, features].
        inputs: what it multiplied, [rows, features], or looked up, [rows]; None: neither.
        layout: what `Layouts.decide` returned.
    """

    dy: Tensor
    inputs: Tensor | None
    layout: int | Tensor

    def owners(self, samples: int) -> Tensor:
        """Return the sample of each row, int64 [rows]."""
        if isinstance(self.layout, Tensor):
            return self.layout
        inner = len(self.dy) // (self.layout * samples)
        numbers = torch.arange(samples, dtype=torch.int64, device=self.dy.device)
        return numbers.repeat_interleave(inner).repeat(self.layout)


def blocks(uses: Sequence[Rows], samples: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Arrange the rows of a part's uses as the kernels take them.

    Rows with a layout are a view. Rows with owners are sorted by sample and padded with zeros,
    which add nothing to any sum. The rows of several uses are further rows of the samples.

    Args:
        uses: of one part of a parameter.
        samples: the batch size.

    Yields:
        dY [outer, samples, inner, features], and inputs of that shape or ids
        [outer, samples, inner] where there are any. Each sample's rows are in one block.
    """
    if len(uses) == 1 and isinstance(uses[0].layout, int):
        dy, x, outer = uses[0].dy, uses[0].inputs, uses[0].layout
        yield _split(dy, outer, samples), None if x is None else _split(x, outer, samples)
        return
    dys = [rows.dy for rows in uses]
    inputs = [rows.inputs for rows in uses if rows.inputs is not None]
    layouts = [rows.layout for rows in uses if isinstance(rows.layout, int)]
    if len(layouts) == len(uses):
        yield _joined(dys, layouts, samples), _joined(inputs, layouts, samples) if inputs else None
        return
    owners = torch.cat([rows.owners(samples) for rows in uses])
    dy, x = torch.cat(dys), torch.cat(inputs) if inputs else None
    for rows, slots, shape in _slots(owners):
        yield _padded(dy, rows, slots, shape), None if x is None else _padded(x, rows, slots, shape)


def _joined(rows: list[Tensor], layouts: list[int], samples: int) -> Tensor:
    """Rows of several uses, each with a layout, as one block."""
    split = [_split(each, outer, samples) for each, outer in zip(rows, layouts, strict=True)]
    return torch.cat([each.transpose(0, 1).flatten(1, 2) for each in split], 1)[None]


def _split(rows: Tensor, outer: int, samples: int) -> Tensor:
    return rows.view(outer, samples, len(rows) // (outer * samples), *rows.shape[1:])


def _slots(owners: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Each block's rows, their places in the block, and its numbers of samples and of rows each."""
    owners, order = owners.sort(stable=True)
    unowned = int((owners < 0).sum())
    owners, order = owners[unowned:], order[unowned:]
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
    """Return a block with rows of `x` at their slots and zeros elsewhere."""
    block = x.new_zeros((shape[0] * shape[1], *x.shape[1:]))
    block[slots] = x[rows]
    return block.view(1, *shape, *x.shape[1:])
