"""examples/trainers/: each ends with the plain loop's bits, also if it was killed and run again."""

import copy
import logging
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import datasets
import lightning
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler
from trl.trainer.utils import add_fused_lm_head

import talos

IMPORTED_BY_EXAMPLES = (accelerate, datasets, lightning)
Batch = dict[str, Tensor]
FOLDER = Path(__file__).parents[2] / "examples" / "trainers"
WINDOW, STEPS = 2, 8  # batches a step
KILLED_AT = 7  # in the middle of a window

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


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


def plain_loss(model: nn.Module, batch: Batch, window: list[Batch]) -> Tensor:
    return model(**batch).loss / len(window)


def counted_loss(model: nn.Module, batch: Batch, window: list[Batch]) -> Tensor:
    """The batch's share of the mean over all tokens of a window, as the Trainer computes it."""
    tokens = sum(int((each["labels"][:, 1:] != -100).sum()) for each in window)
    return model(**batch | {"num_items_in_batch": tokens}).loss


def add_trls_head(model: nn.Module) -> None:
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


@dataclass
class Example:
    """What the plain loop does that equals an example."""

    clip: Callable[[nn.Module, talos.SparseAdam], object]
    schedule: Callable[[talos.SparseAdam], LRScheduler]
    loss: Callable[[nn.Module, Batch, list[Batch]], Tensor] = plain_loss
    change: Callable[[nn.Module], object] | None = None  # what the trainer changes in the model
    options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # from the example's to the base's

    def run(self, name: str, folder: Path, killed_at: int | None = None) -> Run:
        sys.modules.pop("tiny", None)  # as in a new process
        model = runpy.run_path(str(FOLDER / "tiny.py"))["pretrained"]()
        watch = Watch(killed_at)
        model.register_forward_pre_hook(watch, with_kwargs=True)
        train = runpy.run_path(str(FOLDER / f"{name}.py"))["train"]
        return Run(model, train(model, folder, **self.options), watch.batches)

    def plain(self, mask: talos.Mask, batches: list[Batch]) -> Run:
        model = runpy.run_path(str(FOLDER / "tiny.py"))["pretrained"]()
        if self.change is not None:
            self.change(model)
        optimizer = talos.SparseAdam(model, mask.rename(self.names), lr=1e-2)
        schedule = self.schedule(optimizer)
        for start in range(0, len(batches), WINDOW):
            window = batches[start : start + WINDOW]
            for batch in window:
                self.loss(model, batch, window).backward()
            self.clip(model, optimizer)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return Run(model, optimizer, batches)


def whole_norm(model: nn.Module, optimizer: talos.SparseAdam) -> object:
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def selected_norm(model: nn.Module, optimizer: talos.SparseAdam) -> object:
    return optimizer.clip_grad_norm_(1.0)


def linear(optimizer: talos.SparseAdam) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def cosine(optimizer: talos.SparseAdam) -> LRScheduler:
    return CosineAnnealingLR(optimizer, STEPS)


def constant(optimizer: talos.SparseAdam) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1)


EXAMPLES = {
    "hugging_face": Example(whole_norm, linear, counted_loss),
    "trl_sft": Example(whole_norm, linear, counted_loss, add_trls_head),
    "accelerate_loop": Example(whole_norm, cosine),
    "lightning_automatic": Example(whole_norm, constant),
    "lightning_manual": Example(selected_norm, constant),
    "compiled": Example(selected_norm, cosine, options={"backend": "aot_eager"}),
    "peft_lora": Example(
        lambda *_: None, constant, names={r"base_model\.model\.|\.base_layer": ""}
    ),
}


def test_examples_are_as_long_as_their_readme_says() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    listed = re.findall(r"^\| `trainers/(\w+)\.py` \| (\d+) \|", readme, re.MULTILINE)
    lengths = {}
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        lengths[path.stem] = len([line for line in lines if line.strip()])
        ending = ['if __name__ == "__main__":', "    train(pretrained(), Path(sys.argv[1]))"]
        assert path.stem == "tiny" or lines[-2:] == ending
    lengths.pop("tiny")
    assert {name: int(lines) for name, lines in listed} == lengths
    assert set(EXAMPLES) == set(lengths)
    assert max(lengths.values()) < 40


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ends_with_the_plain_loops_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    for logger in ("lightning.pytorch", "lightning.fabric", "transformers"):
        monkeypatch.setattr(logging.getLogger(logger), "level", logging.ERROR)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    example = EXAMPLES[name]
    whole = example.run(name, tmp_path / "whole")
    assert len(whole.batches) == WINDOW * STEPS
    vector = whole.optimizer.task_vector()
    assert vector.norm() > 0
    plain = example.plain(vector.mask, whole.batches)
    with pytest.raises(Killed):
        example.run(name, tmp_path / "killed", KILLED_AT)
    resumed = example.run(name, tmp_path / "killed")
    assert 0 < len(resumed.batches) < WINDOW * STEPS
    for wanted, got in zip(whole.batches[::-1], resumed.batches[::-1], strict=False):
        assert torch.equal(wanted["input_ids"], got["input_ids"])
    for other in (plain, resumed):
        for key, weight in whole.weights().items():
            assert torch.equal(weight, other.weights()[key]), key
        assert torch.equal(other.optimizer.task_vector().values, vector.values)


def test_a_mask_of_the_base_is_refused_by_a_model_with_an_adapter() -> None:
    model = runpy.run_path(str(FOLDER / "tiny.py"))["pretrained"]()
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = talos.Mask.from_dense({name: torch.ones(32, 32) > 0})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wanted = rf"that it lacks: {name} .* an adapter of PEFT, .* call rename on the mask, as docs"
    for each in (adapted, model):
        with pytest.raises(talos.TalosValueError, match=wanted):
            talos.SparseAdam(each, mask)
