"""Examples on two ranks: FSDP2, and trainers that need no change for several ranks."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import transformers
from torch import Tensor

import talos
from tests.cases import assert_bit_equal, assert_close
from tests.distributed.processes import in_processes
from tests.examples import FOLDER, KILLED_AT, PLAIN, STEPS, Batch, Killed, Run, run

IMPORTED_BY_EXAMPLES = (accelerate, transformers)
NAMES = ("fsdp2", "hugging_face", "accelerate_loop")
RANKS = 2

Found = tuple[dict[str, Tensor], talos.TaskVector, list[Batch]]


def runs(folder: Path) -> dict[str, tuple[Found, Found]]:
    """Run each example whole; then end one in the middle of a window and run it again."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(FOLDER))
    found = {}
    for name in NAMES:
        for part in ("whole", "killed"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        one = parts(run(name, folder / name / "whole"))
        with pytest.raises(Killed):
            run(name, folder / name / "killed", KILLED_AT)
        found[name] = one, parts(run(name, folder / name / "killed"))
    return found


def parts(run: Run) -> Found:
    """What other processes can read of a run, with whole weights."""
    weights: dict[str, Any] = run.weights()
    for name, param in weights.items():
        sharded = hasattr(param, "full_tensor")
        weights[name] = param.full_tensor() if sharded else param.detach()
    return weights, run.optimizer.task_vector(), run.batches


@pytest.mark.slow
def test_examples_on_two_ranks(tmp_path: Path) -> None:
    first, second = in_processes(RANKS, runs, tmp_path)
    for name in NAMES:
        (weights, vector, batches), (resumed, vector_again, rest) = first[name]
        (others, _, others_batches), (others_resumed, _, _) = second[name]
        assert 0 < len(rest) < len(batches)
        plain = PLAIN[name].train(vector.mask, batches, others_batches).weights()
        assert plain.keys() == weights.keys()
        for key, weight in weights.items():
            for same in (resumed[key], others[key], others_resumed[key]):
                assert_bit_equal(same, weight)
            assert_close(weight, plain[key].detach(), reduction=True)
        assert vector == vector_again
        assert vector.norm() > 0
    saved = tmp_path / "hugging_face" / "killed" / f"checkpoint-{STEPS}" / "task_vector.safetensors"
    assert talos.TaskVector.load(saved) == first["hugging_face"][0][1]
