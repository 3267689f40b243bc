"""A whole training iteration by method: the paper's table of costs, with strong baselines.

`benches.iterations` checks each form before it is timed. The ratios to non-linear fine-tuning stand
beside the paper's. A form that cannot run here is named with its reason. A short look at all of
them:

    pytest benches/bench_methods.py --layers 2 --batch 2 --rounds 1 --out bench

A model of your own, a folder of transformers, on random tokens or images:

    pytest benches --model FOLDER
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benches import measure
from benches.iterations import Cost, measure_forms
from benches.methods import COMPILED, FORMS, OTHER_LIBRARIES
from benches.shapes import SHAPES
from benches.workload import OWN_TOKENS, make_workload

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
    chosen = option("--form")
    every = (*FORMS, *compiled, *OTHER_LIBRARIES)
    reasons = {
        form: form.missing(workload) for form in every if chosen is None or form.name in chosen
    }
    wanted = [form for form, why in reasons.items() if why is None]
    costs = measure_forms(workload, wanted, rounds=option("--rounds"))
    measured = {cost.form for cost in costs}
    say = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    for form, why in reasons.items():
        if form.name not in measured:
            say(f"{form.title} is left out: {why or 'it ran out of memory'}")
    name, shape = Path(trained).name, SHAPES.get(trained)
    size = f"{tokens or (shape.tokens if shape else OWN_TOKENS)} tokens"
    if shape is None and "images" in workload.batch:
        size = f"{workload.batch['images'].shape[-1]} pixels"
    label = f"{name}, batch {batch}, {size}, {dtype}"
    if shape is not None and layers not in (None, shape.layers):
        label += f", {layers} layers"
    if chosen is not None:
        label += ", chosen forms"
    keep_costs(name, label, costs)
