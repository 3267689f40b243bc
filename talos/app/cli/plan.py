"""A dry run of a calibration: what it would score, and the memory of that."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from talos.app.cli.console import table
from talos.architecture.layers import KINDS, is_norm, kind_of, layer_of
from talos.batches import evaluation_mode
from talos.names import named_modules, named_parameters
from talos.params import select_parameters

__all__ = ["Share", "activation_bytes", "shares", "shares_table"]

SCORED, FROZEN, LEFT_OUT = "scored", "frozen", "left out"


@dataclass(frozen=True)
class Share:
    """A parameter, or a part of its rows, and whether it is scored.

    Attributes:
        name: the parameter's name.
        numel: number of entries.
        nbytes: bytes of the entries.
        fate: "scored", "frozen" or "left out".
        reason: why it is not scored.
    """

    name: str
    numel: int
    nbytes: int
    fate: str
    reason: str = ""


def shares(model: nn.Module, params: str) -> list[Share]:
    """List for each parameter whether it would be scored, or why not.

    Args:
        model: the model.
        params: as `talos.calibrate` takes it.

    Returns:
        A share per parameter, in the model's order; two where a part of the rows is scored.

    Raises:
        TalosValueError: nothing would be scored.
        TalosTypeError: the chosen parameters cannot be scored.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))
        >>> [(each.name, each.fate, each.reason) for each in shares(model, "maskable")][:2]
        [('0.weight', 'left out', 'embedding'), ('1.weight', 'scored', '')]
    """
    selection = select_parameters(model, params)
    uses: dict[int, list[nn.Module]] = {}
    for _, module in named_modules(model):
        for param in module.parameters(recurse=False):
            uses.setdefault(id(param), []).append(module)
    found = []
    for name, param in named_parameters(model).items():
        numel, size = param.numel(), param.element_size()
        if name in selection:
            scored = selection[name].numel
            found.append(Share(name, scored, scored * size, SCORED))
            numel -= scored
            reason = "rows of values"
        elif not param.requires_grad:
            found.append(Share(name, numel, numel * size, FROZEN, "no command trains it"))
            numel = 0
        else:
            reason = _reason(name, uses[id(param)], params)
        if numel:
            found.append(Share(name, numel, numel * size, LEFT_OUT, reason))
    return found


def shares_table(found: list[Share], *, layers: bool) -> Table:
    """Return a table of a row for each fate, type and reason, and for each layer if asked."""
    left = ["", "layer", "type"] if layers else ["", "type"]
    shown = table(left, ["tensors", "entries"])
    shown.add_column("reason")
    for fate in (SCORED, FROZEN, LEFT_OUT):
        groups: dict[tuple[int, int, str], list[Share]] = {}
        for each in found:
            if each.fate == fate:
                layer = layer_of(each.name) if layers else None
                key = (-1 if layer is None else layer, KINDS.index(kind_of(each.name)), each.reason)
                groups.setdefault(key, []).append(each)
        for (layer, kind, reason), group in sorted(groups.items()):
            place = ["" if layer < 0 else str(layer)] if layers else []
            shown.add_row(fate, *place, KINDS[kind], *_sums(group), escape(reason))
        whole = [each for group in groups.values() for each in group]
        if whole:
            shown.add_row(fate, *([""] if layers else []), "total", *_sums(whole), style="bold")
    return shown


def activation_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Count the bytes that one forward pass of a batch keeps for its backward pass.

    Each memory counts once; parameters, buffers and inputs do not count.
    """
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with evaluation_mode(model), torch.enable_grad(), hooks:
        logits = model(batch)  # keeps the graph alive, so that no memory is used again
        total = sum(kept.values())
        del logits
    return total


def _reason(name: str, used_by: list[nn.Module], params: str) -> str:
    """Return why `params` does not choose a trainable parameter."""
    embedding = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in used_by)
    if embedding and len(used_by) > 1 and params in ("maskable", "qk", "attention"):
        return "tied to an embedding"
    if params == "qk":
        return "neither query nor key"
    if params == "attention":
        return "no projection of attention"
    if params != "maskable":
        return f"{params} does not match"
    if embedding or kind_of(name) == "embedding":
        return "embedding"
    layer = any(isinstance(module, nn.Linear | nn.Conv2d) or is_norm(module) for module in used_by)
    return "head" if layer else "no linear, patch or norm layer"


def _sums(group: list[Share]) -> tuple[str, str]:
    return f"{len(group):,}", f"{sum(each.numel for each in group):,}"
