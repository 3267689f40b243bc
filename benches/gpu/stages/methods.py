"""A whole training iteration by method, at the paper's batch sizes, under bf16 autocast.

`talos.app.costs` measures: a form's loss, and its gradient where it trains the mask, are those of
the forms before it, and nothing moves that must not. The paper's five methods come first, of all
models; then the best that torch does by itself, compiled code, and other libraries.
"""

from functools import cache
from typing import Any

import torch

from benches import other_libraries
from benches.gpu import keys
from benches.gpu.context import Context, stage_main
from benches.gpu.sizes import Iteration
from talos.app.costs import COMPILED, FORMS, Agreement, Form, Workload, make_workload, measure

PAPER = ("talos", "nonlinear", "linearized", "l_lora", "lota")
LARGE = ("nonlinear", "linearized")
"""Measured at a smaller batch too: the second may not hold the usual one."""
OTHERS = (*(form for form in FORMS if form.name not in PAPER), *other_libraries.FORMS)
ITERATIONS = {"cpu": 1, "cuda": 5}
LEAST_SECONDS, COMPILING_SECONDS = 3.0, 40.0
"""What an item takes at most, and a compiled one: one that cannot end in time is not begun."""


def run(context: Context) -> None:
    by_name = {form.name: form for form in FORMS}
    models, smaller = context.sizes.iterations, context.sizes.smaller
    compiling = COMPILING_SECONDS if context.device.kind == "cuda" else LEAST_SECONDS
    for forms, iterations, needs in (
        ([by_name[name] for name in PAPER], models, LEAST_SECONDS),
        ([by_name[name] for name in LARGE], (smaller,), LEAST_SECONDS),
        (OTHERS, models, LEAST_SECONDS),
        (COMPILED, models[::-1], compiling),  # the smallest first
    ):
        for each in iterations:
            model = f"{each.model}, batch {each.batch}" if each is smaller else each.model
            for form in forms:
                context.run(
                    keys.method(model, form.name),
                    lambda i=each, f=form: cost(context, i, f),
                    needs,
                )
    made.cache_clear()


@cache
def made(iteration: Iteration, device: torch.device) -> tuple[Workload, Agreement]:
    """A model with what its forms must agree on; all models together are a few GB."""
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
    (found,) = measure(
        workload, [form], rounds=1, iterations=ITERATIONS[device.kind], agreement=agreement
    )
    return about | found.as_dict() | {"peak_bytes": found.memory.peak}


if __name__ == "__main__":
    stage_main(run)
