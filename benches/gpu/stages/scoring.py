"""Scoring: its kernel, the threshold, single ops on compressed entries, batches, a calibration.

Each form is checked as its bench checks it. Single kernels are timed by graph replay, which is the
device's time alone; what selects by a mask waits for the host and is timed eager, and so is a swap,
as a user waits for it.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

import talos
from benches import (
    bench_add_delta,
    bench_fisher_diag,
    bench_gather_grad,
    bench_sddmm,
    bench_select_threshold,
    bench_swap,
    measure,
    scoring,
)
from benches.gpu import keys
from benches.gpu.context import Context, stage_main
from benches.gpu.sizes import Iteration
from benches.shapes import SHAPES, ModelShape
from benches.table import OURS
from benches.work import Work
from talos.calibration.fisher import CalibrationProgress
from talos_kernels.select_threshold import DIGITS, GPU_DIGITS

SCORE_TENSORS = 16
"""That the scores of the threshold lie in, as those of a model do."""
CHECKED_SAMPLES = 4
"""Of a scored batch, held to single backwards in float64."""
FEW_BATCHES = 5
DENSITY = 0.1
ENDING_SECONDS = 12.0
"""What comes after the last batch of a calibration: threshold, masks to the CPU, compressed."""
SLOW_SECONDS = 0.5
"""What takes longer is timed once."""


def run(context: Context) -> None:
    sizes = context.sizes
    kernels(context, [OURS])
    thresholds(context, [OURS])
    context.run(keys.HISTOGRAM, lambda: histogram(context))
    for iteration in sizes.iterations:
        context.run(keys.batch(iteration.model, keys.PLAIN), lambda i=iteration: plain(context, i))
        context.run(
            keys.batch(iteration.model, keys.SCORED), lambda i=iteration: scored(context, i)
        )
    tower.cache_clear()
    single_ops(context)
    kernels(context, [name for name in bench_fisher_diag.OPS if name != OURS])
    context.run(keys.CALIBRATION, lambda: calibration(context))
    tower.cache_clear()
    thresholds(context, [name for name in bench_select_threshold.FORMS if name != OURS][::-1])


def timed(context: Context, work: Work, how: str, matrix: str | None = None) -> dict[str, object]:
    """Checks and times a form; `matrix` is the roofline of its operations."""
    work.check()
    (first,) = measure.seconds(work.step, 1)
    rounds = context.sizes.rounds
    if first > SLOW_SECONDS:
        times = [first]
    elif how == keys.REPLAYED:
        times = context.device.time_replayed(work.step, rounds)
    else:
        times = context.device.time_eager(work.step, rounds)
    seconds, spread = measure.median_and_spread(times)
    found: dict[str, object] = {"how": how, "seconds": seconds, "spread": spread}
    if work.bytes_moved is not None:
        rate = work.bytes_moved / seconds
        found |= {"bytes_moved": work.bytes_moved, "bytes_per_second": rate}
        found["share"] = context.share("copy", rate)
    if work.flops is not None and matrix is not None:
        rate = work.flops / seconds
        found |= {"flops": work.flops, "flops_per_second": rate}
        found["matrix_share"] = context.share(matrix, rate)
    return found


def form_of(name: str) -> str:
    """A bench's form as keys name it: ours by its kernel."""
    return keys.TRITON if name == OURS else name


def kernels(context: Context, names: list[str]) -> None:
    """The scoring kernel by tokens, in bf16; the longest in fp32 too."""
    size, device = context.sizes.scoring, context.device
    linear, bf16 = (size.rows, size.columns), torch.bfloat16
    wanted = [("fisher_diag_", tokens, bf16, "bf16") for tokens in size.tokens]
    wanted.append(("fisher_diag_, fp32", size.tokens[0], torch.float32, "fp32"))
    for op, tokens, dtype, matrix in wanted:
        for name in names:
            make = partial(
                bench_fisher_diag.make, name, linear, size.samples, tokens, dtype, device.torch
            )
            context.run(
                keys.kernel(op, tokens, form_of(name)),
                lambda m=make, r=matrix: timed(context, m(), keys.REPLAYED, r),
            )


def scores_of(context: Context, count: int) -> list[Tensor]:
    """Squares of normal numbers, in some tensors."""
    device = context.device.torch
    generator = torch.Generator(device).manual_seed(0)
    flat = torch.randn(count, generator=generator, device=device).square_()
    return list(flat.chunk(SCORE_TENSORS))


def thresholds(context: Context, names: list[str]) -> None:
    for name in names:
        context.run(
            keys.THRESHOLD if name == OURS else f"{keys.THRESHOLD}, {name}",
            lambda n=name: timed(
                context,
                bench_select_threshold.make(scores_of(context, context.sizes.threshold), n),
                keys.EAGER,
            ),
        )


def histogram(context: Context) -> dict[str, object]:
    """The first pass of a threshold: counts of the highest digit."""
    scores = scores_of(context, context.sizes.histogram)
    digits = GPU_DIGITS if context.device.kind == "cuda" else DIGITS[torch.float32]
    prefix = torch.zeros((), dtype=torch.int64, device=context.device.torch)
    shift = sum(digits) - digits[0]

    def step() -> tuple[Tensor, Tensor]:
        return torch.ops.talos.score_histogram(scores, prefix, shift, digits[0], False)

    def check() -> None:
        counts, refused = step()
        keys_of_scores = (score.view(torch.int32) >> shift for score in scores)
        wanted = sum(each.bincount(minlength=1 << digits[0]) for each in keys_of_scores)
        assert torch.equal(counts, wanted)
        assert not refused.any()

    return timed(context, Work(step, check, bytes_moved=4 * context.sizes.histogram), keys.REPLAYED)


