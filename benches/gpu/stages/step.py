"""One optimizer step on the entries of Q and K, ours by both backends beside the strong baselines.

Every form is checked as `benches.bench_sparse_adam` checks it. It is timed twice: by graph replay,
and eager.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from benches.bench_sparse_adam import BF16, COMPACT, FORMS, MOMENTS
from benches.gpu.context import EAGER, REPLAYED, Context, stage_main
from benches.results import OURS
from benches.shapes import ModelShape
from benches.work import Work, backend

LEAST_SECONDS, ENTRIES_A_SECOND = 2.0, 5e7
"""The most that an item takes: one that cannot end in time is not begun. Masks are made on the CPU,
5e7 entries a second."""


class Kind(NamedTuple):
    """A form of the step: its title here, its name in the bench, and the backend that serves it."""

    title: str
    name: str
    backend: str | None = None


TRITON, CSRC = Kind("Triton", OURS, "triton"), Kind("CUDA C++", OURS, "csrc")
KINDS = (
    TRITON,
    Kind("whole model, fused AdamW", "(a) whole model, fused"),
    CSRC,
    Kind("frozen, masked, fused AdamW", "(b) frozen, masked, fused"),
    Kind("elementwise", "(c) elementwise"),
    Kind("Triton, compact", COMPACT, "triton"),
    Kind("CUDA C++, compact", COMPACT, "csrc"),
    Kind("Triton, compact, bf16 moments", MOMENTS, "triton"),
    Kind("Triton, bf16 weights", BF16, "triton"),
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
    for how in (REPLAYED, EAGER):
        context.run(
            f"{shape.name}, d {density:g}, {kind.title}, {how}",
            lambda how=how: timed(context, shape, density, kind, how),
            needs,
        )
    ready.cache_clear()


@lru_cache(maxsize=1)
def ready(shape: ModelShape, density: float, kind: Kind, device: torch.device) -> Work:
    """Return a form; it is kept for the second way to time it."""
    options = {"density": density} if kind.backend else {}  # the others' masks are dense
    return FORMS[kind.name](shape, device, **options)


def timed(
    context: Context, shape: ModelShape, density: float, kind: Kind, how: str
) -> dict[str, Any]:
    with backend(kind.backend, "sparse_adam_"):
        work = ready(shape, density, kind, context.device.torch)
        found = context.timed(work, how)
    about = {"shape": shape.name, "density": density, "form": kind.title}
    return about | found | {"state_bytes": work.about["state_bytes"]}


if __name__ == "__main__":
    stage_main(run)
