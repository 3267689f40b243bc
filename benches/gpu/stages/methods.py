"""A whole training iteration by method, at the paper's batch sizes, under bf16 autocast.

`benches.iterations` checks each form. The paper's five methods come first, of all models; then the
best that torch does by itself, compiled code, and other libraries.
"""

from functools import cache
from typing import Any

import torch

from benches.gpu.context import Context, stage_main
from benches.gpu.sizes import Iteration
from benches.iterations import Agreement, Form, measure_forms
from benches.methods import COMPILED, FORMS, OTHER_LIBRARIES
from benches.workload import Workload, make_workload

PAPER = ("talos", "nonlinear", "linearized", "l_lora", "lota")
LARGE = ("nonlinear", "linearized")
"""Measured at a smaller batch too: the second may not hold the usual one."""
ITERATIONS = {"cpu": 1, "cuda": 5}
LEAST_SECONDS, COMPILING_SECONDS = 3.0, 40.0
"""The most that an item takes, and a compiled one: one that cannot end in time is not begun."""


def run(context: Context) -> None:
    by_name = {form.name: form for form in FORMS}
    others = [form for form in FORMS if form.name not in PAPER]
    models, smaller = context.sizes.iterations, context.sizes.smaller
    compiling = COMPILING_SECONDS if context.device.kind == "cuda" else LEAST_SECONDS
    for forms, iterations, needs in (
        ([by_name[name] for name in PAPER], models, LEAST_SECONDS),
        ([by_name[name] for name in LARGE], (smaller,), LEAST_SECONDS),
        ([*others, *OTHER_LIBRARIES], models, LEAST_SECONDS),
        (COMPILED, models[::-1], compiling),  # the smallest first
    ):
        for each in iterations:
            model = f"{each.model}, batch {each.batch}" if each is smaller else each.model
            for form in forms:
                context.run(
                    f"{model}, {form.name}", lambda i=each, f=form: cost(context, i, f), needs
                )
    made.cache_clear()


@cache
def made(iteration: Iteration, device: torch.device) -> tuple[Workload, Agreement]:
    """Return a model with what its forms must agree on; all models together are a few GB."""
    workload = make_workload(
        iteration.model,
        batch_size=iteration.batch,
        tokens=iteration.tokens,
        layers=iteration.layers,
        dtype=torch.bfloat16,
        device=device,
    )
    return workload, Agreement()


def cost(context: Context, iteration: Iteration, form: Form) -> dict[str, Any]:
    device = context.device
    about = {"model": iteration.model, "batch": iteration.batch}
    about |= {"form": form.name, "title": form.title}
    if form in COMPILED and device.kind == "cpu":
        return about | {"left_out": "compiling takes a CPU minutes"}
    workload, agreement = made(iteration, device.torch)
    reason = form.missing(workload)
    if reason is not None:
        return about | {"left_out": reason}
    costs = measure_forms(
        workload, [form], rounds=1, iterations=ITERATIONS[device.kind], agreement=agreement
    )
    if not costs:
        raise RuntimeError(f"{form.title} ran out of the GPU's memory")
    return about | costs[0].as_dict() | {"peak_bytes": costs[0].memory.peak}


if __name__ == "__main__":
    stage_main(run)
