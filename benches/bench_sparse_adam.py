"""One optimizer step on the entries of Q and K, ours beside three strong baselines.

Every form is checked before it is timed: its selected weights after three steps against torch's
AdamW in float64, its unselected ones bit for bit against what they were. The forms take turns, so
that what the machine does meanwhile hits all alike.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from benches import forms, measure
from benches.shapes import ModelShape
from benches.table import OURS, Record
from talos.app.costs.workload import QK_DENSITY
from talos_kernels._ops import cuda_backends
from tests.cases import assert_bit_equal, assert_close

CHECKED_STEPS = 3
ROUNDS = 20
CSRC = f"{OURS}, CUDA C++"
COMPACT = f"{OURS}, compact gradients"
MOMENTS = f"{OURS}, compact, bf16 moments"
BF16 = f"{OURS}, bf16 weights"


def ours_by_csrc(shape: ModelShape, device: torch.device) -> forms.Form:
    """The same optimizer, its op served by the compiled library."""
    form = forms.ours(shape, device)

    def step() -> None:
        with forms.backend("csrc", "sparse_adam_"):
            form.step()

    return replace(form, step=step)


FORMS: dict[str, Callable[[ModelShape, torch.device], forms.Form]] = {
    OURS: forms.ours,
    CSRC: ours_by_csrc,
    COMPACT: partial(forms.ours, compact=True),
    MOMENTS: partial(forms.ours, compact=True, moment_dtype=torch.bfloat16),
    "(a) whole model, fused": forms.whole,
    "(b) frozen, masked, fused": forms.frozen,
    "(c) elementwise": forms.elementwise,
    BF16: partial(forms.ours, dtype=torch.bfloat16),
}


def missing(name: str, device: torch.device) -> str | None:
    """Why a form cannot run here."""
    if name != CSRC or "csrc" in cuda_backends("sparse_adam_"):
        return None
    return "csrc/ was built without CUDA" if device.type == "cuda" else "there is no CUDA device"


def check(
    name: str,
    form: forms.Form,
    shape: ModelShape,
    device: torch.device,
    density: float = QK_DENSITY,
) -> None:
    before = {key: weight.clone() for key, weight in form.weights.items()}
    for _ in range(CHECKED_STEPS):
        form.step()
    wanted = forms.expected(shape, device, CHECKED_STEPS, density)
    for key, selected in forms.selected(shape, density, device).items():
        if name == BF16:  # it starts from other weights, rounded; only what stays is compared
            assert not torch.equal(form.weights[key][selected], before[key][selected])
        elif name == MOMENTS:  # each of them up to a bf16 unit off, so is the quotient
            moved = (wanted[key] - before[key][selected]).abs().max()
            off = (form.weights[key][selected] - wanted[key]).abs().max()
            assert off < 0.05 * moved
        else:
            assert_close(form.weights[key][selected], wanted[key])
        if not name.startswith("(a)"):
            assert_bit_equal(form.weights[key][~selected], before[key][~selected])


def bench_sparse_adam(
    shape: ModelShape,
    keep: Callable[[Record], dict[str, object]],
    bandwidth: float,
    request: pytest.FixtureRequest,
) -> None:
    device = measure.target_device()
    say = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    ready = {}
    for name, make in FORMS.items():
        if (why := missing(name, device)) is not None:
            say(f"{name} is left out: {why}")
            continue
        ready[name] = make(shape, device)
        check(name, ready[name], shape, device)
    times = measure.alternated({name: form.step for name, form in ready.items()}, ROUNDS)
    for name, form in ready.items():
        middle, spread = measure.median_and_spread(times[name])
        keep(
            Record(
                op="sparse_adam_",
                shape=shape.name,
                form=name,
                seconds=middle,
                spread=spread,
                bytes_moved=form.bytes_moved,
                bandwidth=bandwidth,
                state_bytes=form.state_bytes(),
                peak_bytes=measure.peak_bytes(form.step),
                comparable=name != BF16,
            )
        )
