"""The forms of fine-tuning whose whole iterations are measured beside each other.

- The paper's five methods, as `talos.methods` has them, and TaLoS without compact gradients.
- A mask spread over all tensors, as one round of calibration leaves it, with compact gradients
  (which is LoTA's second training) and with dense ones.
- The best that torch does by itself: all but the touched tensors frozen, fused AdamW on a masked
  gradient; and compiled code.
- Other libraries, where they are installed. peft: LoRA of rank 16 on queries and values (on the
  whole attention of open_clip's towers, where they are fused), and SHiRA on the same layers.
  torchao and bitsandbytes: non-linear fine-tuning with Adam's moments in 8 bits.

All AdamW is fused where torch has that, gradients are set to None, bf16 is autocast. The copy of
the initial weights, from which a task vector is made, is not measured.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benches.iterations import HYPER, Form, Running
from benches.results import BASELINE
from benches.work import dense_step, masked_step, sparse_step
from benches.workload import Workload
from talos.masks import Mask
from talos.methods import Linearized, LLora, Nonlinear, Phase, Talos
from talos.names import named_parameters

SPREAD_DENSITY = 0.1
RANK = 16
PROJECTIONS = (["query", "value"], ["q", "v"], ["q_proj", "v_proj"])
FUSED = ["attn"]  # open_clip's


def _dense(workload: Workload, method: Nonlinear | Linearized) -> Running:
    phase = method.start(workload.model, HYPER, workload.logits)
    vars(phase)["base"] = {}  # an expansion holds its own
    trained = [param for param in workload.model.parameters() if param.requires_grad]
    moved = dense_step(sum(param.numel() for param in trained))
    return Running.of_phase(workload, phase, bytes_moved=moved)


def _nonlinear(workload: Workload) -> Running:
    return _dense(workload, Nonlinear())


def _l_lora(workload: Workload) -> Running:
    phase = LLora().start(workload.model, HYPER, workload.logits)

    def update() -> None:
        phase.clip(float("inf"))  # projects the gradient onto the adapters
        phase.step()

    about = {"allowed": lambda: phase.task_vector().mask, "own_state": _adapters_of(phase)}
    return Running.of_phase(workload, phase, update=update, **about)


def _adapters_of(phase: Phase) -> list[object]:
    """Return the base weights that adapters are added to, and both factors."""
    held = vars(phase)
    factors = [(each.a0, each.b.data) for each in held["_adapters"]]
    return [held["base"], factors]


def _sparse(
    workload: Workload, mask: Mask, entries: dict[str, int], *, compact: bool = True
) -> Running:
    phase: Any = Talos(mask).start(workload.model, HYPER, workload.logits)
    parts = [(entries[name], index.nnz) for name, index in mask.indices.items()]
    running = Running.of_phase(
        workload,
        phase,
        allowed=lambda: mask,
        bytes_moved=sparse_step(parts, mask.nbytes, compact=compact),
    )
    if not compact:  # the phase has made them compact
        phase.optimizer.compact_gradients(False)
    return running


def _talos(workload: Workload, *, compact: bool = True) -> Running:
    return _sparse(workload, workload.mask, workload.entries, compact=compact)


def _spread(workload: Workload, *, compact: bool = True) -> Running:
    """Return the training of a mask drawn from all tensors: how many entries it has is LoTA's."""
    device = workload.device
    draw = torch.Generator(device).manual_seed(1)
    params = {
        name: param
        for name, param in named_parameters(workload.model).items()
        if param.requires_grad
    }
    masks = {
        name: torch.rand(param.shape, generator=draw, device=device) < SPREAD_DENSITY
        for name, param in params.items()
    }
    entries = {name: param.numel() for name, param in params.items()}
    return _sparse(workload, Mask.from_dense(masks), entries, compact=compact)


def _masked(workload: Workload) -> Running:
    params = named_parameters(workload.model)
    masks = {name: workload.mask.to_dense(name) for name in workload.mask.names}
    touched = [params[name] for name in masks]
    shares = [mask.to(workload.device, torch.float32) for mask in masks.values()]
    others = [p for name, p in params.items() if name not in masks and p.requires_grad]
    for param in others:
        param.requires_grad_(False)
    optimizer = torch.optim.AdamW(touched, fused=True, **HYPER)

    @torch.no_grad()
    def update() -> None:
        grads = [param.grad for param in touched if param.grad is not None]
        torch._foreach_mul_(grads, shares)
        optimizer.step()

    def finish() -> None:
        for param in others:
            param.requires_grad_(True)

    return Running(
        workload,
        workload.model,
        workload.logits,
        optimizer,
        update,
        allowed=lambda: workload.mask,
        bytes_moved=masked_step(sum(param.numel() for param in touched)),
        own_state=shares,
        finish=finish,
    )


