"""Other people's trainers, stopped and resumed: every bit as in one go, and the task vector."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainingArguments

from talos import Mask, SparseAdam, TalosTypeError, TaskVector
from talos.training.hugging_face import TaskVectorCallback

STEPS = 8


class Network(nn.Module):
    """What transformers' Trainer calls too: by keywords, with a loss among the results."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def mask_of(model: nn.Module) -> Mask:
    draw = torch.Generator().manual_seed(3)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    return Mask.from_dense({n: torch.rand(s, generator=draw) < 0.4 for n, s in shapes.items()})


def batches(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(5, 6, generator=draw),
            "labels": torch.randint(3, (5,), generator=draw),
        }
        for _ in range(count)
    ]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, param in one.named_parameters():
        assert torch.equal(param, other.get_parameter(name)), name


def assert_vector(vector: TaskVector, tuned: nn.Module, base: nn.Module) -> None:
    """The vector takes the base to the tuned model, and moved something."""
    assert vector.norm() > 0
    edited = copy.deepcopy(base)
    vector.apply_(edited)
    torch.testing.assert_close(dict(edited.named_parameters()), dict(tuned.named_parameters()))


@pytest.mark.parametrize("compact", [False, True])
def test_accelerate(compact: bool, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    base = Network()
    model = copy.deepcopy(base)
    optimizer = SparseAdam(model, mask_of(base), lr=1e-2)
    if compact:
        optimizer.compact_gradients()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    model, wrapped, schedule = accelerator.prepare(model, optimizer, schedule)

    def train(seed: int) -> None:
        for batch in batches(STEPS, seed):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                wrapped.step()
                schedule.step()
                wrapped.zero_grad()

    train(1)
    accelerator.save_state(str(tmp_path))
    train(2)
    wanted = copy.deepcopy(accelerator.unwrap_model(model))
    accelerator.load_state(str(tmp_path))
    train(2)
    tuned = accelerator.unwrap_model(model)
    assert_same(tuned, wanted)
    assert_vector(wrapped.optimizer.task_vector(), tuned, base)


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(i)
        return {"x": torch.randn(6, generator=draw), "labels": torch.tensor(i % 3)}


def transformers_trainer(folder: Path, by_class: bool, **options: Any) -> HuggingFaceTrainer:
    model = Network()
    settings: dict[str, Any] = {"mask": mask_of(model), "lr": 1e-2}
    given: dict[str, Any] = {"optimizers": (SparseAdam(model, **settings), None)}
    if by_class:
        given = {"optimizer_cls_and_kwargs": (SparseAdam, settings)}
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=5,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100, seed=1,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return HuggingFaceTrainer(model, arguments, train_dataset=Samples(), **given)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=str)
def test_transformers(by_class: bool, options: dict[str, Any], tmp_path: Path) -> None:
    whole = transformers_trainer(tmp_path / "whole", by_class, **options)
    whole.train()
    halved = transformers_trainer(tmp_path / "halved", by_class, **options)
    checkpoint = f"checkpoint-{STEPS // 2}"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "halved" / checkpoint)
    halved.train(resume_from_checkpoint=str(tmp_path / "halved" / checkpoint))
    assert_same(halved.model, whole.model)
    assert_vector(halved.optimizer.optimizer.task_vector(), halved.model, Network())


def test_the_callback_saves_the_vector_in_each_checkpoint(tmp_path: Path) -> None:
    trainer = transformers_trainer(tmp_path, by_class=True, save_total_limit=1)
    trainer.add_callback(TaskVectorCallback())
    trainer.train()
    (checkpoint,) = tmp_path.iterdir()
    vector = TaskVector.load(checkpoint / "task_vector.safetensors")
    assert vector.norm() > 0
    assert vector == trainer.optimizer.optimizer.task_vector()


def test_the_callback_refuses_another_optimizer_at_the_beginning(tmp_path: Path) -> None:
    model = Network()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = HuggingFaceTrainer(
        model, arguments, train_dataset=Samples(), callbacks=[TaskVectorCallback()]
    )
    with pytest.raises(TalosTypeError, match=r"must be a talos\.SparseAdam, got AdamW; pass optim"):
        trainer.train()
    assert_same(model, Network())
    assert not list(tmp_path.iterdir())


class Lit(LightningModule):
    def __init__(self, compact: bool) -> None:
        super().__init__()
        self.network, self.compact = Network(), compact

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return self.network(**batch)["loss"]

    def configure_optimizers(self) -> dict[str, Any]:
        self.own_optimizer = SparseAdam(self.network, mask_of(self.network), lr=1e-2)
        if self.compact:
            self.own_optimizer.compact_gradients()
        schedule = torch.optim.lr_scheduler.OneCycleLR(self.own_optimizer, 1e-2, total_steps=40)
        return {
            "optimizer": self.own_optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_lightning(compact: bool, options: dict[str, Any], tmp_path: Path) -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = torch.utils.data.DataLoader(batches(1) * STEPS, batch_size=None)

    def fit(steps: int, checkpoint: Path | None = None) -> tuple[Lit, Trainer]:
        module = Lit(compact)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=str(tmp_path), **options,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, trainer

    whole, _ = fit(2 * STEPS)
    _, stopped = fit(STEPS)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2 * STEPS, tmp_path / "half.ckpt")
    assert_same(resumed.network, whole.network)
    assert_vector(resumed.own_optimizer.task_vector(), resumed.network, Network())
