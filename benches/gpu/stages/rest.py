"""What is left: hardware counters, a checker of memory, constants that were never measured, tests.

A tool that is not there, or that the machine refuses, is recorded as not readable with its reason:
that is an answer, and no failure.
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
from functools import partial
from importlib import import_module

import torch

from benches import bench_add_delta, bench_gather_grad, bench_sddmm, forms, measure, scoring
from benches.gpu.context import Context, stage_main
from benches.gpu.schedule import run_limited
from benches.gpu.stages.agreement import record_tests
from benches.shapes import SHAPES
from benches.table import OURS
from talos_kernels import fisher_diag_, select_threshold, tensor_index
from talos_kernels.triton.fisher_diag import CONFIGS as SCORING
from talos_kernels.triton.sddmm import CONFIGS as PRODUCTS

TOOL_LIMIT = 25.0  # seconds
TESTS_NEED = 12.0
PROGRAM = [sys.executable, "-m", "benches.gpu.small_step", "--end-with-parent"]
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
        run_sweep(context, sweep)
    context.run("memory checker", lambda: memory_checker(context), needs=15)
    for entries in context.sizes.chunks:
        context.run(f"chunk of {entries}", partial(chunk, context, entries), needs=12)
    if context.todo("other tests") and context.left() > TESTS_NEED:
        arguments = context.sizes.other_tests
        record_tests(context, "other tests", arguments, context.left() - TESTS_NEED / 2)


def ask(context: Context, tool: list[str], arguments: list[str]) -> tuple[str, str | None]:
    """What the program printed under a tool, and why that says nothing; the CPU has no tool."""
    on_device = context.device.kind == "cuda"
    if on_device and tool and shutil.which(tool[0]) is None:
        return "", f"{tool[0]} is not installed"
    command = [*(tool if on_device else []), *PROGRAM, *arguments]
    # A checker of memory sees what lies beside a tensor; without a tool a graph must allocate.
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
    """What Nsight Compute reads of one launch of each kernel, at the clocks that it finds."""
    tool = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    tool += ["--kernel-name", KERNELS, "--metrics", ",".join(METRICS)]
    shape = ["vit-l-14"] if context.device.kind == "cuda" else []
    printed, reason = ask(context, tool, shape)
    found = read_counters(printed)
    if not found and reason is None:
        reason = "it named no kernel"
    return {"readable": bool(found), "reason": reason, "kernels": found}


def read_counters(printed: str) -> dict[str, dict[str, str]]:
    """The last launch of each kernel in the CSV that ncu prints after its own lines."""
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


def timed(
    context: Context, work: Callable[[], object], *, replayed: bool = True
) -> dict[str, object]:
    device = context.device
    times = (device.time_replayed if replayed else device.time_eager)(work, context.sizes.rounds)
    seconds, spread = measure.median_and_spread(times)
    return {"seconds": seconds, "spread": spread}


@contextlib.contextmanager
def set_to(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def encoded(context: Context, border: float, density: float) -> dict[str, object]:
    """The step where the border between the encodings lies at a density, so that all is one."""
    with set_to(tensor_index, "U16_DENSITY", border):
        forms.selection.cache_clear()
        form = forms.ours(context.sizes.shapes[-1], context.device.torch, density=density)
        forms.selection.cache_clear()
    return timed(context, form.step) | {"bytes_moved": form.bytes_moved}


@dataclass(frozen=True)
class Sweep:
    """A constant that is read at each launch, and what uses it."""

    module: str
    constant: str
    values: Mapping[str, object]
    make: Callable[[Context], Callable[[], object]]
    replayed: bool = True
    """What waits for the device cannot be captured."""

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.constant}"


def run_sweep(context: Context, sweep: Sweep) -> None:
    keys = {f"{sweep.name} = {label}": value for label, value in sweep.values.items()}
    if not any(map(context.todo, keys)):
        return
    module = import_module(sweep.module)
    made: list[Callable[[], object]] = []

    def measured(value: object) -> dict[str, object]:
        if not made:
            made.append(sweep.make(context))
        with set_to(module, sweep.constant, value):
            return timed(context, made[0], replayed=sweep.replayed)

    for key, value in keys.items():
        context.run(key, partial(measured, value), needs=3)


def chunk(context: Context, entries: int) -> dict[str, object]:
    shape = ["vit-l-14"] if context.device.kind == "cuda" else []
    printed, reason = ask(context, [], [*shape, "--chunk", str(entries)])
    if not printed.strip():
        raise RuntimeError(f"no time was printed: {reason}")
    return {"seconds": float(json.loads(printed.splitlines()[-1])["seconds"])}


def step(context: Context) -> Callable[[], object]:
    return forms.ours(context.sizes.shapes[0], context.device.torch).step


def op(module: object) -> Callable[[Context], Callable[[], object]]:
    """The work of a bench's own form on the first shape."""

    def make(context: Context) -> Callable[[], object]:
        make_work: Callable[..., object] = module.make
        return make_work(context.sizes.shapes[0], OURS, context.device.torch).step

    return make


