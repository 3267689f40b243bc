"""A threshold found on the device against one found on the CPU: millions of scores, many equal."""

import pytest
import torch

from talos_kernels import TalosValueError, select_threshold
from tests.cases import DTYPES

DEVICE = torch.device("cuda")
SIZES = ((1 << 20) + 1, 97, 0, 3 << 18)


@pytest.mark.parametrize("largest", [False, True], ids=["lowest", "largest"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_thresholds_are_the_cpu_s(dtype: torch.dtype, share: float, largest: bool) -> None:
    scores = [torch.randn(size).square().to(dtype) for size in SIZES]
    k = round(share * sum(SIZES))
    wanted = select_threshold(scores, k, largest)
    assert select_threshold([score.to(DEVICE) for score in scores], k, largest) == wanted


def test_a_score_that_is_not_a_number_is_refused() -> None:
    scores = [torch.rand(70_000, device=DEVICE) for _ in range(3)]
    scores[1][-1] = torch.nan
    with pytest.raises(TalosValueError, match=r"scores\[1\]"):
        select_threshold(scores, 5)
