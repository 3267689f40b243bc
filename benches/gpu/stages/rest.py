"""What is left: hardware counters, a checker of memory, constants that were never measured, tests.

A tool that is missing, or that the machine refuses, is recorded as not readable with its reason:
that is an answer, not a failure.
"""

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module

import torch

from benches import (
    bench_add_delta,
    bench_fisher_diag,
    bench_gather_grad,
    bench_sddmm,
    bench_select_threshold,
    bench_sparse_adam,
    numerics,
    scoring,
)
from benches.gpu.context import EAGER, REPLAYED, Context, stage_main
from benches.gpu.schedule import run_limited
from benches.gpu.stages.agreement import run_tests
from benches.results import OURS
from benches.work import Work, selection
from talos_kernels import tensor_index
from talos_kernels.triton.fisher_diag import CONFIGS as SCORING
from talos_kernels.triton.sddmm import CONFIGS as PRODUCTS

TOOL_LIMIT = 25.0  # seconds
TESTS_NEED = 12.0
PROGRAM = [sys.executable, "-m", "benches.gpu.small_step"]
KERNELS = "regex:sparse_adam_kernel|fisher_diag_kernel|score_histogram_kernel"
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
BORDER_DENSITIES = (0.0625, 0.125, 0.25, 0.03)


def run(context: Context) -> None:
    context.run("counters", lambda: counters(context), needs=10)
    for encoding, border in (("bitmap", 0.0), ("u16", 1.0)):
        for density in BORDER_DENSITIES:
            key = f"border, d {density:g}, {encoding}"
            context.run(key, partial(encoded, context, border, density), needs=3)
    for sweep in SWEEPS:
        sweep.run(context)
    context.run("memory checker", lambda: memory_checker(context), needs=15)
    context.run("numerics", lambda: exactness(context), needs=25)
    for entries in context.sizes.chunks:
        context.run(f"chunk of {entries}", partial(chunk, context, entries), needs=12)
    if context.left() > TESTS_NEED:
        limit = context.left() - TESTS_NEED / 2
        run_tests(context, "other tests", context.sizes.other_tests, limit)


def ask(context: Context, tool: list[str], arguments: list[str]) -> tuple[str, str | None]:
    """Return what the program prints under a tool, and why that is no answer; a CPU has no tool."""
    on_device = context.device.kind == "cuda"
    if on_device and tool and shutil.which(tool[0]) is None:
        return "", f"{tool[0]} is not installed"
    command = [*(tool if on_device else []), *PROGRAM, *arguments]
    # Without torch's cache a checker finds accesses beside a tensor; a graph needs the cache.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {})
    limit = max(1.0, min(TOOL_LIMIT, context.left()))
    with tempfile.TemporaryFile("w+") as file:
        code = run_limited(command, limit, file, environment)
        file.seek(0)
        printed = file.read()
    print(printed[-4000:], flush=True)
    if code is None:
        return printed, f"it took more than {limit:.0f} s"
    if code:
        return printed, f"it ended with {code}: {[*printed.splitlines(), ''][-1]}"
    return printed, None if on_device else "there is no device"


def counters(context: Context) -> dict[str, object]:
    """Return what Nsight Compute reads of one launch of each kernel, at the present clocks."""
    tool = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    tool += ["--kernel-name", KERNELS, "--metrics", ",".join(METRICS)]
    shape = ["vit-l-14"] if context.device.kind == "cuda" else []
    printed, reason = ask(context, tool, shape)
    found = read_counters(printed)
    if not found and reason is None:
        reason = "it named no kernel"
    return {"readable": bool(found), "reason": reason, "kernels": found}


def read_counters(printed: str) -> dict[str, dict[str, str]]:
    """Return the last launch of each kernel in the CSV that ncu prints after its own lines."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        found.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = row["Metric Value"]
    return found


def memory_checker(context: Context) -> dict[str, object]:
    printed, reason = ask(context, ["compute-sanitizer", "--tool", "memcheck"], [])
    summaries = [line for line in printed.splitlines() if "ERROR SUMMARY" in line]
    errors = int(summaries[-1].split("ERROR SUMMARY:")[1].split()[0]) if summaries else None
    if errors:
        raise AssertionError(f"compute-sanitizer counts {errors} errors: {printed[-2000:]}")
    return {"readable": errors is not None, "reason": reason, "errors": errors}


def exactness(context: Context) -> dict[str, object]:
    """Measure the device's backends against float64; the table is that of docs/numerics.md."""
    found = [each for each in numerics.backends() if each.device.type == context.device.kind]
    rows = numerics.write(context.out / "numerics.json", found, *context.sizes.numerics)
    print("\n".join(numerics.table(rows)), flush=True)
    missed = [f"{row['op']}, {row['dtype']}, {row['backend']}" for row in rows if not row["met"]]
    if missed:
        raise AssertionError(f"{len(missed)} bars are missed: {'; '.join(missed)}")
    return {"results": len(rows)}


