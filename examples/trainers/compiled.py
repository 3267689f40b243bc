"""Fine-tune a compiled model in a plain loop, with checkpoints in the middle of a window."""

import sys
from pathlib import Path
from typing import Any

import torch
from tiny import BATCHES, CALIBRATION, pretrained
from torch import nn

import talos


def train(model: nn.Module, folder: Path, backend: str = "inductor") -> talos.SparseAdam:
    optimizer = talos.SparseAdam(model, talos.calibrate(model, CALIBRATION, density=0.1), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    compiled = torch.compile(model, backend=backend)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done, last = 0, folder / "last.pt"
    if last.exists():
        saved = torch.load(last)
        done = saved["done"]
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        for name, gradient in saved["gradients"].items():
            model.get_parameter(name).grad = gradient
    for number, batch in enumerate([*BATCHES][done:], done + 1):
        (compiled(input_ids=batch, labels=batch).loss / 2).backward()
        if number % 2 == 0:
            optimizer.clip_grad_norm_(0.3)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if number % 5 == 0:
            saved = {key: part.state_dict() for key, part in parts.items()} | {"done": number}
            saved["gradients"] = {name: param.grad for name, param in model.named_parameters()}
            torch.save(saved, folder / "new.pt")
            (folder / "new.pt").replace(last)  # so that a kill leaves no half of one
    return optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
