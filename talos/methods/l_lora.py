"""L-LoRA: low-rank adapters on queries and values, each layer in its first-order expansion.

    y = W x + (lora_alpha / r) (B0 A0 + B0 dA + dB A0) x,   A0 seeded and shared, B0 = 0

With B0 = 0 the term in dA vanishes: A stays A0, the same for all tasks, and the weights are linear
in B,

    W(B) = W + (lora_alpha / r) B A0,   grad_B = (lora_alpha / r) grad_W A0^T

So the model is trained as it is: after each step its own query and value weights are computed again
from W and B. A linear layer never makes grad_W = dYᵀX: its backward multiplies dYᵀ (X A0ᵀ), whose
right factor has r columns. Elsewhere (Conv1D of transformers, compiled code) the gradient of the
weight is projected and dropped as soon as autograd has made it.

Source: Tang et al. 2024, "Parameter-efficient multi-task model fusion with partial linearization",
arXiv 2310.04742.
"""

import hashlib
import math
import os
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from talos.architecture.attention import Projection
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods.base import Method, Phase, Setup, check_unsharded, untrained
from talos.methods.nonlinear import clip
from talos.names import named_parameters
from talos.optim.linear_backward import route, unroute
from talos.options import integer, positive, read_seed
from talos.params import select_attention
from talos.task_vectors import TaskVector
from talos.task_vectors.adapter_export import write_adapter
from talos.task_vectors.sums import is_sum

__all__ = ["LLora", "export_adapter", "first_factor"]

_ROLES = ("query", "value")


@dataclass(frozen=True)
class LLora(Method):
    """Adapters on every query and value projection; biases stay as they are.

    Attributes:
        rank: r.
        lora_alpha: the adapters are scaled by `lora_alpha / rank`.
        seed: of A0, which depends only on the seed and the weight's name.

    Example:
        >>> LLora(rank=8).metadata
        {'method': 'l_lora', 'rank': 8, 'lora_alpha': 16.0, 'method_seed': 0}
    """

    name = "l_lora"
    usual_lr = 1e-3
    rank: int = 16
    lora_alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a rank, a scale or a seed out of range."""
        self._store(
            rank=integer("rank", self.rank, 1),
            lora_alpha=positive("lora_alpha", self.lora_alpha),
            seed=read_seed(self.seed),
        )

    def _first_phase(self, setup: Setup) -> Phase:
        return _Adapted(self, setup)


def first_factor(name: str, role: str, shape: tuple[int, int], *, seed: int) -> Tensor:
    """Draw A0 of one projection as LoRA does: uniform, of variance 1 / (3 inputs).

    Args:
        name: the weight's name.
        role: query or value.
        shape: rank and inputs.
        seed: the method's.

    Returns:
        float32 [r, in] on the CPU.

    Example:
        >>> first_factor("attn.in_proj_weight", "value", (2, 8), seed=0).shape
        torch.Size([2, 8])
    """
    digest = hashlib.sha256(f"{seed} {name} {role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return nn.init.kaiming_uniform_(
        torch.empty(shape, dtype=torch.float32, device="cpu"), a=math.sqrt(5), generator=generator
    )


@torch.no_grad()
def export_adapter(
    vector: TaskVector,
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the vector of an L-LoRA training as a LoRA adapter that PEFT merges to the same change.

    A0 is drawn again from the seed in the vector's metadata, and B is the one for which
    (lora_alpha / r) B A0 is the vector. Sums of vectors with one seed and rank can be written, too.
    Of a fused weight, queries and values have r columns each.

    Args:
        vector: of the method l_lora, trained in float32 or float64.
        model: that was trained, for the places of queries and values; it stays as it is.
        folder: to make, with `adapter_config.json` and `adapter_model.safetensors`.
        base_model: name or path of the base, for PEFT's `base_model_name_or_path`.
        overwrite: replace an adapter that is there.

    Raises:
        TalosValueError: the vector is no product with A0: of another method or seed, trimmed, or
            rounded to 16 bits; or a weight is one that PEFT does not name (`in_proj_weight`).
        TalosOSError: the folder is there or holds other files, or cannot be written.

    Example:
        >>> import tempfile
        >>> layers = ("q_proj", "k_proj", "v_proj", "out_proj")
        >>> model = nn.ModuleDict({name: nn.Linear(4, 4) for name in layers})
        >>> a0 = first_factor("q_proj.weight", "query", (1, 4), seed=0)
        >>> mask = Mask.from_dense({"q_proj.weight": torch.ones(4, 4) > 0})
        >>> vector = TaskVector(mask, a0.expand(4, 4).flatten(), metadata=LLora(rank=1).metadata)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     export_adapter(vector, model, f"{place}/lora")
        ...     TaskVector.from_adapter(f"{place}/lora", model).allclose(vector)
        True
    """
    method = _method_of(vector)
    found: dict[str, list[_Adapter]] = {}
    for each in _adapters(method, model):
        found.setdefault(each.name, []).append(each)
    strangers = [n for n in vector.mask.names if n not in found or not n.endswith(".weight")]
    if strangers:
        raise TalosValueError(
            "vector must change only weights of query and value layers, got "
            f"{', '.join(strangers[:5])}; pass the model that was trained, whose projections are "
            "linear layers"
        )
    scale, ranks = method.lora_alpha / method.rank, {}
    tensors: dict[str, Tensor] = {}
    for name in vector.mask.names:
        a, b = _factors(vector.to_dense(name), found[name], scale)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        ranks[module] = len(a)
    most = max(ranks.values())
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": scale * most,
        "rank_pattern": others,
        "alpha_pattern": {module: scale * rank for module, rank in others.items()},
        "fan_in_fan_out": any(each.transposed for own in found.values() for each in own),
        "target_modules": sorted(ranks),
        "base_model_name_or_path": base_model,
    }
    write_adapter(folder, tensors, config, overwrite=overwrite)


