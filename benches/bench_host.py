"""What the host spends on a step, on clipping and on dropping gradients: see `benches.host`."""

from collections.abc import Callable

import pytest

from benches import host, measure
from benches.table import Record

ROUNDS = 10


@pytest.mark.parametrize("n", [1, 24, 144])
def bench_host(n: int, keep: Callable[[Record], dict[str, object]]) -> None:
    device = measure.target_device()
    with host.no_launches(device) as kernel:
        forms = {name: make(n, device) for name, make in host.FORMS.items()}
        for name, form in forms.items():
            launches = kernel.launches if kernel else 0
            form.give_gradients()
            form.optimizer.step()
            assert kernel is None or "fused" in name or kernel.launches > launches
        for work in next(iter(forms.values())).works():
            host.alternated(forms, work, 1)  # fills caches
            times = host.alternated(forms, work, ROUNDS)
            for name in forms:
                middle, spread = measure.median_and_spread(times[name])
                shape = f"{work} of {n} tensors"
                keep(Record(op="host", shape=shape, form=name, seconds=middle, spread=spread))