def scored_layer(context: Context) -> Callable[[], object]:
    sizes, device = context.sizes.scoring, context.device.torch
    dtype = torch.bfloat16 if context.device.kind == "cuda" else torch.float32
    dy, x = (
        torch.randn(1, sizes.samples, sizes.tokens[0], width, device=device).to(dtype)
        for width in (sizes.rows, sizes.columns)
    )
    score = torch.zeros(sizes.rows, sizes.columns, device=device)
    return lambda: fisher_diag_([score], [dy], [x])


def threshold(context: Context) -> Callable[[], object]:
    scores = [torch.rand(context.sizes.threshold // 4, device=context.device.torch)]
    return lambda: select_threshold(scores, scores[0].numel() // 10)


def product(context: Context) -> Callable[[], object]:
    shape, device = context.sizes.shapes[-1], context.device.torch
    return bench_sddmm.make(shape, OURS, context.sizes.queued.batch, device).step


def queued(context: Context) -> Callable[[], object]:
    """A scored batch of small layers, which share launches."""
    iteration = context.sizes.queued
    layers = iteration.layers or SHAPES[iteration.model].layers
    model, batch = scoring.build(iteration.model, layers, iteration.batch, context.device.torch)
    return lambda: scoring.ours(model, batch)


def scoring_tiles() -> Iterator[tuple[str, object]]:
    """The tiles of 16 bits in use, and some beside them."""
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
    """Tiles and parts of the tokens, in place of what the predicted time chooses."""
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


TRITON = "talos_kernels.triton"
WARPS = {str(n): n for n in (4, 2, 8)}
SWEEPS = (
    Sweep(f"{TRITON}.sparse_adam", "NUM_WARPS", WARPS, step),
    Sweep(f"{TRITON}.fisher_diag", "CONFIGS", dict(scoring_tiles()), scored_layer),
    Sweep(
        f"{TRITON}.fisher_diag",
        "PROGRAMS_PER_PROCESSOR",
        {str(n): n for n in (2, 1, 3, 4)},
        scored_layer,
    ),
    Sweep(
        f"{TRITON}.select_threshold", "STEPS", {str(n): n for n in (64, 16, 256)}, threshold, False
    ),
    Sweep(f"{TRITON}.select_threshold", "NUM_WARPS", WARPS, threshold, False),
    Sweep(f"{TRITON}.sddmm", "plan", dict(product_plans()), product),
    Sweep(
        "talos.calibration.capture",
        "_QUEUE_BYTES",
        {f"{n} MB": n << 20 for n in (32, 8, 128)},
        queued,
        False,
    ),
    Sweep(f"{TRITON}.add_delta", "NUM_WARPS", WARPS, op(bench_add_delta)),
    Sweep(f"{TRITON}.gather_grad", "NUM_WARPS", WARPS, op(bench_gather_grad)),
)


if __name__ == "__main__":
    stage_main(run)
