"""Dense gradients gathered into the compact one, by our op and by torch's.

- masked_select: `grad[mask]` tensor by tensor, concatenated.
- positions: `torch.take` at int64 positions, concatenated.
"""

from collections.abc import Callable

import pytest
import torch

from benches import measure
from benches.results import OURS
from benches.shapes import ModelShape
from benches.work import Work, parameters, sector_share, selected, selection
from talos_kernels import gather_grad_
from tests.cases import assert_bit_equal

FORMS = (OURS, "(a) masked_select", "(b) take at positions")


def make(shape: ModelShape, name: str, device: torch.device) -> Work:
    chosen = selection(shape)
    masks = list(selected(shape, device).values())
    grads = [parameter.grad for parameter in parameters(shape.touched, device).values()]
    wanted = torch.cat([grad[mask] for grad, mask in zip(grads, masks, strict=True)])
    nnz = wanted.numel()
    dense_bytes = 4 * sum(tensor.numel for tensor in shape.touched)
    if name == OURS:
        index = chosen.pack(chosen.names, device)
        out = torch.empty_like(wanted)
        touched = 4 * sector_share(nnz / shape.touched_numel, 4) * shape.touched_numel
        moved, held = int(touched) + 4 * nnz + index.nbytes, index.nbytes

        def step() -> torch.Tensor:
            gather_grad_(out, grads, index)
            return out
    elif name.startswith("(a)"):
        moved, held = int(dense_bytes * 1.25) + 12 * nnz, dense_bytes // 4

        def step() -> torch.Tensor:
            pieces = [grad[mask] for grad, mask in zip(grads, masks, strict=True)]
            return torch.cat(pieces)
    else:
        positions = [mask.flatten().nonzero().squeeze(1) for mask in masks]
        moved, held = (8 + 4 + 4 + 8) * nnz, 8 * nnz

        def step() -> torch.Tensor:
            pieces = [grad.take(where) for grad, where in zip(grads, positions, strict=True)]
            return torch.cat(pieces)

    def check() -> None:
        assert_bit_equal(step(), wanted)

    return Work(step, check, bytes_moved=moved, state_bytes=lambda: held)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", FORMS)
def bench_gather_grad(shape: ModelShape, name: str, measured: Callable[..., None]) -> None:
    work = make(shape, name, measure.target_device())
    measured(work, op="gather_grad_", shape=shape.name, form=name)
