"""Pack, unpack and count the bits of a selection, in little-endian order."""

import torch
from torch import Tensor

__all__ = ["pack_bits", "popcount", "unpack_bits"]

# Multiplying eight bytes of 0 or 1 by this puts byte i at bit 56 + i; no two products meet.
GATHER_BYTES = 0x0102040810204080


def pack_bits(dense: Tensor, multiple: int) -> Tensor:
    """Pack bools into 32-bit words.

    Args:
        dense: bool `[n]`.
        multiple: entries are padded with False to a multiple of this (itself a multiple of 32).

    Returns:
        int32 `[ceil(n / multiple) * multiple / 32]`; bit j of word w is entry 32 w + j.
    """
    padding = -dense.numel() % multiple
    padded = torch.nn.functional.pad(dense, (0, padding)) if padding else dense.contiguous()
    octets = padded.view(torch.uint8).view(torch.int64)
    return (((octets * GATHER_BYTES) >> 56) & 0xFF).to(torch.uint8).view(torch.int32)


def unpack_bits(words: Tensor) -> Tensor:
    """Unpack int32 `[w]` words into bool `[32 w]`."""
    bit = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.contiguous().view(torch.uint8)
    return ((octets[:, None] >> bit) & 1).view(torch.bool).reshape(-1)


def popcount(words: Tensor) -> Tensor:
    """Bits set in each 32-bit word: int32, the shape of `words` (int32)."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return (octets * 0x01010101) >> 24
