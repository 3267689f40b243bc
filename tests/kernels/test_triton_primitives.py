"""What the kernels take from Triton's language, alone: in its interpreter, and as a device has it.

Both must be torch's values: an interpreter that is kinder than the compiler would hide mistakes.
"""

import pytest
import torch
import triton
import triton.language as tl

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 1024


@triton.jit
def histogram_kernel(x_ptr, out_ptr, limit, N: tl.constexpr, BINS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    counts = tl.histogram(x, BINS, mask=x < limit)
    tl.store(out_ptr + tl.arange(0, BINS), counts)


@triton.jit
def cumsum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.cumsum(tl.load(x_ptr + offs), 0))


@triton.jit
def or_kernel(x_ptr, words_ptr, limit, N: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))
    tl.atomic_or(words_ptr + x // 32, 1 << (x % 32), mask=x < limit, sem="relaxed")


@triton.jit
def add_kernel(x_ptr, counts_ptr, limit, N: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))
    one = tl.full((N,), 1, tl.int64)
    tl.atomic_add(counts_ptr + x, one, mask=x < limit, sem="relaxed")


@pytest.mark.parametrize("bins", [128, 256, 2048])
@pytest.mark.parametrize("kinds", [1, 100, 2048], ids=lambda kinds: f"{kinds}-values")
def test_histogram_counts_what_the_mask_lets_through(bins: int, kinds: int) -> None:
    x = torch.randint(min(kinds, bins), (N,), dtype=torch.int32, device=DEVICE)
    out = torch.empty(bins, dtype=torch.int32, device=DEVICE)
    limit = bins // 2
    histogram_kernel[(1,)](x, out, limit, N=N, BINS=bins)
    assert torch.equal(out.cpu(), torch.bincount(x[x < limit].cpu(), minlength=bins).int())


@pytest.mark.parametrize("n", [16, 64, N])
def test_cumsum_is_inclusive_and_exact(n: int) -> None:
    x = torch.randint(-5, 33, (n,), dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(x)
    cumsum_kernel[(1,)](x, out, N=n)
    assert torch.equal(out, x.cumsum(0).int())


def test_atomics_see_every_lane_that_shares_an_address() -> None:
    programs, limit = 4, 300
    x = torch.randint(400, (programs * N,), dtype=torch.int32, device=DEVICE)
    kept = x[x < limit].cpu()
    words = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    or_kernel[(programs,)](x, words, limit, N=N)
    bits = torch.zeros(512, dtype=torch.int64)
    bits[kept] = 1
    wanted = (bits.view(16, 32) << torch.arange(32)).sum(1).to(torch.int32)
    assert torch.equal(words.cpu(), wanted)
    counts = torch.zeros(400, dtype=torch.int64, device=DEVICE)
    add_kernel[(programs,)](x, counts, limit, N=N)
    assert torch.equal(counts.cpu(), torch.bincount(kept, minlength=400))