def _method_of(vector: TaskVector) -> LLora:
    """Return the method that trained a vector, or all vectors of a sum."""
    made = vector.metadata
    sources = [part["of"] for part in made["sum"]] if is_sum(made) else [made]
    settings = {(of.get("method"), of.get("rank"), of.get("method_seed")) for of in sources}
    if len(settings) != 1 or sources[0].get("method") != LLora.name:
        raise TalosValueError(
            "vector must come from l_lora with one rank and one seed, got "
            f"{', '.join(sorted(map(str, settings)))}; export a patch or a checkpoint"
        )
    own = sources[0]
    return LLora(rank=own["rank"], lora_alpha=own["lora_alpha"], seed=own["method_seed"])


def _factors(delta: Tensor, adapters: list["_Adapter"], scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B of one weight: float32, [roles r, in] and [out, roles r]."""
    rank, roles = len(adapters[0].a0), len(adapters)
    outputs = delta.shape[1] if adapters[0].transposed else len(delta)
    b = torch.zeros(outputs, roles * rank, dtype=torch.float64, device="cpu")
    for number, each in enumerate(adapters):
        a0, own = each.a0.cpu().double(), each.part(delta).double()
        solved = own @ torch.linalg.pinv(a0) / scale
        if (own - scale * solved @ a0).abs().max() > 1e-2 * own.abs().max():
            raise TalosValueError(
                f"vector must be a product with the A0 of its seed, got another change of "
                f"{each.name}; export it whole, and train in float32"
            )
        columns = slice(number * rank, (number + 1) * rank)
        each.rows(b)[:, columns] = solved
    return torch.cat([each.a0.cpu().float() for each in adapters]), b.float()


class _Adapter:
    """One query or value projection, which may be a part of a parameter."""

    def __init__(self, method: LLora, name: str, projection: Projection, role: str) -> None:
        self.name, self.param = name, projection.param
        self._projection, self.role = projection, role
        self.transposed = projection.transposed
        weight = self.part(self.param.detach())
        a0 = first_factor(name, role, (method.rank, weight.shape[1]), seed=method.seed)
        # At least float32, so that the weights of a step are rounded once, from W and B.
        self.a0 = a0.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self.b = nn.Parameter(self.a0.new_zeros(weight.shape[0], method.rank))
        self.scale = method.lora_alpha / method.rank

    def part(self, tensor: Tensor) -> Tensor:
        """Return the adapted entries of a tensor, [out, in], a view."""
        return self._projection.part(tensor, self.role)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the adapted rows of a tensor [out, ...] of the whole weight, a view."""
        roles = self._projection.roles
        return tensor.chunk(len(roles))[roles.index(self.role)]

    def add_gradient(self, dy: Tensor, x: Tensor | None = None) -> None:
        """Add to B's gradient.

        Args:
            dy: the gradient of the layer's output, transposed: [out, tokens]; without `x` the
                gradient of the whole weight.
            x: the layer's input, [tokens, in].
        """
        with torch.autocast(dy.device.type, enabled=False):  # a backward may be called inside one
            inner = self.a0.T if x is None else x.to(self.a0) @ self.a0.T
            grad = (self.part(dy).to(self.a0) @ inner).mul_(self.scale)
        self.b.grad = grad if self.b.grad is None else self.b.grad.add_(grad)

    def write(self, base: Tensor) -> None:
        """Compute the weight from the base and B."""
        weight = self.part(base).to(self.a0) + self.scale * self.b @ self.a0
        self.part(self.param).copy_(weight)


class _Weight:
    """A weight whose gradient goes to its adapters: a `talos.optim.linear_backward.Receiver`."""

    def __init__(self, adapters: list[_Adapter]) -> None:
        self.param: Tensor = adapters[0].param
        self.adapters, self.active = adapters, True

    def multiply(self, dy: Tensor, x: Tensor) -> None:
        """Take the two factors of the gradient dyᵀ x."""
        for each in self.adapters:
            each.add_gradient(dy.t(), x)

    @torch.no_grad()
    def project(self, _: Tensor | None = None) -> None:
        """Take and drop the dense gradient, if there is one; also a hook of autograd."""
        if self.param.grad is not None:
            for each in self.adapters:
                each.add_gradient(self.param.grad)
            self.param.grad = None


class _Adapted(Phase):
    """Trains B of all adapters."""

    def __init__(self, method: LLora, setup: Setup) -> None:
        super().__init__(setup)
        check_unsharded(named_parameters(setup.model), method.name)
        self._adapters = _adapters(method, setup.model)
        self.params = {each.name: each.param for each in self._adapters}
        self._weights = [
            _Weight([each for each in self._adapters if each.name == name]) for name in self.params
        ]
        self._stop: Callable[[], object] = lambda: None
        self.base = {name: param.detach().clone() for name, param in self.params.items()}
        self.optimizer = torch.optim.AdamW([each.b for each in self._adapters], **setup.hyper)
        self.trained = {f"{each.name}/{each.role}": each.b for each in self._adapters}
        self.others = untrained(setup.model, self.params.values())

    def freeze(self) -> None:
        """Turn gradients off where nothing is trained, and send those of the weights to B."""
        super().freeze()
        for each in self._weights:
            each.active = True
        hooks = [
            each.param.register_post_accumulate_grad_hook(each.project) for each in self._weights
        ]
        route([each for each in self._weights if not each.adapters[0].transposed])
        stop = weakref.finalize(self, _give_back, self._weights, hooks)  # without `release`
        stop.atexit = False
        self._stop = stop

    def release(self) -> None:
        """Turn gradients on again, and leave them in the weights."""
        super().release()
        self._stop()

    def zero_grad(self) -> None:
        """Drop the gradients of B and of the weights."""
        super().zero_grad()
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """See `Phase.clip`: the norm is that of B's gradient."""
        for each in self._weights:
            each.project()
        return clip([each.b for each in self._adapters], max_norm)

    @torch.no_grad()
    def step(self) -> None:
        """Change B, then the weights."""
        for each in self._weights:
            each.project()
        self.optimizer.step()
        self._write()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Phase.load`."""
        super().load(state)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Compute the weights from the base and B."""
        for adapter in self._adapters:
            adapter.write(self.base[adapter.name])

    def task_vector(self) -> TaskVector:
        """See `Phase.task_vector`; of fused weights it holds only the query and value rows."""
        dense = {name: torch.zeros(param.shape, dtype=torch.bool, device="cpu")
                 for name, param in self.params.items()}  # fmt: skip
        for each in self._adapters:
            each.part(dense[each.name]).fill_(True)
        mask = Mask.from_dense(dense)
        return TaskVector.from_models(self.base, self.params, mask, metadata=self.metadata)


def _give_back(weights: list[_Weight], hooks: list[RemovableHandle]) -> None:
    """Undo `_Adapted.freeze`."""
    unroute(weights)
    for hook in hooks:
        hook.remove()


def _adapters(method: LLora, model: nn.Module) -> list[_Adapter]:
    """Return an adapter for each query and value projection that requires a gradient."""
    found = []
    for name, each in select_attention(model).items():
        if each.param.dim() != 2:
            continue
        if "fused" in each.roles:
            raise TalosValueError(
                f"{name} must hold queries, keys and values in thirds of its rows for the method "
                f"l_lora, got {list(each.param.shape)}; freeze it to leave it out"
            )
        found += [_Adapter(method, name, each, role) for role in _ROLES if role in each.roles]
    if not found:
        raise TalosValueError(
            "model must have query or value projections that require a gradient, got none whose "
            "names are known; talos.architecture.layers lists them"
        )
    return found
