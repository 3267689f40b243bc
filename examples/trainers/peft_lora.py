"""Fine-tune the base of a model that holds a LoRA adapter of PEFT; the adapter stays as it is."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import BATCHES, CALIBRATION, pretrained
from torch import nn

import talos

LORA = LoraConfig(target_modules=["q_proj", "v_proj"])
TO_PEFT = {r"^(.*[qv]_proj)": r"base_model.model.\1.base_layer", "^": "base_model.model."}
FROM_PEFT = {r"base_model\.model\.|\.base_layer": ""}


def train(model: nn.Module, folder: Path) -> talos.SparseAdam:
    mask = talos.calibrate(model, CALIBRATION, density=0.1)  # before the adapter
    model = get_peft_model(model, LORA)
    mask = mask.rename(TO_PEFT)
    for name in mask.names:
        model.get_parameter(name).requires_grad_()  # PEFT has frozen the base
    optimizer = talos.SparseAdam(model, mask, lr=1e-2)  # this freezes the adapter
    done, last = 0, folder / "last.pt"
    if last.exists():
        saved = torch.load(last)
        done = saved["done"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for number, batch in enumerate([*BATCHES][done:], done + 1):
        (model(input_ids=batch, labels=batch).loss / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        if number % 4 == 0:  # PEFT's save_pretrained would save the adapter alone
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"done": number}, folder / "new.pt")
            (folder / "new.pt").replace(last)  # so that a kill leaves no half of one
    optimizer.task_vector().rename(FROM_PEFT).save(folder / "base.safetensors")  # for a plain base
    return optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
