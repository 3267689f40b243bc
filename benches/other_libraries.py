"""The same iteration by other libraries, where they are installed; none is a dependency.

- `peft`: LoRA of rank 16 on queries and values (on the whole attention of open_clip's towers,
  where they are fused: peft knows no other way), and SHiRA, sparse high-rank adapters, on the
  same layers.
- torchao and bitsandbytes: non-linear fine-tuning with Adam's moments in 8 bits.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from talos.app.costs import Form, Running, Workload
from talos.app.costs.running import HYPER

RANK = 16
PROJECTIONS = (["query", "value"], ["q", "v"], ["q_proj", "v_proj"])
FUSED = ["attn"]  # open_clip's


def projections(model: nn.Module) -> list[str] | None:
    """What a model calls its linear layers of queries and values; None where it has none."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((pair for pair in PROJECTIONS if names.issuperset(pair)), None)


def _adapted(workload: Workload, config: Any) -> Running:
    """A copy of the model with adapters; the workload's own stays as it is."""
    import peft

    model = peft.inject_adapter_in_model(config, copy.deepcopy(workload.model))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True, **HYPER)
    numel = sum(param.numel() for param in trained)
    return Running(
        workload,
        model,
        workload.logits,
        optimizer,
        optimizer.step,
        bytes_moved=28 * numel,
        separate=True,
    )


def lora(workload: Workload) -> Running:
    import peft

    modules = projections(workload.model) or FUSED
    return _adapted(workload, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))


def shira(workload: Workload) -> Running:
    import peft

    modules = projections(workload.model)
    return _adapted(workload, peft.ShiraConfig(r=RANK, target_modules=modules))


def _eight_bit(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    def start(workload: Workload) -> Running:
        optimizer = make(list(workload.model.parameters()))
        return Running(workload, workload.model, workload.logits, optimizer, optimizer.step)

    return start


def _torchao(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **HYPER)


def _bitsandbytes(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **HYPER)


def _needs(package: str, *, gpu: str | None = None, linears: bool = False) -> Any:
    def missing(workload: Workload) -> str | None:
        if find_spec(package) is None:
            return f"{package} is not installed"
        if gpu is not None and workload.device.type != "cuda":
            return gpu
        if linears and projections(workload.model) is None:
            return "SHiRA adapts linear layers, and this tower's projections are one parameter"
        return None

    return missing


FORMS = (
    Form("peft_lora", "peft, LoRA", lora, _needs("peft")),
    Form("peft_shira", "peft, SHiRA", shira, _needs("peft", linears=True)),
    Form(
        "torchao_8bit",
        "non-linear, torchao AdamW8bit",
        _eight_bit(_torchao),
        _needs("torchao", gpu="its step is compiled, which takes minutes on a CPU"),
    ),
    Form(
        "bitsandbytes_8bit",
        "non-linear, bitsandbytes AdamW8bit",
        _eight_bit(_bitsandbytes),
        _needs("bitsandbytes", gpu="it has no 8-bit Adam for the CPU"),
    ),
)
