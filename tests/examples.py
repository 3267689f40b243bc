"""Runs the files of examples/trainers, ends a run where a test says, and has the plain loop."""

import copy
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import talos

FOLDER = Path(__file__).parents[1] / "examples" / "trainers"
WINDOW, STEPS = 2, 8  # batches a step
KILLED_AT = 7  # in the middle of a window

Batch = dict[str, Tensor]


class Killed(Exception):
    """Stands for the end of the process."""


@dataclass
class Watch:
    """A hook that keeps the batches a model is trained on, and ends a run before one of them."""

    killed_at: int | None
    batches: list[Batch] = field(default_factory=list)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[()], batch: Batch) -> None:
        if "labels" not in batch:
            return
        if len(self.batches) == self.killed_at:
            raise Killed
        self.batches.append(copy.deepcopy(batch))


@dataclass
class Run:
    model: nn.Module
    optimizer: talos.SparseAdam
    batches: list[Batch]

    def weights(self) -> dict[str, Tensor]:
        """The weights of the model, without an adapter, by the names of the base."""
        named = self.model.named_parameters()
        return {n.replace(".base_layer", ""): p for n, p in named if "lora" not in n}


def pretrained() -> nn.Module:
    return runpy.run_path(str(FOLDER / "tiny.py"))["pretrained"]()


def run(name: str, folder: Path, killed_at: int | None = None, **options: Any) -> Run:
    """Call the `train` of an example; its folder must be on `sys.path`."""
    sys.modules.pop("tiny", None)  # as in a new process
    model, watch = pretrained(), Watch(killed_at)
    model.register_forward_pre_hook(watch, with_kwargs=True)
    train = runpy.run_path(str(FOLDER / f"{name}.py"))["train"]
    return Run(model, train(model, folder, **options), watch.batches)


def mean_loss(model: nn.Module, batch: Batch, window: list[Batch]) -> Tensor:
    return model(**batch).loss / len(window)


def token_loss(model: nn.Module, batch: Batch, window: list[Batch]) -> Tensor:
    """The batch's share of the mean over all tokens of a window, as the Trainer computes it."""
    tokens = sum(int((each["labels"][:, 1:] != -100).sum()) for each in window)
    return model(**batch | {"num_items_in_batch": tokens}).loss


def clip_whole(model: nn.Module, optimizer: talos.SparseAdam) -> object:
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_selected(model: nn.Module, optimizer: talos.SparseAdam) -> object:
    return optimizer.clip_grad_norm_(0.3)


def linear(optimizer: talos.SparseAdam) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def cosine(optimizer: talos.SparseAdam) -> LRScheduler:
    return CosineAnnealingLR(optimizer, STEPS)


def constant(optimizer: talos.SparseAdam) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1)


@dataclass
class Plain:
    """The plain loop that an example equals."""

    loss: Callable[[nn.Module, Batch, list[Batch]], Tensor] = mean_loss
    clip: Callable[[nn.Module, talos.SparseAdam], object] | None = clip_whole
    schedule: Callable[[talos.SparseAdam], LRScheduler] = constant
    each_rank_moves_the_schedule: bool = False
    change: Callable[[nn.Module], object] | None = None  # what the trainer changes in the model
    options: dict[str, Any] = field(default_factory=dict)  # of the example
    names: dict[str, str] = field(default_factory=dict)  # from the example's to the base's

    def train(self, mask: talos.Mask, *ranks: list[Batch]) -> Run:
        """Train in one process on the batches of all ranks."""
        model = pretrained()
        if self.change is not None:
            self.change(model)
        optimizer = talos.SparseAdam(model, mask.rename(self.names), lr=1e-2)
        schedule = self.schedule(optimizer)
        for start in range(0, len(ranks[0]), WINDOW):
            window = [batch for own in ranks for batch in own[start : start + WINDOW]]
            for batch in window:
                self.loss(model, batch, window).backward()
            if self.clip is not None:
                self.clip(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            for _ in ranks if self.each_rank_moves_the_schedule else [0]:
                schedule.step()
        return Run(model, optimizer, ranks[0])


PLAIN = {
    "hugging_face": Plain(token_loss, schedule=linear),
    "accelerate_loop": Plain(schedule=cosine, each_rank_moves_the_schedule=True),
    "lightning_automatic": Plain(),
    "lightning_manual": Plain(clip=clip_selected),
    "fsdp2": Plain(clip=clip_selected),
    "compiled": Plain(clip=clip_selected, schedule=cosine, options={"backend": "eager"}),
    "peft_lora": Plain(clip=None, names={r"base_model\.model\.|\.base_layer": ""}),
}
