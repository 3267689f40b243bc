"""Frozen weights in autocast's dtype: the same bits, the same weights afterwards, less kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from talos import Mask, SparseAdam, TaskVector, hold_frozen
from talos.errors import TalosRuntimeError, TalosTypeError
from talos.frozen import HeldWeights
from talos.params import named_parameters, select_parameters
from tests.cases import assert_bit_equal
from tests.test_families import FAMILIES

BF16 = torch.bfloat16


def results(model: nn.Module, forward: Callable[[], Any], seed: int = 0) -> list[Tensor]:
    """The outputs under autocast, and the gradients of what is trained."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", BF16):
        outputs = forward()
    outputs = outputs if isinstance(outputs, Tensor) else outputs.logits
    outputs.float().square().mean().backward()
    return [outputs.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bit_equal(ours, theirs)


def train_only(model: nn.Module, params: str) -> list[str]:
    """Freezes the rest."""
    chosen = list(select_parameters(model, params))
    for name, param in named_parameters(model).items():
        param.requires_grad_(name in chosen)
    return chosen
