"""A patch as ranks in a mask: no name and no position travels.

The ranks of the changed entries, over all tensors of the mask by their sorted names, are coded as
gaps:

    gap_0 = rank_0,   gap_k = rank_k - rank_(k-1) - 1

Each gap is written in groups of seven bits, the lowest first; the top bit of a byte is set where
more follow. This is LEB128, the unsigned `varint` of Protocol Buffers. A gap below 128 takes one
byte, one below 16384 two. All gaps are coded at once, group by group.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask

__all__ = ["decode_gaps", "decode_ranks", "encode_gaps", "encode_ranks"]

_BUFFERS = ("mask", "dtypes", "gaps", "values")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # a code is a place here

_GROUP = 7
_MOST_GROUPS = 9  # 63 bits: what an int64 holds


def encode_gaps(numbers: Tensor) -> Tensor:
    """Code strictly ascending numbers.

    Args:
        numbers: int64 `[n]`, at least 0, strictly ascending.

    Returns:
        uint8 `[bytes]` on the same device.

    Example:
        >>> encode_gaps(torch.tensor([0, 1, 130, 1000])).tolist()
        [0, 0, 128, 1, 229, 6]
    """
    rest = numbers.diff(prepend=numbers.new_full((1,), -1)) - 1
    lengths = torch.ones_like(rest)
    for group in range(1, _MOST_GROUPS):
        lengths += rest >= 1 << _GROUP * group
    where = lengths.cumsum(0) - lengths
    out = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=numbers.device)
    while rest.numel():
        more = rest >> _GROUP
        going = more > 0
        out[where] = ((rest & 127) | (going.long() << _GROUP)).to(torch.uint8)
        rest, where = more[going], where[going] + 1
    return out


def decode_gaps(coded: Tensor) -> Tensor:
    """Return the numbers that `encode_gaps` coded: int64 `[n]`, strictly ascending.

    Args:
        coded: uint8 `[bytes]`.

    Raises:
        TalosValueError: the last gap is cut off, or a number needs more than 63 bits.

    Example:
        >>> decode_gaps(encode_gaps(torch.tensor([5, 300, 2**40]))).tolist()
        [5, 300, 1099511627776]
    """
    ends = (coded < 128).nonzero()[:, 0]
    starts = torch.cat([ends.new_zeros(min(1, len(ends))), ends[:-1] + 1])
    lengths = ends - starts + 1
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > _MOST_GROUPS or (int(ends[-1]) + 1 if len(ends) else 0) != len(coded):
        raise TalosValueError(
            f"coded must hold whole gaps of at most {_MOST_GROUPS} bytes, got {len(coded)} bytes "
            "that do not; send the buffer again"
        )
    gaps = torch.zeros_like(ends)
    for group in range(longest):
        there = (lengths > group).nonzero()[:, 0]
        part = coded[starts[there] + group].long() & 127
        gaps[there] += part << _GROUP * group
    numbers = (gaps + 1).cumsum(0) - 1
    # A sum beyond 63 bits wraps around, and the difference of two such sums does so again.
    if bool((numbers < 0).any() | (numbers[1:] <= numbers[:-1]).any()):
        raise TalosValueError("coded must hold numbers of at most 63 bits, got larger ones")
    return numbers


def encode_ranks(
    mask: Mask,
    shapes: Mapping[str, tuple[int, ...]],
    positions: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Code the parts of a patch; see `Patch.encode`."""
    strangers = [name for name, shape in shapes.items() if mask.shapes.get(name) != shape]
    if strangers:
        raise TalosValueError(
            "mask must have the patch's tensors in their shapes, lacks "
            f"{', '.join(strangers[:5])}; take the mask that was trained"
        )
    dtypes = torch.zeros(len(mask.names), dtype=torch.uint8, device="cpu")
    ranks = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    octets = [torch.zeros(0, dtype=torch.uint8, device="cpu")]
    for number, (name, part) in enumerate(_ranges(mask).items()):
        if name not in shapes:
            continue
        own, where = values[name].cpu().contiguous(), positions[name].cpu().long()
        if own.dtype not in _DTYPES:
            raise TalosTypeError(
                f"values of {name} must be float32, bfloat16, float16 or float64, got {own.dtype}; "
                "save the patch instead"
            )
        found = mask.indices[name].rank(where)
        if bool((found < 0).any()):
            raise TalosValueError(
                f"mask must select every entry of the patch, got {name} without "
                f"{int(where[found < 0][0])}; take the mask that was trained"
            )
        dtypes[number] = _DTYPES.index(own.dtype)
        ranks.append(found + part.start)
        octets.append(own.view(torch.uint8))
    buffers = (_fingerprint(mask), dtypes, encode_gaps(torch.cat(ranks)), torch.cat(octets))
    return dict(zip(_BUFFERS, buffers, strict=True))


def decode_ranks(
    mask: Mask, buffers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return positions and values by name; see `Patch.decode`."""
    found = [each for name in _BUFFERS if isinstance(each := buffers.get(name), Tensor)]
    if len(found) < len(_BUFFERS) or any(t.dtype != torch.uint8 or t.dim() != 1 for t in found):
        raise TalosValueError(f"buffers must hold {', '.join(_BUFFERS)}, each uint8 and flat")
    theirs, dtypes, gaps, octets = (each.cpu().contiguous() for each in found)
    if not torch.equal(theirs, _fingerprint(mask)):
        raise TalosValueError(
            "mask must be the one that the patch was encoded with, "
            f"{bytes(theirs.tolist()).hex()}, got {mask.fingerprint}; send the mask first"
        )
    if len(dtypes) != len(mask.names) or bool((dtypes >= len(_DTYPES)).any()):
        raise TalosValueError(f"dtypes must hold a code for each of {len(mask.names)} tensors")
    ranks, slices = decode_gaps(gaps), _ranges(mask)
    stops = [0, *(part.stop for part in slices.values())]
    ends = torch.tensor(stops, dtype=torch.int64, device="cpu")
    bounds = torch.searchsorted(ranks, ends).tolist()
    sizes = [
        (end - begin) * _DTYPES[code].itemsize
        for (begin, end), code in zip(pairwise(bounds), dtypes.tolist(), strict=True)
    ]
    if bounds[-1] < len(ranks) or sum(sizes) != len(octets):
        raise TalosValueError(
            f"buffers must hold ranks below {mask.nnz} and a value for each, got {len(ranks)} "
            f"ranks and {len(octets)} bytes of values; send them again"
        )
    positions, values = {}, {}
    parts = zip(slices.items(), pairwise(bounds), dtypes.tolist(), octets.split(sizes), strict=True)
    for (name, part), (begin, end), code, own in parts:
        if end > begin:
            positions[name] = mask.indices[name].select(ranks[begin:end] - part.start)
            values[name] = own.clone().view(_DTYPES[code])
    return positions, values


def _ranges(mask: Mask) -> dict[str, slice]:
    """Return each tensor's ranks, by sorted names: equal masks may list tensors in other orders."""
    ranges, end = {}, 0
    for name, index in sorted(mask.indices.items()):
        ranges[name] = slice(end, end + index.nnz)
        end += index.nnz
    return ranges


def _fingerprint(mask: Mask) -> Tensor:
    """Return the mask's fingerprint: uint8 `[8]`."""
    return torch.tensor(list(bytes.fromhex(mask.fingerprint)), dtype=torch.uint8, device="cpu")
