"""Fine-tune on several ranks with FSDP2 in a plain loop; torch's DCP saves the checkpoints."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import BATCHES, CALIBRATION, pretrained
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import talos


def train(model: Any, folder: Path) -> talos.SparseAdam:
    mask = talos.calibrate(model, CALIBRATION, density=0.1)  # the ranks share the batches
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = talos.SparseAdam(model, mask, lr=1e-2)
    done = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if done:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / str(done))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for number, batch in enumerate([*BATCHES][done:], done + 1):
        own = batch.chunk(dist.get_world_size())[dist.get_rank()]
        (model(input_ids=own, labels=own).loss / 2).backward()
        if number % 2 == 0:
            optimizer.clip_grad_norm_(0.3)
            optimizer.step()
            optimizer.zero_grad()
        if number % 4 == 0:  # a folder with .metadata is complete
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / str(number))
    return optimizer


if __name__ == "__main__":
    dist.init_process_group("gloo")  # and "nccl" on GPUs
    train(pretrained(), Path(sys.argv[1]))
    dist.destroy_process_group()
