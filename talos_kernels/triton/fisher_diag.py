"""Squared per-sample weight gradients: see `talos_kernels.fisher_diag`.

A program keeps one tile of a score in registers over its samples. It accumulates a sample's
gradient over its tokens, squares it, adds it and starts again. Samples and tokens are one loop in
which no address depends on a product, so the next loads run during a multiplication, across samples
too. If a launch has too few tiles for the device, its samples are split into slabs, whose sums a
second kernel adds in a fixed order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import serve_cuda
from .launch import DTYPES, architecture, device_guard, integer_table, processors, tf32_allowed

__all__ = ["add_slabs_kernel", "fisher_diag_", "fisher_diag_kernel"]

# Columns of the table, one row a layer and a last one that holds only START.
START, SCORE, DY, X, ROWS, COLS, SAMPLES, TOKENS, SLABS, PARTIALS, ADD_START = (
    tl.constexpr(i) for i in range(11)
)
SCORE_STRIDE, DY_SAMPLE, DY_TOKEN, X_SAMPLE, X_TOKEN, COLUMNS = (
    tl.constexpr(i) for i in range(11, 17)
)

ADD_BLOCK = tl.constexpr(1024)  # entries of a program that adds slabs; unmeasured

# Where samples are split into slabs, at most this many programs a multiprocessor: each has one to
# itself, so two full waves; unmeasured.
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class Config:
    """Sizes of a tile and what a launch needs of them."""

    rows: int
    cols: int
    tokens: tuple[int, ...]
    num_warps: int
    num_stages: int


# Chosen from the code compiled for sm_90, unmeasured: the largest tiles whose two fp32 accumulators
# stay in registers inside the loop, and the fewest stages that load ahead. `tokens` are the depths
# to choose from.
CONFIGS = {
    "half": Config(128, 128, (64, 32, 16), 8, 3),
    "tf32": Config(128, 64, (32, 16), 8, 3),
    "ieee": Config(64, 64, (16,), 4, 3),
}
BLACKWELL = CONFIGS | {"half": Config(128, 64, (64, 32, 16), 8, 3)}  # sm_100 and later
# What a step costs beside its products, in tokens: of bf16 at sm_90 a loop has 284 instructions at
# 32 tokens and 312 at 64 (benches/results/compiled/triton.json), of which 128 square, once a
# sample. A scheduler issues them for two warps; 32 tokens take the matrix unit 256 cycles.
STEP_COST = 27


def token_block(tokens: int, depths: Sequence[int]) -> int:
    """Return the depth whose steps cost least for this many tokens a sample."""
    return min(depths, key=lambda depth: triton.cdiv(tokens, depth) * (depth + STEP_COST))


@triton.jit
def fisher_diag_kernel(
    table_ptr,
    partials_ptr,
    share,
    DTYPE: tl.constexpr,
    SQUARED: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program scores one tile of one layer over one slab of samples.

    SQUARED: there is one token a sample, and samples take the place of tokens: the product of the
    squared inputs is the sum of squares. ONE_STEP: no sample has more than BLOCK_T tokens.
    """
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr
    while program >= tl.load(row_ptr + COLUMNS + START):
        row_ptr += COLUMNS
    rows = tl.multiple_of(tl.load(row_ptr + ROWS), ALIGN)
    cols = tl.multiple_of(tl.load(row_ptr + COLS), ALIGN)
    dy_token = tl.multiple_of(tl.load(row_ptr + DY_TOKEN), ALIGN)
    x_token = tl.multiple_of(tl.load(row_ptr + X_TOKEN), ALIGN)
    dy_sample = tl.multiple_of(tl.load(row_ptr + DY_SAMPLE), ALIGN)
    x_sample = tl.multiple_of(tl.load(row_ptr + X_SAMPLE), ALIGN)
    tokens, samples = tl.load(row_ptr + TOKENS), tl.load(row_ptr + SAMPLES)
    slabs = tl.load(row_ptr + SLABS)

    tile = program - tl.load(row_ptr + START)
    slab, tile = tile % slabs, tile // slabs
    tiles = tl.cdiv(cols, BLOCK_I)
    offs_o = tile // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tile % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_t = tl.arange(0, BLOCK_T)
    in_rows, in_cols = (offs_o < rows)[None, :], (offs_i < cols)[None, :]
    share_of_slab = tl.cdiv(samples, slabs)
    first = slab * share_of_slab
    dy_ptr = tl.load(row_ptr + DY).to(tl.pointer_type(DTYPE))
    x_ptr = tl.load(row_ptr + X).to(tl.pointer_type(DTYPE))
    dy_ptr = tl.multiple_of(dy_ptr, ALIGN * ITEM_SIZE) + first * dy_sample
    x_ptr = tl.multiple_of(x_ptr, ALIGN * ITEM_SIZE) + first * x_sample
    dy_ptrs = dy_ptr + offs_t[:, None] * dy_token + offs_o[None, :]
    x_ptrs = x_ptr + offs_t[:, None] * x_token + offs_i[None, :]

    steps = 1 if ONE_STEP else tl.cdiv(tokens, BLOCK_T)
    back = (steps - 1) * BLOCK_T  # from a sample's last step to its first
    dy_next, x_next = dy_sample - back * dy_token, x_sample - back * x_token
    tokens = tokens.to(tl.int32)
    left = tokens
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for _ in tl.range(0, (tl.minimum(share_of_slab, samples - first) * steps).to(tl.int32)):
        in_sample = (offs_t < left)[:, None]
        dy = tl.load(dy_ptrs, mask=in_sample & in_rows, other=0.0)
        x = tl.load(x_ptrs, mask=in_sample & in_cols, other=0.0)
        if SQUARED:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
            dy, x = dy * dy, x * x
        if ONE_STEP:
            gradient = tl.dot(tl.trans(dy), x, input_precision=PRECISION)
            squares += gradient if SQUARED else gradient * gradient
            dy_ptrs += dy_sample
            x_ptrs += x_sample
        else:
            gradient = tl.dot(tl.trans(dy), x, gradient, input_precision=PRECISION)
            # Outside of the branch: addresses that waited for the squares would wait for the
            # product, and the next loads with them.
            last = left <= BLOCK_T
            dy_ptrs += tl.where(last, dy_next, BLOCK_T * dy_token)
            x_ptrs += tl.where(last, x_next, BLOCK_T * x_token)
            left = tl.where(last, tokens, left - BLOCK_T)
            if last:
                squares += gradient if SQUARED else gradient * gradient
                gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)

    mask = (offs_o < rows)[:, None] & (offs_i < cols)[None, :]
    if slabs == 1:
        score_ptr = tl.load(row_ptr + SCORE).to(tl.pointer_type(tl.float32))
        offs = offs_o[:, None] * tl.load(row_ptr + SCORE_STRIDE) + offs_i[None, :]
        old = tl.load(score_ptr + offs, mask=mask)
        tl.store(score_ptr + offs, old + share * squares, mask=mask)
    else:
        offs = (slab * rows + offs_o[:, None]) * cols + offs_i[None, :]
        tl.store(partials_ptr + tl.load(row_ptr + PARTIALS) + offs, squares, mask=mask)


