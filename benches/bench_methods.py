"""A whole training iteration, by method: the paper's table of costs, and strong baselines beside.

`talos.app.costs` measures, and checks each form before it is timed. The ratios to non-linear
fine-tuning stand beside the paper's. A form that cannot run here is named with its reason.
"""

from collections.abc import Callable

import pytest
import torch

from benches import measure, other_libraries
from benches.shapes import SHAPES
from talos.app.costs import COMPILED, FORMS, Cost, make_workload
from talos.app.costs import measure as measure_forms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = {"cpu": 16, "cuda": 128}
SMALLER = {"vit-l-14": 64, "t5-large": 64}  # on a GPU: what linearized and all of fp32 hold


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # peft's SHiRA
def bench_methods(
    trained: str,
    dtype: str,
    request: pytest.FixtureRequest,
    keep_costs: Callable[[str, str, list[Cost]], None],
) -> None:
    option = request.config.getoption
    device = measure.target_device()
    usual = min(BATCH[device.type], SMALLER.get(trained, 128))
    layers, batch = option("--layers"), option("--batch") or usual
    tokens = option("--tokens") if not trained.startswith("vit") else None
    workload = make_workload(
        trained,
        batch_size=batch,
        tokens=tokens,
        layers=layers,
        dtype=DTYPES[dtype],
        device=device,
    )
    compiled = COMPILED if device.type == "cuda" or option("--compile") else ()
    wanted = [*FORMS, *compiled, *other_libraries.FORMS]
    say = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    reasons = {form.title: form.missing(workload) for form in wanted}
    for title, why in reasons.items():
        if why is not None:
            say(f"{title} is left out: {why}")
    costs = measure_forms(
        workload,
        [form for form in wanted if reasons[form.title] is None],
        rounds=option("--rounds"),
    )
    tried = {form.title for form in wanted if reasons[form.title] is None}
    for title in sorted(tried - {cost.title for cost in costs}):
        say(f"{title} is left out: it ran out of memory")
    shape = SHAPES[trained]
    label = f"{trained}, batch {batch}, {tokens or shape.tokens} tokens, {dtype}"
    if layers not in (None, shape.layers):
        label += f", {layers} layers"
    keep_costs(trained, label, costs)
