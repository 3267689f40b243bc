"""One AdamW step on the selected entries of many tensors: see `talos_kernels.sparse_adam`.

To round as torch does on the CPU, products and sums are not fused (`enable_fp_fusion=False`) except
in lerp's `fma`, and division and square root are rounded to nearest.
"""

import math
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import serve_cuda
from .blocks import CHUNK, find_block, load_chunk, next_chunk, tensor_pointer
from .launch import DTYPES, device_guard, integer_table, shared_dtype

__all__ = ["adam_scalars_kernel", "sparse_adam_", "sparse_adam_kernel"]

# Chosen from the compiled code, unmeasured.
NUM_WARPS = 4

# Columns of the table of addresses: parameter, gradient, whether the gradient is compact.
COLUMNS, GRAD, COMPACT = tl.constexpr(3), tl.constexpr(1), tl.constexpr(2)
SCALARS = tl.constexpr(4)  # of a tensor: decay, step size, root of a correction, noise key
TENSORS = 128  # of a program that derives scalars


@triton.jit
def mix_bits(x):
    """Mix uint32 by a bijection ("lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_bits(noise_key, ranks):
    """Return 32 bits of noise for each rank (int64)."""
    high = (ranks >> 32).to(tl.uint32)
    return mix_bits(mix_bits(noise_key + high) ^ ranks.to(tl.uint32))


@triton.jit
def rounded_stochastically(x, noise):
    """Round float32 to bf16: add 16 bits of noise to the bits and cut them off."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where((bits & 0x7FFFFF) != 0, 0x400000, 0).to(tl.uint32)
    bits = tl.where(finite, bits + (noise & 0xFFFF), bits | quiet)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def adam_scalars_kernel(
    addresses_ptr,
    n_tensors,
    steps_ptr,
    lr_ptr,
    found_inf_ptr,
    scalars_ptr,
    seed,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
    weight_decay: tl.float64,
    BLOCK_SIZE: tl.constexpr,
):
    """Count the step of each tensor with a gradient, and compute its entries' shared numbers."""
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    tensor = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = tensor < n_tensors
    grad_address = tl.load(addresses_ptr + tensor * COLUMNS + GRAD, mask=exists, other=0)
    given = grad_address != 0
    count = tl.load(steps_ptr + tensor, mask=given, other=0.0) + 1
    tl.store(steps_ptr + tensor, count, mask=given)

    # In float64: for beta2^step = .999 float32 would keep 16 of the 24 bits of 1 - beta2^step.
    lr = tl.load(lr_ptr)
    step = count.to(tl.float64)
    correction1 = 1.0 - tl.exp2(step * log2_beta1)
    correction2 = 1.0 - tl.exp2(step * log2_beta2)
    noise_key = mix_bits(mix_bits(seed.to(tl.uint32)) + step.to(tl.uint32))
    row_ptr = scalars_ptr + tensor * SCALARS
    decay = tl.zeros_like(step) + (1.0 - lr * weight_decay)
    tl.store(row_ptr, decay.to(tl.float32), mask=given)
    tl.store(row_ptr + 1, (-lr / correction1).to(tl.float32), mask=given)
    tl.store(row_ptr + 2, tl.sqrt(correction2).to(tl.float32), mask=given)
    tl.store(row_ptr + 3, noise_key.to(tl.float32, bitcast=True), mask=given)


@triton.jit
def adam_entries(weight, grad, exp_avg, exp_avg_sq, numbers):
    """Return weights and moments after the step; all float32 [CHUNK]."""
    decay, step_size, root_correction, one_minus_beta1, beta2, one_minus_beta2, eps = numbers
    # torch's lerp: it starts from whichever end is nearer.
    near = one_minus_beta1 < 0.5
    fraction = tl.where(near, one_minus_beta1, one_minus_beta1 - 1.0)
    weight = weight * decay
    difference = grad - exp_avg
    exp_avg = tl.fma(difference, tl.zeros_like(grad) + fraction, tl.where(near, exp_avg, grad))
    exp_avg_sq = exp_avg_sq * beta2 + (one_minus_beta2 * grad) * grad
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.zeros_like(grad) + root_correction) + eps
    weight = weight + tl.div_rn(step_size * exp_avg, denominator)
    return weight, exp_avg, exp_avg_sq


