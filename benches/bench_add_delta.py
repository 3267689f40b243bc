"""A task vector's scaled delta added to a model, by our op and by torch's.

- dense: a delta as long as the model, `_foreach_add_`: what editing with dense task vectors costs.
- positions: `index_add_` at int64 positions, tensor by tensor.
"""

from collections.abc import Callable

import pytest
import torch

from benches import measure
from benches.results import OURS
from benches.shapes import ModelShape
from benches.work import Work, parameters, sector_share, selected, selection
from talos_kernels import add_delta_
from tests.cases import assert_bit_equal, assert_close

SCALE = 0.5
FORMS = (OURS, "(a) dense delta of the whole model", "(b) index_add_ at positions")


def make(shape: ModelShape, name: str, device: torch.device) -> Work:
    chosen = selection(shape)
    masks = selected(shape, device)
    whole = name.startswith("(a)")
    named = parameters(shape.tensors if whole else shape.touched, device)
    weights = {key: parameter.data for key, parameter in named.items()}
    deltas = {key: named[key].grad[mask] for key, mask in masks.items()}
    nnz = sum(delta.numel() for delta in deltas.values())
    if name == OURS:
        index = chosen.pack(chosen.names, device)
        values = torch.cat(list(deltas.values()))
        density = nnz / shape.touched_numel
        touched = 8 * sector_share(density, 4) * shape.touched_numel
        moved, held = int(touched) + 4 * nnz + index.nbytes, 4 * nnz + index.nbytes

        def step() -> None:
            add_delta_(list(weights.values()), index, values, scale=SCALE)
    elif whole:
        dense = [torch.zeros_like(weight) for weight in weights.values()]
        for key, delta in zip(weights, dense, strict=True):
            if key in masks:
                delta[masks[key]] = deltas[key]
        moved, held = 12 * shape.numel, 4 * shape.numel

        def step() -> None:
            torch._foreach_add_(list(weights.values()), dense, alpha=SCALE)
    else:
        positions = {key: mask.flatten().nonzero().squeeze(1) for key, mask in masks.items()}
        moved, held = nnz * (8 + 4 + 8), nnz * (8 + 4)

        def step() -> None:
            for key, weight in weights.items():
                weight.view(-1).index_add_(0, positions[key], deltas[key], alpha=SCALE)

    def check() -> None:
        before = {key: weights[key].clone() for key in masks}
        step()
        for key, mask in masks.items():
            wanted = before[key][mask].double() + SCALE * deltas[key].double()
            assert_close(weights[key][mask], wanted)
            assert_bit_equal(weights[key][~mask], before[key][~mask])

    return Work(step, check, bytes_moved=moved, state_bytes=lambda: held)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", FORMS)
def bench_add_delta(shape: ModelShape, name: str, measured: Callable[..., None]) -> None:
    work = make(shape, name, measure.target_device())
    measured(work, op="add_delta_", shape=shape.name, form=name)
