"""Fine-tune with the Trainer of transformers, which takes SparseAdam and a callback."""

import sys
from pathlib import Path

from tiny import CALIBRATION, TEXTS, pretrained
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import talos
from talos.training.hugging_face import TaskVectorCallback


def train(model: nn.Module, folder: Path) -> talos.SparseAdam:
    optimizer = talos.SparseAdam(model, talos.calibrate(model, CALIBRATION, density=0.1), lr=1e-2)
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        save_steps=2, save_total_limit=2, report_to=[],
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": text, "labels": text} for text in TEXTS],
        optimizers=(optimizer, None),
        callbacks=[TaskVectorCallback()],  # checkpoint-2/task_vector.safetensors, and so on
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
