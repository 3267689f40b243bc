"""Scoring: its kernel, the threshold, single ops on compressed entries, batches, a calibration.

Each form is checked as its bench checks it. Single kernels are timed by graph replay. What selects
by a mask waits for the host and is timed eager, and so is a swap, as a user waits for it.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

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
from benches.gpu.context import EAGER, REPLAYED, Context, stage_main
from benches.gpu.sizes import Iteration
from benches.results import OURS
from benches.shapes import ModelShape
from benches.work import Work
from benches.workload import Batch
from talos_kernels.select_threshold import DIGITS, GPU_DIGITS

SCORE_TENSORS = 16
"""That the scores of the threshold lie in, as those of a model do."""
CHECKED_SAMPLES = 4
"""Of a scored batch, compared with single backwards in float64."""
FEW_BATCHES = 5
DENSITY, ROUNDS = 0.1, 4
ENDING_SECONDS = 12.0
"""What comes after the last batch of a calibration: threshold, masks to the CPU, compressed."""


def run(context: Context) -> None:
    sizes = context.sizes
    kernels(context, [OURS])
    thresholds(context, [OURS])
    context.run("histogram, first pass", lambda: histogram(context))
    for iteration in sizes.iterations:
        context.run(f"{iteration.model}, plain batch", partial(plain, context, iteration))
        context.run(f"{iteration.model}, scored batch", partial(scored, context, iteration))
    tower.cache_clear()
    single_ops(context)
    kernels(context, [name for name in bench_fisher_diag.OPS if name != OURS])
    context.run("calibration", lambda: calibration(context))
    tower.cache_clear()
    thresholds(context, [name for name in bench_select_threshold.FORMS if name != OURS][::-1])


def form_of(name: str) -> str:
    """Return a bench's form as keys name it: ours by its kernel."""
    return "Triton" if name == OURS else name


def kernels(context: Context, names: list[str]) -> None:
    """Time the scoring kernel by tokens, in bf16; the longest in fp32 too."""
    sizes, device = context.sizes, context.device.torch
    wanted = [("fisher_diag_", tokens, torch.bfloat16, "bf16") for tokens in sizes.tokens]
    wanted.append(("fisher_diag_, fp32", sizes.tokens[0], torch.float32, "fp32"))
    for op, tokens, dtype, matrix in wanted:
        for name in names:
            make = partial(
                bench_fisher_diag.make, name, sizes.layer, sizes.samples, tokens, dtype, device
            )
            context.run(
                f"{op}, {tokens}, {form_of(name)}",
                lambda m=make, r=matrix: context.timed(m(), REPLAYED, r),
            )


def scores_of(context: Context, count: int) -> list[Tensor]:
    """Return squares of normal numbers, in some tensors."""
    device = context.device.torch
    generator = torch.Generator(device).manual_seed(0)
    flat = torch.randn(count, generator=generator, device=device).square_()
    return list(flat.chunk(SCORE_TENSORS))


def thresholds(context: Context, names: list[str]) -> None:
    for name in names:

        def timed(name: str = name) -> dict[str, Any]:
            scores = scores_of(context, context.sizes.threshold)
            return context.timed(bench_select_threshold.make(scores, name), EAGER)

        context.run("threshold" if name == OURS else f"threshold, {name}", timed)


def histogram(context: Context) -> dict[str, Any]:
    """Time the first of a threshold's passes, with the digits of the device."""
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

    return context.timed(Work(step, check, bytes_moved=4 * context.sizes.histogram))