@triton.jit
def sparse_adam_kernel(
    words_ptr,
    positions_ptr,
    starts_ptr,
    table_ptr,
    programs_ptr,
    addresses_ptr,
    scalars_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    clip_factor_ptr,
    one_minus_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """One program steps one block; a tensor without a gradient keeps every bit."""
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    tensor, begin, first, tensor_first, source, counts = find_block(
        words_ptr, positions_ptr, starts_ptr, table_ptr, programs_ptr
    )
    addresses_ptr += tensor * COLUMNS
    if tl.load(addresses_ptr + GRAD) == 0:
        return
    param_ptr = tensor_pointer(addresses_ptr, PARAM_DTYPE) + begin
    # A compact gradient holds the selected entries of its tensor, in rank order.
    compact = tl.load(addresses_ptr + COMPACT) != 0
    grad_ptr = tensor_pointer(addresses_ptr + GRAD, GRAD_DTYPE)
    grad_ptr += tl.where(compact, first - tensor_first, begin)
    row_ptr = scalars_ptr + tensor * SCALARS
    decay, step_size, root = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    noise_key = tl.load(row_ptr + 3).to(tl.uint32, bitcast=True)
    numbers = decay, step_size, root, one_minus_beta1, beta2, one_minus_beta2, eps
    grad_scale = tl.load(grad_scale_ptr) if grad_scale_ptr is not None else None
    clip_factor = tl.load(clip_factor_ptr) if clip_factor_ptr is not None else None
    for LISTED in tl.static_range(2):
        done, before, count = 0, 0, counts[LISTED]
        chunk = load_chunk(source, done, count, LISTED)
        while done < count:
            offs, selected, ranks, found = next_chunk(chunk, done, count, LISTED)
            done += CHUNK
            # The next chunk's words are under way while this one's entries are.
            chunk = load_chunk(source, done, count, LISTED)
            stored = tl.load(param_ptr + offs, mask=selected)
            # An unselected entry is 1: with 0 the divisions and the root take slow paths.
            grad_offs = tl.where(compact, before + ranks, offs)
            grad = tl.load(grad_ptr + grad_offs, mask=selected, other=1.0).to(tl.float32)
            exp_avg_ptrs = exp_avg_ptr + first + ranks
            exp_avg_sq_ptrs = exp_avg_sq_ptr + first + ranks
            exp_avg = tl.load(exp_avg_ptrs, mask=selected, other=1.0).to(tl.float32)
            exp_avg_sq = tl.load(exp_avg_sq_ptrs, mask=selected, other=1.0).to(tl.float32)
            weight = stored.to(tl.float32)
            if master_ptr is not None:
                # A stored weight that is not the rounding of its master was written by others.
                master_ptrs = master_ptr + first + ranks
                master = tl.load(master_ptrs, mask=selected, other=1.0)
                weight = tl.where(master.to(stored.dtype).to(tl.float32) == weight, master, weight)
            if grad_scale is not None:
                grad = tl.div_rn(grad, tl.zeros_like(grad) + grad_scale)
            if clip_factor is not None:
                grad = grad * clip_factor
            if MAXIMIZE:
                grad = -grad
            weight, exp_avg, exp_avg_sq = adam_entries(weight, grad, exp_avg, exp_avg_sq, numbers)
            if exp_avg_ptr.dtype.element_ty == tl.bfloat16:
                noise = noise_bits(noise_key, first + ranks)
                exp_avg = rounded_stochastically(exp_avg, noise)
                exp_avg_sq = rounded_stochastically(exp_avg_sq, noise >> 16)
            tl.store(exp_avg_ptrs, exp_avg, mask=selected)
            tl.store(exp_avg_sq_ptrs, exp_avg_sq, mask=selected)
            if master_ptr is not None:
                tl.store(master_ptrs, weight, mask=selected)
            tl.store(param_ptr + offs, weight.to(stored.dtype), mask=selected)
            first += found
            before += found


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
    """Launch the scalars of all tensors, then one program for each block."""
    programs = index[4]
    n_tensors, n_programs = len(params), programs.shape[0]
    if n_tensors == 0:
        return
    addresses = [0] * (n_tensors * COLUMNS.value)
    addresses[::3] = map(Tensor.data_ptr, params)
    addresses[1::3] = map(Tensor.data_ptr, grads)  # 0 of an empty one
    addresses[2::3] = map(operator.lt, map(Tensor.numel, grads), map(Tensor.numel, params))
    table = integer_table(tuple(addresses), programs.device)
    scalars = torch.empty(n_tensors * SCALARS.value, device=programs.device, dtype=torch.float32)
    logs = (math.log2(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    with device_guard(programs.device):
        adam_scalars_kernel[(-(-n_tensors // TENSORS),)](
            table, n_tensors, steps, lr, found_inf, scalars, seed & 0xFFFFFFFF, *logs,
            weight_decay, BLOCK_SIZE=TENSORS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if n_programs > 0:
            sparse_adam_kernel[(n_programs,)](
                *index, table, scalars, exp_avg, exp_avg_sq, master, grad_scale, found_inf,
                clip_factor, 1 - beta1, beta2, 1 - beta2, eps,
                PARAM_DTYPE=DTYPES[params[0].dtype], GRAD_DTYPE=shared_dtype(grads),
                MAXIMIZE=maximize, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


serve_cuda("sparse_adam_", "triton", sparse_adam_)
