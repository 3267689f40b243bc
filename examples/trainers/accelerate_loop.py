"""Fine-tune with Accelerate: accumulation, clipping, and checkpoints in the middle of a window."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny import BATCHES, CALIBRATION, pretrained
from torch import nn

import talos


def train(model: nn.Module, folder: Path) -> talos.SparseAdam:
    optimizer = talos.SparseAdam(model, talos.calibrate(model, CALIBRATION, density=0.1), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    given = accelerator.prepare(model, optimizer, schedule, BATCHES)
    model, wrapped, schedule, batches = given
    done = max((int(path.name) for path in folder.glob("[0-9]*")), default=0)
    gradients = f"gradients-{accelerator.process_index}.pt"
    if done:
        accelerator.load_state(str(folder / str(done)))
        for name, grad in torch.load(folder / str(done) / gradients).items():
            model.get_parameter(name).grad = grad
    for number, batch in enumerate(accelerator.skip_first_batches(batches, done), done + 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
        if number % 5 == 0:  # the gradients of a window that is not full belong to its checkpoint
            accelerator.save_state(str(folder / "new"))
            grads = {name: param.grad for name, param in model.named_parameters()}
            torch.save(grads, folder / "new" / gradients)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (folder / "new").rename(folder / str(number))  # a kill leaves no half of one
    return optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