def single_ops(context: Context) -> None:
    """Time them on the first shape's vector, and on one layer's product of the last's."""
    first, last, device = context.sizes.shapes[0], context.sizes.shapes[-1], context.device.torch
    for module, op in (
        (bench_swap, "swap"),
        (bench_add_delta, "add_delta_"),
        (bench_gather_grad, "gather_grad_"),
    ):
        for name in module.FORMS:
            key = f"{op}, {first.name}, {form_of(name)}"
            make = partial(module.make, first, name, device)
            context.run(key, lambda m=make: context.timed(m(), EAGER))
            if name == OURS:
                context.run(f"{key}, {REPLAYED}", lambda m=make: context.timed(m()))
    layer = replace(last, name=f"{last.name} layer", tensors=last.touched[:1])
    for shape in (layer, first):
        for name in bench_sddmm.FORMS:
            key = f"sddmm_, {shape.name}, {form_of(name)}"
            context.run(key, partial(sampled_product, context, shape, name))


def sampled_product(context: Context, shape: ModelShape, name: str) -> dict[str, Any]:
    device = context.device.torch
    samples = bench_sddmm.BATCH_SIZE[device.type]
    work = bench_sddmm.make(shape, name, samples, device)
    found = context.timed(work, matrix="bf16" if device.type == "cuda" else "fp32")
    return found | {"samples": samples, "tokens": shape.tokens}


@lru_cache(maxsize=1)
def tower(
    model: str, layers: int | None, batch: int, device: torch.device
) -> tuple[scoring.Scored, Batch]:
    built, samples = scoring.build(model, layers, batch, device)
    built.autocast = device.type == "cuda"
    return built, samples


def of_batch(iteration: Iteration, peak: int, times: list[float]) -> dict[str, Any]:
    seconds, spread = measure.median_and_spread(times)
    samples = iteration.batch
    found = {"samples": samples, "seconds": seconds, "spread": spread, "peak_bytes": peak}
    return found | {"samples_per_second": samples / seconds}


def plain(context: Context, iteration: Iteration) -> dict[str, Any]:
    """Time the forward and backward of a batch, with the gradients that training would have."""
    model, batch = tower(iteration.model, iteration.layers, iteration.batch, context.device.torch)

    def step() -> None:
        scoring.plain(model, batch)

    step()
    peak = measure.peak_bytes(step)
    return of_batch(iteration, peak, measure.seconds(step, FEW_BATCHES))


def scored(context: Context, iteration: Iteration) -> dict[str, Any]:
    """Time one further batch of a call of `talos.fisher_diag`; some samples are checked in fp32."""
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
    peak = measure.peak_bytes(lambda: scoring.ours(model, batch))
    times = scoring.further_batches(model, batch, FEW_BATCHES)
    return of_batch(iteration, peak, times) | {"error": error}


class OutOfTime(Exception):
    """Ends a calibration that does not fit."""


def calibration(context: Context) -> dict[str, Any]:
    """Time a calibration, all batches the same one; what does not fit in time is extrapolated."""
    size = context.sizes.calibrated
    model, batch = tower(size.model, size.layers, size.batch, context.device.torch)
    batches = math.ceil(context.sizes.calibration_samples / size.batch)
    ends: list[float] = []

    def note(progress: object) -> None:
        ends.append(measure.clock())
        if context.left() < ENDING_SECONDS and len(ends) < ROUNDS * batches:
            raise OutOfTime

    start = measure.clock()
    mask = None
    try:
        mask = talos.calibrate(
            model,
            [batch] * batches,
            DENSITY,
            ROUNDS,
            logits_fn=scoring.class_logits,
            on_progress=note,
        )
        seconds = measure.clock() - start
    except OutOfTime:
        further = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        seconds = ends[0] - start + further * (ROUNDS * batches - 1)
    found = {"model": size.model, "samples": batches * size.batch, "rounds": ROUNDS}
    found |= {"seconds": seconds, "extrapolated": mask is None, "batches_run": len(ends)}
    if mask is not None:
        wanted = mask.nnz / DENSITY
        total = sum(param.numel() for param in model.scored().values())
        assert abs(wanted - total) <= 1 / DENSITY, f"{mask.nnz} of {total} entries are selected"
    return found


if __name__ == "__main__":
    stage_main(run)
