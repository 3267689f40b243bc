"""Fine-tune with Lightning's manual optimization, and checkpoints in the middle of a window."""

import sys
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from tiny import BATCHES, CALIBRATION, pretrained
from torch import Tensor, nn

import talos


class FineTuning(LightningModule):
    def __init__(self, model: nn.Module, last: Path) -> None:
        super().__init__()
        self.model, self.last, self.automatic_optimization = model, last, False
        self.gradients: dict[str, Tensor | None] = {}
        self.own_optimizer = talos.SparseAdam(model, talos.calibrate(model, CALIBRATION), lr=1e-2)

    def configure_optimizers(self) -> talos.SparseAdam:
        return self.own_optimizer

    def training_step(self, batch: Tensor, number: int) -> None:
        self.manual_backward(self.model(input_ids=batch, labels=batch).loss / 2)
        if number % 2 == 1:
            self.own_optimizer.clip_grad_norm_(0.3)
            cast(Any, self.optimizers()).step()  # Lightning's wrapper counts the steps
            self.own_optimizer.zero_grad()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, number: int) -> None:
        if number % 5 == 4:
            self.trainer.save_checkpoint(self.last)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradients"] = {name: p.grad for name, p in self.model.named_parameters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gradients = checkpoint["gradients"]

    def on_train_start(self) -> None:  # before it, Lightning drops all gradients
        for name, gradient in self.gradients.items():
            self.model.get_parameter(name).grad = gradient


def train(model: nn.Module, folder: Path) -> talos.SparseAdam:
    lit = FineTuning(model, folder / "last.ckpt")
    trainer = Trainer(max_steps=8, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(lit, BATCHES, ckpt_path=lit.last if lit.last.exists() else None)
    return lit.own_optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