def _compiled(workload: Workload, start: Callable[[Workload], Running]) -> Running:
    running = start(workload)
    compiled = torch.compile(running.module)
    assert isinstance(compiled, nn.Module)
    running.module = compiled
    return running


def projections(model: nn.Module) -> list[str] | None:
    """Return the names of a model's linear layers of queries and values; None without any."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((pair for pair in PROJECTIONS if names.issuperset(pair)), None)


def _adapted_names(model: nn.Module) -> list[str] | None:
    """Return what LoRA adapts: queries and values, or the attention of open_clip's towers."""
    fused = any(isinstance(each, nn.MultiheadAttention) for each in model.modules())
    return projections(model) or (FUSED if fused else None)


def _adapted(workload: Workload, config: Any) -> Running:
    """Return the training of a copy of the model with adapters."""
    import peft

    model = peft.inject_adapter_in_model(config, copy.deepcopy(workload.model))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True, **HYPER)
    return Running(
        workload,
        model,
        workload.logits,
        optimizer,
        optimizer.step,
        bytes_moved=dense_step(sum(param.numel() for param in trained)),
        separate=True,
    )


def _lora(workload: Workload) -> Running:
    import peft

    modules = _adapted_names(workload.model)
    return _adapted(workload, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))


def _shira(workload: Workload) -> Running:
    import peft

    modules = projections(workload.model)
    return _adapted(workload, peft.ShiraConfig(r=RANK, target_modules=modules))


def _eight_bit(workload: Workload, package: str) -> Running:
    if package == "torchao":
        from torchao.optim import AdamW8bit
    else:
        from bitsandbytes.optim import AdamW8bit
    optimizer = AdamW8bit(list(workload.model.parameters()), **HYPER)
    return Running(workload, workload.model, workload.logits, optimizer, optimizer.step)


def _needs(
    package: str,
    *,
    gpu: str | None = None,
    adapts: Callable[[nn.Module], list[str] | None] | None = None,
) -> Callable[[Workload], str | None]:
    def missing(workload: Workload) -> str | None:
        if find_spec(package) is None:
            return f"{package} is not installed"
        if gpu is not None and workload.device.type != "cuda":
            return gpu
        if adapts is not None and adapts(workload.model) is None:
            return "it adapts linear layers of queries and values, which this model has not"
        return None

    return missing


PAPER_FORMS = (
    Form(BASELINE, "non-linear", _nonlinear),
    Form("linearized", "linearized", lambda workload: _dense(workload, Linearized())),
    Form("l_lora", "L-LoRA", _l_lora),
    Form("lota", "LoTA, second phase", _spread),
    Form("talos", "TaLoS", _talos),
)
"""LoTA's first phase costs what non-linear fine-tuning does."""

FORMS = (
    *PAPER_FORMS,
    Form("talos_dense_gradients", "TaLoS, dense gradients", partial(_talos, compact=False)),
    Form("lota_dense_gradients", "LoTA, dense gradients", partial(_spread, compact=False)),
    Form("masked_adamw", "frozen, masked, fused AdamW", _masked),
)
"""All that needs nothing but torch."""

COMPILED = (
    Form("nonlinear_compiled", "non-linear, compiled", partial(_compiled, start=_nonlinear)),
    Form("talos_compiled", "TaLoS, compiled", partial(_compiled, start=_talos)),
)
"""Compiling takes a CPU minutes before the first iteration."""

OTHER_LIBRARIES = (
    Form("peft_lora", "peft, LoRA", _lora, _needs("peft", adapts=_adapted_names)),
    Form("peft_shira", "peft, SHiRA", _shira, _needs("peft", adapts=projections)),
    Form(
        "torchao_8bit",
        "non-linear, torchao AdamW8bit",
        partial(_eight_bit, package="torchao"),
        _needs("torchao", gpu="its step is compiled, which takes minutes on a CPU"),
    ),
    Form(
        "bitsandbytes_8bit",
        "non-linear, bitsandbytes AdamW8bit",
        partial(_eight_bit, package="bitsandbytes"),
        _needs("bitsandbytes", gpu="it has no 8-bit Adam for the CPU"),
    ),
)
