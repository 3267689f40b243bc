"""The one table of cases and the one table of tolerances.

Sizes straddle the block of the bitmap encoding and the segment of the 16-bit one; densities lie on
both sides of the change between them (1/16) and at both ends. A case is a list of tensors, because
every op takes a list. Tolerances are by dtype, never by test.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK_SIZE = 2048  # dense entries a block of the bitmap encoding
SEGMENT_SIZE = 65536  # dense entries a segment of the 16-bit encoding

SIZES = (0, 1, 97, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, SEGMENT_SIZE + 1, 384 * 384)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_ENTRY = -1.0  # stands in a table of densities for "exactly one entry"
DENSITIES = (0.0, ONE_ENTRY, 0.01, 0.1, 0.6, 1.0)


@dataclass(frozen=True)
class Tolerance:
    """Bounds of `torch.testing.assert_close`: |actual - expected| <= atol + rtol * |expected|."""

    rtol: float
    atol: float


# fp32: 2 ulp, or 1e-9 beside a sum that cancels; 16 bit: the one rounding of the result.
TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-14),
    torch.float32: Tolerance(rtol=2 * 2.0**-23, atol=1e-9),
    torch.bfloat16: Tolerance(rtol=2.0**-8, atol=1e-9),
    torch.float16: Tolerance(rtol=2.0**-11, atol=2.0**-24),
}

# Sums of many terms (norms, Fisher scores): the error grows with the root of the number of terms.
REDUCTION_TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-12),
    torch.float32: Tolerance(rtol=2e-5, atol=1e-7),
    torch.bfloat16: Tolerance(rtol=2e-2, atol=1e-5),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-5),
}


@dataclass(frozen=True)
class Case:
    """A list of tensors with one mask each: `densities[i]` of the `sizes[i]` entries selected."""

    name: str
    sizes: tuple[int, ...]
    densities: tuple[float, ...]

    def __str__(self) -> str:
        return self.name

    def masks(self) -> list[torch.Tensor]:
        """The masks, bool [size] each; the same ones at every call."""
        generator = torch.Generator().manual_seed(len(self.sizes) + sum(self.sizes))
        return [
            dense_mask(size, density, generator)
            for size, density in zip(self.sizes, self.densities, strict=True)
        ]

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[torch.Tensor]:
        """Normal random tensors of the case's sizes, `dtype` [size]; the same ones for a seed."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, generator=generator).to(dtype) for size in self.sizes]


def dense_mask(numel: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """A random bool [numel] with exactly round(density * numel) entries, or one for ONE_ENTRY."""
    nnz = min(1, numel) if density == ONE_ENTRY else round(density * numel)
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[:nnz]] = True
    return mask


def _single_tensor_cases() -> Iterator[Case]:
    for size in SIZES:
        for density in DENSITIES:
            name = "one" if density == ONE_ENTRY else f"{density:g}"
            yield Case(f"n{size}-d{name}", (size,), (density,))


SINGLE = tuple(_single_tensor_cases())
MANY = (
    Case("every-encoding", (BLOCK_SIZE + 1, 97, SEGMENT_SIZE + 1), (1.0, 0.6, 0.01)),
    Case("empty-between", (97, 0, BLOCK_SIZE, 1, BLOCK_SIZE - 1), (0.6, 0.0, 0.0, 1.0, ONE_ENTRY)),
    Case("all-empty", (0, 97, BLOCK_SIZE), (0.0, 0.0, 0.0)),
    Case("two-layers", (384 * 384, 384, 384 * 384, 384), (0.6, 0.1, 0.01, 1.0)),
)
CASES = SINGLE + MANY


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    reduction: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Compares by the table's row for `dtype` (default: `actual`'s); NaN equals NaN."""
    row = (REDUCTION_TOLERANCES if reduction else TOLERANCES)[dtype or actual.dtype]
    torch.testing.assert_close(
        actual, expected, rtol=row.rtol, atol=row.atol, equal_nan=True, check_dtype=False
    )


def assert_bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares the bits, so that -0.0 differs from 0.0 and one NaN from another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    left = actual.detach().contiguous().view(-1).view(torch.uint8)
    right = expected.detach().contiguous().view(-1).view(torch.uint8)
    changed = int((left != right).sum())
    assert changed == 0, f"{changed} bytes of {left.numel()} differ"