@contextlib.contextmanager
def set_to(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def encoded(context: Context, border: float, density: float) -> dict[str, object]:
    """Time the step with the border between the encodings moved, so that all tensors have one."""
    with set_to(tensor_index, "U16_DENSITY", border):
        selection.cache_clear()
        work = bench_sparse_adam.ours(
            context.sizes.shapes[-1], context.device.torch, density=density
        )
        selection.cache_clear()
    return context.timed(work)


def chunk(context: Context, entries: int) -> dict[str, object]:
    shape = ["vit-l-14"] if context.device.kind == "cuda" else []
    printed, reason = ask(context, [], [*shape, "--chunk", str(entries)])
    if not printed.strip():
        raise RuntimeError(f"no time was printed: {reason}")
    return {"seconds": float(json.loads(printed.splitlines()[-1])["seconds"])}


def step(context: Context) -> Work:
    return bench_sparse_adam.ours(context.sizes.shapes[0], context.device.torch)


def added(context: Context) -> Work:
    return bench_add_delta.make(context.sizes.shapes[0], OURS, context.device.torch)


def gathered(context: Context) -> Work:
    return bench_gather_grad.make(context.sizes.shapes[0], OURS, context.device.torch)


def scored_layer(context: Context) -> Work:
    sizes, device = context.sizes, context.device
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    tokens = sizes.tokens[0]
    return bench_fisher_diag.make(OURS, sizes.layer, sizes.samples, tokens, dtype, device.torch)


def threshold(context: Context) -> Work:
    count = context.sizes.threshold // 4
    scores = [torch.randn(count, device=context.device.torch).square_()]
    return bench_select_threshold.make(scores, OURS)


def product(context: Context) -> Work:
    shape, device = context.sizes.shapes[-1], context.device.torch
    return bench_sddmm.make(shape, OURS, context.sizes.queued.batch, device)


def queued(context: Context) -> Work:
    """Return the scoring of a batch of small layers, which share launches."""
    size = context.sizes.queued
    model, batch = scoring.build(size.model, size.layers, size.batch, context.device.torch)

    def step() -> scoring.Scores:
        return scoring.ours(model, batch)

    def check() -> None:
        assert scoring.relative_error(step(), scoring.exact(model, batch)) <= 1e-4

    return Work(step, check)


def scoring_tiles() -> Iterator[tuple[str, object]]:
    """Yield the tiles of 16 bits in use, and others."""
    for rows, cols, depth, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 32, 8, 4),
        (128, 64, 64, 8, 4),
        (128, 64, 64, 4, 4),
        (64, 64, 64, 4, 4),
    ):
        tile = replace(
            SCORING["half"],
            rows=rows, cols=cols, tokens=(depth,), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        title = f"{rows} x {cols} x {depth}, {warps} warps, {stages} stages"
        yield title, SCORING | {"half": tile}


def product_plans() -> Iterator[tuple[str, object]]:
    """Yield tiles and parts of the tokens, in place of those that the predicted time chooses."""
    for rows, cols, depth, warps, stages, parts in (
        (128, 128, 64, 8, 3, 1),
        (64, 64, 64, 4, 3, 1),
        (128, 128, 64, 8, 3, 2),
        (128, 128, 64, 8, 3, 4),
        (128, 64, 64, 8, 3, 1),
        (64, 64, 64, 4, 4, 1),
    ):
        tile = PRODUCTS["half"][0]._replace(
            rows=rows, cols=cols, tokens=depth, num_warps=warps, num_stages=stages
        )
        title = f"{rows} x {cols} x {depth}, {warps} warps, {stages} stages, {parts} parts"
        yield title, lambda *_, chosen=(tile, parts): chosen


@dataclass(frozen=True)
class Sweep:
    """A constant that is read at each launch, and the work that depends on it."""

    module: str
    constant: str
    values: Mapping[str, object]
    make: Callable[[Context], Work]
    how: str = REPLAYED
    """What waits for the device cannot be captured."""

    def run(self, context: Context) -> None:
        module, made = import_module(self.module), cache(self.make)

        def timed(value: object) -> dict[str, object]:
            work = made(context)
            with set_to(module, self.constant, value):
                return context.timed(work, self.how)

        for label, value in self.values.items():
            key = f"{self.module.rpartition('.')[2]}.{self.constant} = {label}"
            context.run(key, partial(timed, value), needs=3)


def numbers(*values: int) -> dict[str, int]:
    return {str(value): value for value in values}


TRITON = "talos_kernels.triton"
WARPS = numbers(4, 2, 8)
QUEUES = {f"{size} MB": size << 20 for size in (32, 8, 128)}
SWEEPS = (
    Sweep(f"{TRITON}.sparse_adam", "NUM_WARPS", WARPS, step),
    Sweep(f"{TRITON}.fisher_diag", "CONFIGS", dict(scoring_tiles()), scored_layer),
    Sweep(f"{TRITON}.fisher_diag", "PROGRAMS_PER_PROCESSOR", numbers(2, 1, 3, 4), scored_layer),
    Sweep(f"{TRITON}.select_threshold", "STEPS", numbers(64, 16, 256), threshold, EAGER),
    Sweep(f"{TRITON}.select_threshold", "NUM_WARPS", WARPS, threshold, EAGER),
    Sweep(f"{TRITON}.sddmm", "plan", dict(product_plans()), product),
    Sweep("talos.calibration.launches", "_QUEUE_BYTES", QUEUES, queued, EAGER),
    Sweep(f"{TRITON}.add_delta", "NUM_WARPS", WARPS, added),
    Sweep(f"{TRITON}.gather_grad", "NUM_WARPS", WARPS, gathered),
)
"""The most telling first; the values in use come first."""


if __name__ == "__main__":
    stage_main(run)