def single_ops(context: Context) -> None:
    """On the first shape's vector, and on one layer's product of the last's."""
    first, last, device = context.sizes.shapes[0], context.sizes.shapes[-1], context.device.torch
    for module, op in (
        (bench_swap, "swap"),
        (bench_add_delta, "add_delta_"),
        (bench_gather_grad, "gather_grad_"),
    ):
        for name in module.FORMS:
            ways = (keys.EAGER, keys.REPLAYED) if name == OURS else (keys.EAGER,)
            for how in ways:
                key = keys.kernel(op, first.name, form_of(name))
                context.run(
                    key if how == keys.EAGER else f"{key}, {how}",
                    lambda m=module, n=name, h=how: timed(context, m.make(first, n, device), h),
                )
    layer = replace(last, name=f"{last.name} layer", tensors=last.touched[:1])
    for shape in (layer, first):
        for name in bench_sddmm.FORMS:
            context.run(
                keys.kernel("sddmm_", shape.name, form_of(name)),
                lambda s=shape, n=name: sampled_product(context, s, n),
            )


def sampled_product(context: Context, shape: ModelShape, name: str) -> dict[str, object]:
    device = context.device.torch
    samples = bench_sddmm.BATCH_SIZE[device.type]
    work = bench_sddmm.make(shape, name, samples, device)
    found = timed(context, work, keys.REPLAYED, "bf16" if device.type == "cuda" else "fp32")
    return found | {"samples": samples, "tokens": shape.tokens}


@lru_cache(maxsize=1)
def tower(
    model: str, layers: int | None, batch: int, device: torch.device
) -> tuple[scoring.Scored, scoring.Batch]:
    layers = layers or SHAPES[model].layers
    model, samples = scoring.build(model, layers, batch, device)
    model.autocast = device.type == "cuda"
    return model, samples


def of_batch(
    context: Context, iteration: Iteration, peak: int, times: list[float]
) -> dict[str, object]:
    seconds, spread = measure.median_and_spread(times)
    samples = iteration.batch
    found = {"samples": samples, "seconds": seconds, "spread": spread, "peak_bytes": peak}
    return found | {"samples_per_second": samples / seconds}


def plain(context: Context, iteration: Iteration) -> dict[str, object]:
    """Forward and backward of a batch, the gradients that training would have."""
    model, batch = tower(iteration.model, iteration.layers, iteration.batch, context.device.torch)

    def step() -> None:
        scoring.plain(model, batch)

    step()
    peak = context.device.peak_bytes(step)
    return of_batch(context, iteration, peak, measure.seconds(step, FEW_BATCHES))


def scored(context: Context, iteration: Iteration) -> dict[str, object]:
    """One further batch of a call of `talos.fisher_diag`, checked on some samples in fp32."""
    model, batch = tower(iteration.model, iteration.layers, iteration.batch, context.device.torch)
    few = {name: each[:CHECKED_SAMPLES] for name, each in batch.items()}
    autocast, model.autocast = model.autocast, False
    try:
        wanted = scoring.exact(model, few)
        error = scoring.relative_error(scoring.ours(model, few), wanted)
    finally:
        model.autocast = autocast
    assert error <= bench_fisher_diag.TOLERANCE, f"scores are off by {error:.2g} of their norm"
    del wanted
    peak = context.device.peak_bytes(lambda: scoring.ours(model, batch))
    times = scoring.further_batches(model, batch, FEW_BATCHES)
    return of_batch(context, iteration, peak, times) | {"error": error}


class OutOfTime(Exception):
    """Ends a calibration that does not fit."""


def calibration(context: Context) -> dict[str, object]:
    """A whole calibration, all batches the same one; what does not fit in time is extrapolated."""
    size = context.sizes.calibration
    model, batch = tower(size.model, size.layers, size.batch, context.device.torch)
    batches = math.ceil(size.samples / size.batch)
    ends: list[float] = []

    def note(progress: CalibrationProgress) -> None:
        ends.append(measure.clock())
        if context.left() < ENDING_SECONDS and len(ends) < size.rounds * batches:
            raise OutOfTime

    start = measure.clock()
    mask = None
    try:
        mask = talos.calibrate(
            model,
            [batch] * batches,
            DENSITY,
            size.rounds,
            logits_fn=scoring.class_logits,
            on_progress=note,
        )
        seconds = measure.clock() - start
    except OutOfTime:
        further = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        seconds = ends[0] - start + further * (size.rounds * batches - 1)
    found = {"model": size.model, "samples": batches * size.batch, "rounds": size.rounds}
    found |= {"seconds": seconds, "extrapolated": mask is None, "batches_run": len(ends)}
    if mask is not None:
        wanted = mask.nnz / DENSITY
        total = sum(param.numel() for param in model.scored().values())
        assert abs(wanted - total) <= 1 / DENSITY, f"{mask.nnz} of {total} entries are selected"
    return found


if __name__ == "__main__":
    stage_main(run)
