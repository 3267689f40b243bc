"""What a rank keeps and sends where ranks share the optimizer's state: `shard_state=True`.

The tensors are MiniLM's linear weights in bfloat16, whose masters are state, with a tenth of the
entries selected. Every rank makes the same steps with and without the option; the weights are
compared bit for bit. On a CPU all ranks share its cores, so the times say little about machines.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benches import measure
from benches.results import OURS, Record
from benches.shapes import SHAPES
from talos import Mask, SparseAdam
from tests.cases import assert_bit_equal
from tests.distributed.processes import in_processes

SHAPE, DENSITY, STEPS = "minilm", 0.1, 9
EACH = "each rank its own"


def steps(shared: bool) -> tuple[list[float], int, int, list[torch.Tensor]]:
    """Return the seconds of each step, the bytes kept and sent, and the weights."""
    draw = torch.Generator().manual_seed(0)
    shapes = {each.name: each.shape for each in SHAPES[SHAPE].tensors if len(each.shape) == 2}
    shapes = {name: shape for name, shape in shapes.items() if "embeddings" not in name}
    params = {n: nn.Parameter(torch.randn(s, generator=draw).bfloat16()) for n, s in shapes.items()}
    dense = {n: torch.rand(s, generator=draw) < DENSITY for n, s in shapes.items()}
    optimizer = SparseAdam(params.items(), Mask.from_dense(dense), shard_state=shared)
    taken = []
    for _ in range(STEPS):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=draw).bfloat16()
        start = measure.clock()
        optimizer.step()
        taken.append(measure.clock() - start)
    sent = 2 * optimizer.mask.nnz if shared else 0
    return taken, optimizer.nbytes, sent, [each.detach() for each in params.values()]


@pytest.mark.parametrize("ranks", [2, 4])
def bench_shared_state(ranks: int, keep: Callable[[Record], Any]) -> None:
    forms = {EACH: in_processes(ranks, steps, False), OURS: in_processes(ranks, steps, True)}
    for found in forms.values():
        for weights in (each[3] for each in found):
            for one, other in zip(weights, forms[EACH][0][3], strict=True):
                assert_bit_equal(one, other)
    for form, found in forms.items():
        seconds, spread = measure.median_and_spread(found[0][0][1:])
        kept = max(each[1] for each in found)
        record = Record(
            "shared_state", SHAPE, f"{form}, {ranks} ranks", seconds, spread, found[0][2],
            state_bytes=kept, comparable=False,
        )  # fmt: skip
        keep(record)
