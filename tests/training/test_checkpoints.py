"""Checkpoints: a training that was stopped goes on with the bits of one that was not."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import talos
from talos.methods import METHODS, Talos
from talos.training import FineTuneStep, fine_tune
from tests.cases import assert_bit_equal
from tests.training.test_loop import CLASSES, half_mask

STEPS = 4


def train(
    model: nn.Module, data: Any, folder: Path, seed: int = 5, **options: Any
) -> tuple[list[FineTuneStep], talos.TaskVector]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    events: list[FineTuneStep] = []
    options = {"steps": STEPS, "every": 1, "keep": 99, **options}
    return events, fine_tune(model, data, checkpoint=folder, on_step=events.append, **options)


def only(folder: Path, step: int, new: Path) -> Path:
    """A folder with one checkpoint of another."""
    new.mkdir()
    name = f"step-{step:08}.safetensors"
    os.link(folder / name, new / name)
    return new


def assert_the_same(ends: list[tuple[nn.Module, list[FineTuneStep], talos.TaskVector]]) -> None:
    (whole, events, vector), (other, rest, resumed) = ends
    for key, value in whole.state_dict().items():
        assert_bit_equal(other.state_dict()[key], value)
    assert resumed == vector
    assert resumed.metadata == vector.metadata
    assert resumed.mask.metadata == vector.mask.metadata
    told = [(e.step, e.steps, e.loss, e.lr, e.grad_norm) for e in events]
    assert told[len(told) - len(rest) :] == [
        (e.step, e.steps, e.loss, e.lr, e.grad_norm) for e in rest
    ]


def resumed_everywhere(make: Any, tmp_path: Path, **options: Any) -> None:
    """Trains once, then again from each of its checkpoints; `make` gives model and data."""
    model, data = make()
    events, vector = train(model, data, tmp_path / "whole", **options)
    for step in range(1, len(events) + 1):
        other, data = make()
        folder = only(tmp_path / "whole", step, tmp_path / f"from-{step}")
        rest, again = train(other, data, folder, 17, **options, resume=True)
        assert len(rest) == len(events) - step
        assert_the_same([(model, events, vector), (other, rest, again)])
        assert len(list(folder.iterdir())) == len(events) - step + 1


class Attention(nn.Module):
    """One head over four tokens, with the names that methods look for, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.q_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 4, 8).to(self.head.weight.dtype)
        scores = self.q_proj(x) @ self.k_proj(x).mT / 8**0.5
        x = self.out_proj(scores.softmax(-1) @ self.v_proj(x))
        return self.head(F.dropout(x, 0.2, self.training).mean(1))


def attention_and_data(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    inputs = torch.randn(3, 8, 32)
    return Attention().to(dtype), list(zip(inputs, torch.arange(24).view(3, 8) % 3, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_with_the_same_bits(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, _ = attention_and_data()
    chosen = {"method": Talos(half_mask(model)) if method == "talos" else method, "lr": 1e-2}
    autocast = torch.bfloat16 if dtype == torch.float32 and method != "linearized" else None
    resumed_everywhere(
        lambda: attention_and_data(dtype), tmp_path, **chosen, steps=3, accumulate=2,
        autocast=autocast, weight_decay=0.1,
    )  # fmt: skip
