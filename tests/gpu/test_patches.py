"""Patches of an optimizer on the device, for replicas there and on the CPU."""

import copy

import pytest
import torch
from torch import nn

from talos import Mask, Patch, SparseAdam
from tests.cases import assert_bit_equal

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replicas_on_both_devices_get_the_bits(dtype: torch.dtype) -> None:
    model = nn.Linear(300, 200).to(DEVICE, dtype)
    mask = Mask.from_dense({"weight": torch.rand(200, 300) < 0.1, "bias": torch.rand(200) < 2})
    near, far = copy.deepcopy(model), copy.deepcopy(model).cpu()
    optimizer = SparseAdam(model, mask, lr=1e-3)
    for _ in range(5):
        model(torch.randn(7, 300, device=DEVICE, dtype=dtype)).square().sum().backward()
        optimizer.step()
        patch = optimizer.patch()
        assert len(patch)
        patch.apply_(near)
        Patch.decode(patch.encode(mask), mask).apply_(far)
        for own, here, there in zip(*(m.parameters() for m in (model, near, far)), strict=True):
            assert_bit_equal(here.detach(), own.detach())
            assert_bit_equal(there.detach(), own.detach().cpu())
