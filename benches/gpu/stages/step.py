"""One optimizer step on the entries of Q and K, ours by both backends beside the strong baselines.

Every form is checked as `benches.bench_sparse_adam` checks it. Then it is timed twice: by graph
replay, which is the device's time alone, and eager, which is what a loop in Python waits for.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from benches import forms, measure
from benches.bench_sparse_adam import BF16, COMPACT, FORMS, MOMENTS, check
from benches.gpu import keys
from benches.gpu.context import Context, stage_main
from benches.shapes import ModelShape
from benches.table import OURS

LEAST_SECONDS, ENTRIES_A_SECOND = 2.0, 5e7
"""How long an item takes at most: one that cannot end in time is not begun. Masks are made on the
CPU, 5e7 entries a second."""


class Kind(NamedTuple):
    """A form of the step: its title here, its name in the bench, and the backend that serves it."""

    title: str
    name: str
    backend: str | None = None


TRITON, CSRC = Kind(keys.TRITON, OURS, "triton"), Kind(keys.CSRC, OURS, "csrc")
KINDS = (
    TRITON,
    Kind(keys.WHOLE, "(a) whole model, fused"),
    CSRC,
    Kind(keys.FROZEN, "(b) frozen, masked, fused"),
    Kind(keys.ELEMENTWISE, "(c) elementwise"),
    Kind(f"{keys.TRITON}, compact", COMPACT, "triton"),
    Kind(f"{keys.CSRC}, compact", COMPACT, "csrc"),
    Kind(f"{keys.TRITON}, compact, bf16 moments", MOMENTS, "triton"),
    Kind(f"{keys.TRITON}, bf16 weights", BF16, "triton"),
)
"""The most telling first."""


def run(context: Context) -> None:
    usual, *others = context.sizes.densities
    for shape in context.sizes.shapes:
        for kind in KINDS:
            measure_kind(context, shape, usual, kind)
    for shape in context.sizes.shapes:
        for density in others:
            for kind in (TRITON, CSRC):
                measure_kind(context, shape, density, kind)


def measure_kind(context: Context, shape: ModelShape, density: float, kind: Kind) -> None:
    needs = LEAST_SECONDS + shape.touched_numel / ENTRIES_A_SECOND
    for how in (keys.REPLAYED, keys.EAGER):
        context.run(
            keys.step(shape.name, density, kind.title, how),
            lambda how=how: timed(context, shape, density, kind, how),
            needs,
        )
    ready.cache_clear()


@lru_cache(maxsize=1)
def ready(shape: ModelShape, density: float, kind: Kind, device: torch.device) -> forms.Form:
    """A form that was checked; it is kept for the second way to time it."""
    options = {"density": density} if kind.backend else {}  # the others' masks are dense
    form = FORMS[kind.name](shape, device, **options)
    check(kind.name, form, shape, device, density)
    return form


def timed(
    context: Context, shape: ModelShape, density: float, kind: Kind, how: str
) -> dict[str, object]:
    device = context.device
    with forms.backend(kind.backend, "sparse_adam_"):
        form = ready(shape, density, kind, device.torch)
        clock = device.time_replayed if how == keys.REPLAYED else device.time_eager
        seconds, spread = measure.median_and_spread(clock(form.step, context.sizes.rounds))
    rate = form.bytes_moved / seconds
    return {
        "shape": shape.name,
        "density": density,
        "form": kind.title,
        "how": how,
        "seconds": seconds,
        "spread": spread,
        "bytes_moved": form.bytes_moved,
        "bytes_per_second": rate,
        "share": context.share("copy", rate),
        "state_bytes": form.state_bytes(),
    }


if __name__ == "__main__":
    stage_main(run)