@triton.jit
def add_slabs_kernel(table_ptr, partials_ptr, share):
    """One program adds the slabs of ADD_BLOCK entries of one layer, in order, to its score."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr
    while program >= tl.load(row_ptr + COLUMNS + ADD_START):
        row_ptr += COLUMNS
    rows, cols = tl.load(row_ptr + ROWS), tl.load(row_ptr + COLS)
    offs = (program - tl.load(row_ptr + ADD_START)) * ADD_BLOCK + tl.arange(0, ADD_BLOCK)
    mask = offs < rows * cols
    partials_ptr += tl.load(row_ptr + PARTIALS) + offs
    total = tl.zeros((ADD_BLOCK,), tl.float32)
    for _ in range(tl.load(row_ptr + SLABS)):
        total += tl.load(partials_ptr, mask=mask, other=0.0)
        partials_ptr += rows * cols
    score_ptr = tl.load(row_ptr + SCORE).to(tl.pointer_type(tl.float32))
    score_ptr += offs // cols * tl.load(row_ptr + SCORE_STRIDE) + offs % cols
    tl.store(score_ptr, tl.load(score_ptr, mask=mask) + share * total, mask=mask)


def fisher_diag_(
    scores: Sequence[Tensor], dys: Sequence[Tensor], xs: Sequence[Tensor], share: float
) -> None:
    """Launch the layers with many tokens a sample together, and those with one together."""
    layers: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {False: [], True: []}
    for score, dy, x in zip(scores, dys, xs, strict=True):
        if score.numel() and dy.numel():
            rows, inputs = by_sample(dy), by_sample(x)
            squared = rows.shape[1] == 1
            if squared:  # samples take the place of tokens
                rows, inputs = rows.transpose(0, 1), inputs.transpose(0, 1)
            layers[squared].append((score, rows, inputs))
    for squared, alike in layers.items():
        if alike:
            with device_guard(alike[0][0].device):
                launch(alike, share, squared)


def by_sample(rows: Tensor) -> Tensor:
    """Reshape [outer, samples, inner, F] to [samples, tokens, F]: a view unless both are long."""
    if rows.shape[0] == 1:
        return rows[0]
    if rows.shape[2] == 1:
        return rows[:, :, 0].transpose(0, 1)
    return rows.transpose(0, 1).flatten(1, 2)


def slab_count(samples: int, wanted: int) -> int:
    """Return at most `wanted` slabs of equally many samples, the last perhaps fewer, none empty."""
    share = triton.cdiv(samples, max(wanted, 1))
    return triton.cdiv(samples, share)


def launch(layers: Sequence[tuple[Tensor, Tensor, Tensor]], share: float, squared: bool) -> None:
    """One launch for all layers, and one that adds slabs where there are any."""
    _, dy, _ = layers[0]
    exact = dy.dtype == torch.float32 and not tf32_allowed()
    wide = dy.dtype == torch.float32 or squared
    backend, arch = architecture()
    configs = BLACKWELL if backend == "cuda" and int(arch) >= 100 else CONFIGS
    config = configs["ieee" if exact else "tf32" if wide else "half"]
    precision = "ieee" if exact else "tf32"
    if squared and dy.dtype != torch.float32:
        # Squares of 16-bit numbers have more bits than TF32, whose units cut the rest off: it goes
        # into products of its own. For sm_100 Triton 3.6 takes TF32 where it is told "ieee".
        precision = "tf32x3" if backend == "cuda" else "ieee"
    tiles = [
        triton.cdiv(score.shape[0], config.rows) * triton.cdiv(score.shape[1], config.cols)
        for score, _, _ in layers
    ]
    wanted = PROGRAMS_PER_PROCESSOR * processors(dy.device) // sum(tiles)
    table: list[int] = []
    start = partials = add_start = 0
    align = 16 // dy.element_size()
    for (score, dy, x), count in zip(layers, tiles, strict=True):
        samples, tokens = dy.shape[:2]
        slabs = slab_count(samples, wanted)
        table += [start, score.data_ptr(), dy.data_ptr(), x.data_ptr(), *score.shape]
        table += [samples, tokens, slabs, partials, add_start, score.stride(0)]
        table += [*dy.stride()[:2], *x.stride()[:2]]
        start += count * slabs
        if slabs > 1:
            partials += slabs * score.numel()
            add_start += triton.cdiv(score.numel(), ADD_BLOCK.value)
        aligned = all(
            tensor.data_ptr() % 16 == 0
            and all(size % align == 0 for size in (*tensor.stride()[:2], tensor.shape[2]))
            for tensor in (dy, x)
        )
        align = align if aligned else 1
    table += [start, *[0] * (ADD_START.value - 1), add_start]
    table += [0] * (COLUMNS.value - ADD_START.value - 1)
    on_device = integer_table(tuple(table), dy.device)
    sums = torch.empty(partials, dtype=torch.float32, device=dy.device)
    longest = max(dy.shape[1] for _, dy, _ in layers)
    depth = token_block(longest, config.tokens)
    fisher_diag_kernel[(start,)](
        on_device, sums, share,
        DTYPE=DTYPES[layers[0][1].dtype], SQUARED=squared, PRECISION=precision,
        ONE_STEP=longest <= depth, ITEM_SIZE=layers[0][1].element_size(), ALIGN=align,
        BLOCK_O=config.rows, BLOCK_I=config.cols, BLOCK_T=depth,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if add_start:
        add_slabs_kernel[(add_start,)](on_device, sums, share, num_warps=4)


serve_cuda("fisher_diag_", "triton", fisher_diag_)
