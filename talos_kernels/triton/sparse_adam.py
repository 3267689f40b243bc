"""One AdamW step on the selected entries of many tensors: see `talos_kernels.sparse_adam`.

Products and sums are not contracted (`enable_fp_fusion=False`), `fma` stands where torch's lerp has
one, and division and square root are rounded to nearest, as torch's are on the CPU.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    BLOCK,
    CHUNK,
    RANK,
    SEGMENT,
    U16,
    block_chunk,
    block_words,
    program_block,
    segment_chunk,
    segment_ranks,
    tensor_pointer,
)
from .launch import DTYPES, address_table, device_guard

__all__ = ["sparse_adam_", "sparse_adam_kernel"]

# Chosen from the compiled code, unmeasured: at sm_90 72 registers in fp32, 80 in bf16 with a
# master, no spills. 8 warps need 56 and 60, but twice the threads would compute a block's float64
# scalars.
NUM_WARPS = 4


@triton.jit
def mix_bits(x):
    """A bijection of uint32 that spreads every bit over all ("lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_moments(exp_avg_ptrs, exp_avg_sq_ptrs, exp_avg, exp_avg_sq, ranks, noise_key, selected):
    """Stores moments, in bf16 rounded up or down at random so that the mean is the value."""
    if exp_avg_ptrs.dtype.element_ty == tl.bfloat16:
        high = (ranks >> 32).to(tl.uint32)
        noise = mix_bits(mix_bits(noise_key + high) ^ ranks.to(tl.uint32))
        exp_avg = rounded_stochastically(exp_avg, noise)
        exp_avg_sq = rounded_stochastically(exp_avg_sq, noise >> 16)
    tl.store(exp_avg_ptrs, exp_avg, mask=selected)
    tl.store(exp_avg_sq_ptrs, exp_avg_sq, mask=selected)


@triton.jit
def rounded_stochastically(x, noise):
    """float32 to bf16: the bits and 16 bits of noise are added and cut off; infinities stay."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where((bits & 0x7FFFFF) != 0, 0x400000, 0).to(tl.uint32)
    bits = tl.where(finite, bits + (noise & 0xFFFF), bits | quiet)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def update(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    offs,
    selected,
    ranks,
    first,
    tensor_first,
    grad_scale,
    clip_factor,
    decay,
    step_size,
    root_correction,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    noise_key,
    COMPACT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """Steps the selected entries at `offs` of a tensor, whose state lies at `first + ranks`."""
    stored = tl.load(param_ptr + offs, mask=selected)
    grad_offs = (first - tensor_first) + ranks if COMPACT else offs
    grad = tl.load(grad_ptr + grad_offs, mask=selected, other=0.0).to(tl.float32)
    exp_avg_ptrs = exp_avg_ptr + first + ranks
    exp_avg_sq_ptrs = exp_avg_sq_ptr + first + ranks
    exp_avg = tl.load(exp_avg_ptrs, mask=selected, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptrs, mask=selected, other=0.0).to(tl.float32)
    weight = stored.to(tl.float32)
    if master_ptr is not None:
        # A stored weight that is not the rounding of its master was written by somebody else.
        master_ptrs = master_ptr + first + ranks
        master = tl.load(master_ptrs, mask=selected, other=0.0)
        weight = tl.where(master.to(stored.dtype).to(tl.float32) == weight, master, weight)
    if grad_scale is not None:
        grad = tl.div_rn(grad, tl.zeros_like(grad) + grad_scale)
    if clip_factor is not None:
        grad = grad * clip_factor
    if MAXIMIZE:
        grad = -grad

    weight = weight * decay
    # torch's lerp: it starts from whichever end is nearer.
    near = one_minus_beta1 < 0.5
    fraction = tl.where(near, one_minus_beta1, one_minus_beta1 - 1.0)
    difference = grad - exp_avg
    exp_avg = tl.fma(difference, tl.zeros_like(grad) + fraction, tl.where(near, exp_avg, grad))
    exp_avg_sq = exp_avg_sq * beta2 + (one_minus_beta2 * grad) * grad
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.zeros_like(grad) + root_correction) + eps
    weight = weight + tl.div_rn(step_size * exp_avg, denominator)

    store_moments(
        exp_avg_ptrs, exp_avg_sq_ptrs, exp_avg, exp_avg_sq, first + ranks, noise_key, selected
    )
    if master_ptr is not None:
        tl.store(master_ptrs, weight, mask=selected)
    tl.store(param_ptr + offs, weight.to(stored.dtype), mask=selected)


@triton.jit(do_not_specialize=["seed"])
def sparse_adam_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    addresses_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    steps_ptr,
    lr_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    clip_factor_ptr,
    seed,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
    weight_decay: tl.float64,
    one_minus_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    COMPACT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """One program steps one block; a tensor without a gradient keeps every bit.

    COMPACT: the gradients hold the selected entries only, in rank order.
    """
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    tensor, row_ptr, encoding, block = program_block(table_ptr, programs_ptr)
    param_ptr = tensor_pointer(addresses_ptr + tensor * 2, PARAM_DTYPE)
    grad_address_ptr = addresses_ptr + tensor * 2 + 1
    if tl.load(grad_address_ptr) == 0:
        return
    grad_ptr = tensor_pointer(grad_address_ptr, GRAD_DTYPE)
    tensor_first = tl.load(row_ptr + RANK)

    # In float64: beta2^step = .999 leaves float32 with 16 of its 24 bits of 1 - beta2^step.
    lr = tl.load(lr_ptr)
    step = tl.load(steps_ptr + tensor).to(tl.float64)
    correction1 = 1.0 - tl.exp2(step * log2_beta1)
    correction2 = 1.0 - tl.exp2(step * log2_beta2)
    decay = (1.0 - lr * weight_decay).to(tl.float32)
    step_size = (-lr / correction1).to(tl.float32)
    root_correction = tl.sqrt(correction2).to(tl.float32)
    noise_key = mix_bits(mix_bits(seed.to(tl.uint32)) + step.to(tl.uint32))
    grad_scale = tl.load(grad_scale_ptr) if grad_scale_ptr is not None else None
    clip_factor = tl.load(clip_factor_ptr) if clip_factor_ptr is not None else None

    if encoding == U16:
        param_ptr += block * SEGMENT
        if not COMPACT:
            grad_ptr += block * SEGMENT
        segment_ptr, first, count = segment_ranks(positions_ptr, starts_ptr, row_ptr, block)
        done = 0
        while done < count:
            offs, selected, ranks = segment_chunk(segment_ptr, done, count)
            update(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr,
                offs, selected, ranks, first, tensor_first, grad_scale, clip_factor, decay,
                step_size, root_correction, one_minus_beta1, beta2, one_minus_beta2, eps,
                noise_key, COMPACT, MAXIMIZE,
            )  # fmt: skip
            done += CHUNK
    else:
        param_ptr += block * BLOCK
        if not COMPACT:
            grad_ptr += block * BLOCK
        block_ptr, first, count = block_words(words_ptr, starts_ptr, row_ptr, encoding, block)
        done = 0
        while done < count:
            offs, selected, ranks, found = block_chunk(block_ptr, encoding, done, count)
            update(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr,
                offs, selected, ranks, first, tensor_first, grad_scale, clip_factor, decay,
                step_size, root_correction, one_minus_beta1, beta2, one_minus_beta2, eps,
                noise_key, COMPACT, MAXIMIZE,
            )  # fmt: skip
            first += found
            done += CHUNK


def sparse_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    index: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    steps: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_factor: Tensor | None,
    seed: int,
) -> None:
    """Launch one program a block of all tensors, a second time where some gradients are compact."""
    programs = index[4]
    if programs.numel() == 0:
        return
    # A gradient that is as long as its tensor is both: of a full mask the two are the same.
    compact = [g.numel() < p.numel() for p, g in zip(params, grads, strict=True)]
    given = [each for each, grad in zip(compact, grads, strict=True) if grad.numel()]
    for form in dict.fromkeys(given):
        own = [
            grad if each is form else grad[:0] for each, grad in zip(compact, grads, strict=True)
        ]
        with device_guard(programs.device):
            sparse_adam_kernel[(programs.numel(),)](
                *index, address_table(params, own), exp_avg, exp_avg_sq, master, steps, lr,
                grad_scale, found_inf, clip_factor, seed & 0xFFFFFFFF,
                *(math.log2(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)),
                weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
                PARAM_DTYPE=DTYPES[params[0].dtype], GRAD_DTYPE=DTYPES[grads[0].dtype],
                COMPACT=form, MAXIMIZE=maximize, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


torch.library.register_kernel("talos::sparse_adam_", "cuda", sparse_adam_)
