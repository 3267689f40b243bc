"""The threshold of a mask over a model's tensors, ours beside torch's own ways.

- kthvalue: the scores concatenated, `torch.kthvalue` of them.
- sort: the scores concatenated and sorted.

All find the k-th lowest of the tensors that can be masked, k a tenth of their entries. The peak is
what a form takes beside the scores; nothing is held between calls, the state is that of one call.
"""

from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from benches import measure
from benches.results import OURS
from benches.shapes import ModelShape, TensorShape
from benches.work import Work
from talos_kernels import select_threshold
from talos_kernels.select_threshold import DIGITS, GPU_DIGITS

FORMS = (OURS, "(a) cat and kthvalue", "(b) cat and sort")
DENSITY = 0.1
NOT_MASKABLE = ("embed", "shared", "relative_attention_bias")


def maskable(shape: ModelShape) -> list[TensorShape]:
    """Return the weights of linear layers and convolutions."""
    return [
        tensor
        for tensor in shape.tensors
        if len(tensor.shape) > 1 and not any(word in tensor.name for word in NOT_MASKABLE)
    ]


def make(scores: list[Tensor], name: str) -> Work:
    """Return the threshold of squares of normal numbers."""
    device = scores[0].device
    n = sum(score.numel() for score in scores)
    k = round(DENSITY * n)
    if name == OURS:
        digits = GPU_DIGITS if device.type == "cuda" else DIGITS[torch.float32]
        bins = 1 << max(digits)
        moved = len(digits) * 4 * n  # a pass a digit
        # int64 counts, and on the CPU four tables of 32-bit ones a thread, from no allocator of
        # torch's
        tables = 0 if device.type == "cuda" else 4 * 4 * bins * torch.get_num_threads()
        held = 8 * bins + tables

        def step() -> float:
            return select_threshold(scores, k).value
    elif name.startswith("(a)"):
        held = 0
        moved = 3 * 4 * n  # the concatenation, and at least one reading of it

        def step() -> float:
            return torch.cat([score.flatten() for score in scores]).kthvalue(k).values.item()
    else:
        held = 0
        moved = (3 + 1 + 2) * 4 * n  # the same, and values and int64 positions written

        def step() -> float:
            return torch.cat([score.flatten() for score in scores]).sort().values[k - 1].item()

    def check() -> None:
        found = step()
        below = sum(int((score < found).sum()) for score in scores)
        equal = sum(int((score == found).sum()) for score in scores)
        assert below < k <= below + equal
        # outside the project: where the squares of normal numbers have this quantile
        expected = NormalDist().inv_cdf((1 + DENSITY) / 2) ** 2
        spread = 30 / n**0.5  # five times the relative deviation of a sample's quantile
        assert found == pytest.approx(expected, rel=max(0.01, spread))

    return Work(step, check, bytes_moved=moved, state_bytes=lambda: held)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", FORMS)
def bench_select_threshold(shape: ModelShape, name: str, measured: Callable[..., None]) -> None:
    device = measure.target_device()
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(tensor.shape, generator=generator).square().to(device)
        for tensor in maskable(shape)
    ]
    work = make(scores, name)
    measured(work, op="select_threshold", shape=shape.name, form=name)
