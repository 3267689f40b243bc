"""One task vector swapped for another on a resident model, ours beside loading the whole model.

- ours: the old delta reverted, then the new one added with the old bits saved: two launches.
- load_state_dict: a full fine-tuned state of each task, copied over the whole model.

Each step exchanges the two tasks, whose selections have one density and differ in their entries.
"""

from collections.abc import Callable

import pytest
import torch

from benches import measure
from benches.results import OURS
from benches.shapes import ModelShape
from benches.work import Work, parameters, sector_share, selected
from talos_kernels import Index, TensorIndex, add_delta_, revert_delta_
from tests.cases import assert_bit_equal, assert_close

SCALE = 0.5
FORMS = (OURS, "load_state_dict of the whole model")


def make(shape: ModelShape, name: str, device: torch.device) -> Work:
    first = selected(shape, device)
    tasks = (first, {key: mask.flip(1) for key, mask in first.items()})
    whole = name != OURS
    named = parameters(shape.tensors if whole else shape.touched, device)
    weights = {key: parameter.data for key, parameter in named.items()}
    grads = {key: named[key].grad for key in first}
    base = {key: weights[key].clone() for key in first}
    nnz = sum(int(mask.sum()) for mask in first.values())
    density, size = nnz / shape.touched_numel, 4 * shape.touched_numel
    on = 0
    if whole:
        model = torch.nn.ParameterDict({key.replace(".", "/"): p for key, p in named.items()})
        states = [{key: p.clone() for key, p in model.state_dict().items()} for _ in tasks]
        for state, masks in zip(states, tasks, strict=True):
            for key, mask in masks.items():
                state[key.replace(".", "/")][mask] += SCALE * grads[key][mask]
        moved, held = 8 * shape.numel, 8 * shape.numel

        def step() -> None:
            nonlocal on
            on = 1 - on
            model.load_state_dict(states[on])
    else:
        params = list(weights.values())
        indices = [
            Index.pack([TensorIndex.encode(mask) for mask in masks.values()], device)
            for masks in tasks
        ]
        values = [torch.cat([grads[key][mask] for key, mask in m.items()]) for m in tasks]
        saved = [torch.empty_like(each) for each in values]
        add_delta_(params, indices[0], values[0], scale=SCALE, saved=saved[0])
        index_bytes = sum(index.nbytes for index in indices)
        compact = 3 * 4 * nnz + index_bytes  # old bits and values read, new old bits written
        held = 2 * 2 * 4 * nnz + index_bytes
        moved = int(3 * sector_share(density, 4) * size) + compact  # written, read, written

        def step() -> None:
            nonlocal on
            old, on = on, 1 - on
            revert_delta_(params, indices[old], saved[old])
            add_delta_(params, indices[on], values[on], scale=SCALE, saved=saved[on])

    def check() -> None:
        for _ in tasks:
            step()
            for key, mask in tasks[on].items():
                wanted = base[key][mask].double() + SCALE * grads[key][mask].double()
                assert_close(weights[key][mask], wanted)
                assert_bit_equal(weights[key][~mask], base[key][~mask])

    return Work(step, check, bytes_moved=moved, state_bytes=lambda: held)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", FORMS)
def bench_swap(shape: ModelShape, name: str, measured: Callable[..., None]) -> None:
    work = make(shape, name, measure.target_device())
    measured(work, op="swap", shape=shape.name, form=name)
