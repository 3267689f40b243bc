"""Fine-tune with Lightning's automatic optimization: accumulation, clipping, checkpoints."""

import sys
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import BATCHES, CALIBRATION, pretrained
from torch import Tensor, nn

import talos


class FineTuning(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.own_optimizer = talos.SparseAdam(model, talos.calibrate(model, CALIBRATION), lr=1e-2)

    def configure_optimizers(self) -> talos.SparseAdam:
        return self.own_optimizer

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss


def train(model: nn.Module, folder: Path) -> talos.SparseAdam:
    last = folder / "last.ckpt"
    module = FineTuning(model)
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    trainer = Trainer(
        max_steps=8, devices=1, logger=False, callbacks=[saving],
        accumulate_grad_batches=2, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, BATCHES, ckpt_path=last if last.exists() else None)
    return module.own_optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
