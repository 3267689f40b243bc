"""The forms of fine-tuning whose costs stand beside each other.

The paper's five methods, as `talos.methods` has them; TaLoS without its savings; and the best that
torch does by itself: everything but the touched tensors frozen with fused AdamW on a masked
gradient, and compiled code. All AdamW is fused where torch has
that, attention is torch's own, gradients are set to None, bf16 is autocast.

The copy of the initial weights from which a task vector is made is no part of what is measured.
"""

from collections.abc import Sequence

import torch
from torch import nn

from talos.app.costs.running import HYPER, Form, Running
from talos.app.costs.step_bytes import dense_step, masked_step, sparse_step
from talos.app.costs.workload import Workload
from talos.masks import Mask
from talos.methods import Linearized, LLora, Nonlinear, Phase, Talos
from talos.methods.base import Setup
from talos.methods.lota import Lota
from talos.methods.talos import Sparse
from talos.names import named_parameters

__all__ = ["BASELINE", "COMPILED", "FORMS", "OURS"]

OURS, BASELINE = "talos", "nonlinear"
LOTA_DENSITY = 0.1


def _numel(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def _compiled(running: Running) -> Running:
    compiled = torch.compile(running.module)
    assert isinstance(compiled, nn.Module)
    running.module = compiled
    return running


def _nonlinear(workload: Workload) -> Running:
    phase = Nonlinear().start(workload.model, HYPER, workload.logits)
    return _without_base(workload, phase)


def _linearized(workload: Workload) -> Running:
    phase = Linearized().start(workload.model, HYPER, workload.logits)
    return _without_base(workload, phase)  # the expansion holds its own


def _without_base(workload: Workload, phase: Phase) -> Running:
    vars(phase)["base"] = {}
    return Running.of_phase(workload, phase, bytes_moved=dense_step(_numel(workload.model)))


def _l_lora(workload: Workload) -> Running:
    phase = LLora().start(workload.model, HYPER, workload.logits)

    def update() -> None:
        phase.clip(float("inf"))  # projects the gradient onto the adapters
        phase.step()

    about = {"allowed": lambda: phase.task_vector().mask, "own_state": _adapters_of(phase)}
    return Running.of_phase(workload, phase, update=update, **about)


def _adapters_of(phase: Phase) -> list[object]:
    """The base weights that adapters are added to, and both factors."""
    held = vars(phase)
    factors = [(each.a0, each.b.data) for each in held["_adapters"]]
    return [held["base"], factors]


def _lota(workload: Workload) -> Running:
    # Its first training is nonlinear's. Which entries the second one has depends on the first; how
    # many does not, nor that they lie in all tensors: here they are drawn.
    device = workload.device
    draw = torch.Generator(device).manual_seed(1)
    mask = Mask.from_dense(
        {
            name: torch.rand(param.shape, generator=draw, device=device) < LOTA_DENSITY
            for name, param in named_parameters(workload.model).items()
            if param.requires_grad
        }
    )
    metadata = Lota(LOTA_DENSITY).metadata
    phase = Sparse(Setup(workload.model, HYPER, workload.logits, metadata), mask)
    params = named_parameters(workload.model)
    parts = [(params[name].numel(), index.nnz) for name, index in mask.indices.items()]
    return _sparsely(workload, phase, parts, compact=True)


def _sparse(workload: Workload, *, compact: bool) -> Running:
    mask = workload.mask
    phase = Sparse(Setup(workload.model, HYPER, workload.logits, Talos(mask).metadata), mask)
    params = named_parameters(workload.model)
    parts = [
        (rows * params[name].shape[1], mask.indices[name].nnz)
        for name, rows in workload.rows.items()
    ]
    return _sparsely(workload, phase, parts, compact=compact)


def _sparsely(
    workload: Workload, phase: Sparse, parts: list[tuple[int, int]], *, compact: bool
) -> Running:
    mask = phase.optimizer.mask
    running = Running.of_phase(
        workload,
        phase,
        allowed=lambda: mask,
        bytes_moved=sparse_step(parts, mask.nbytes, compact=compact),
        index_bytes=mask.nbytes,
    )
    if not compact:  # the phase has seen to it else
        phase.optimizer.compact_gradients(False)
    return running


def _talos(workload: Workload) -> Running:
    return _sparse(workload, compact=True)


def _dense_gradients(workload: Workload) -> Running:
    return _sparse(workload, compact=False)


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


FORMS: Sequence[Form] = (
    Form(BASELINE, "non-linear", _nonlinear),
    Form("linearized", "linearized", _linearized),
    Form("l_lora", "L-LoRA", _l_lora),
    Form("lota", "LoTA, second phase", _lota),
    Form(OURS, "TaLoS", _talos),
    Form("talos_dense_gradients", "TaLoS, dense gradients", _dense_gradients),
    Form("masked_adamw", "frozen, masked, fused AdamW", _masked),
)
"""All that needs nothing but torch; LoTA's first phase costs what non-linear fine-tuning does."""

COMPILED: Sequence[Form] = (
    Form("nonlinear_compiled", "non-linear, compiled", lambda w: _compiled(_nonlinear(w))),
    Form("talos_compiled", "TaLoS, compiled", lambda w: _compiled(_talos(w))),
)
"""The same code by torch.compile, which takes minutes on a CPU before the first iteration."""
