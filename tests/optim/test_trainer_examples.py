"""examples/trainers/: each ends with the plain loop's bits, also if it was killed and run again."""

import logging
import re
from pathlib import Path

import accelerate
import datasets
import lightning
import peft
import pytest
import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

import talos
from tests.examples import (
    FOLDER,
    KILLED_AT,
    PLAIN,
    STEPS,
    WINDOW,
    Killed,
    Plain,
    linear,
    pretrained,
    run,
    token_loss,
)

IMPORTED_BY_EXAMPLES = (accelerate, datasets, lightning)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


def add_trls_head(model: nn.Module) -> None:
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


EXAMPLES = {**PLAIN, "trl_sft": Plain(token_loss, schedule=linear, change=add_trls_head)}


def test_examples_are_as_long_as_their_readme_says() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    listed = re.findall(r"^\| `trainers/(\w+)\.py` \| (\d+) \|", readme, re.MULTILINE)
    lengths = {}
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        lengths[path.stem] = len([line for line in lines if line.strip()])
        assert path.stem == "tiny" or "    train(pretrained(), Path(sys.argv[1]))" in lines[-3:]
    lengths.pop("tiny")
    assert {name: int(lines) for name, lines in listed} == lengths
    assert set(EXAMPLES) == set(lengths)
    assert max(lengths.values()) < 40


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {"fsdp2"}))
def test_an_example_ends_with_the_plain_loops_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    for logger in ("lightning.pytorch", "lightning.fabric", "transformers"):
        monkeypatch.setattr(logging.getLogger(logger), "level", logging.ERROR)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    example = EXAMPLES[name]
    whole = run(name, tmp_path / "whole", **example.options)
    assert len(whole.batches) == WINDOW * STEPS
    vector = whole.optimizer.task_vector()
    assert vector.norm() > 0
    plain = example.train(vector.mask, whole.batches)
    with pytest.raises(Killed):
        run(name, tmp_path / "killed", KILLED_AT, **example.options)
    resumed = run(name, tmp_path / "killed", **example.options)
    assert 0 < len(resumed.batches) < WINDOW * STEPS
    for wanted, got in zip(whole.batches[::-1], resumed.batches[::-1], strict=False):
        assert torch.equal(wanted["input_ids"], got["input_ids"])
    for other in (plain, resumed):
        for key, weight in whole.weights().items():
            assert torch.equal(weight, other.weights()[key]), key
        assert torch.equal(other.optimizer.task_vector().values, vector.values)


def test_a_mask_of_the_base_is_refused_by_a_model_with_an_adapter() -> None:
    model = pretrained()
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = talos.Mask.from_dense({name: torch.ones(32, 32) > 0})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wanted = rf"that it lacks: {name} .* an adapter of PEFT, .* call rename on the mask, as docs"
    for each in (adapted, model):
        with pytest.raises(talos.TalosValueError, match=wanted):
            talos.SparseAdam(each, mask)
