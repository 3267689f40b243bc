"""Which weights are candidates, from which a mask chooses: presets and regular expressions.

- `"maskable"`, the set of the paper (arXiv 2504.02620): `nn.Linear` and Conv1D of transformers, the
  projections of `nn.MultiheadAttention`, `nn.Conv2d` (the patch embedding of a vision transformer),
  LayerNorm and RMSNorm, stacked experts of a mixture; biases included. Not the head, not embeddings
  of any kind, nothing tied to an embedding.
- `"qk"`, the projections to queries and keys (`q_proj`, `query`, `k`, ...); of fused projections
  (`in_proj_weight`, `qkv`) the rows `[0, 2E)`. GPT-2's `c_attn`, which stores them in columns, is
  refused. So is a fused layer whose rows are not known to be thirds (`query_key_value`).
- `"attention"`, the projections to queries, keys and values and the output projection, whole and
  with their biases (Jin 2025, arXiv 2407.07089); see `talos.architecture.attention`.
- Anything else is a regular expression, tried with `re.search` on each name. What it matches is
  taken, heads and embeddings too.

A head is what `get_output_embeddings()` (transformers) or `get_classifier()` (timm) returns. So is
a module at the top of the model that is called head, heads, classifier, pre_classifier, lm_head,
score, fc, visual_projection or text_projection. The top is the model, or the single module in it.
"""

import difflib
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talos.architecture.attention import Projection, attention_projections, projections
from talos.architecture.computed import computed_weights
from talos.architecture.experts import expert_weights
from talos.architecture.layers import PACKED, SPLIT, is_linear, is_norm, roles_of
from talos.errors import TalosTypeError, TalosValueError
from talos.names import check_module, named_modules, named_parameters, unwrapped
from talos.tensors import check_separate, place

__all__ = [
    "Candidate",
    "Candidates",
    "body",
    "check_one_memory",
    "own_parameters",
    "select_attention",
    "select_parameters",
]

Rows = tuple[int, int]
Modules = dict[str, nn.Module]
Taken = Iterator[tuple[nn.Parameter, Rows | None]]

_logger = logging.getLogger(__name__)

_HEADS = (
    *("head", "heads", "classifier", "pre_classifier", "lm_head", "score", "fc"),
    *("visual_projection", "text_projection"),  # CLIP's last layer, a bare parameter in open_clip
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A parameter that may be selected.

    Attributes:
        param: the parameter.
        rows: the half-open range of its rows (dimension 0) that may be selected; None for all.
    """

    param: nn.Parameter
    rows: Rows | None = None

    @property
    def numel(self) -> int:
        """The number of entries that may be selected."""
        if self.rows is None:
            return self.param.numel()
        return (self.rows[1] - self.rows[0]) * (self.param.numel() // max(len(self.param), 1))


class Candidates(dict[str, Candidate]):
    """The candidates by name, in the order of the model.

    Attributes:
        passed_over: how many parameters matched but have requires_grad=False.
    """

    passed_over: int = 0

    @property
    def rows(self) -> dict[str, Rows]:
        """The row ranges of the candidates of which only a part may be selected."""
        return {name: each.rows for name, each in self.items() if each.rows is not None}


def select_parameters(model: nn.Module, params: str = "maskable") -> Candidates:
    """Return the parameters that may be scored and selected.

    Parameters with requires_grad=False are passed over: so a user freezes a part of the model.
    Their number is in the result's `passed_over` and in the log (level INFO).

    Args:
        model: any module, wrapped or not.
        params: "maskable", "qk", "attention" or a regular expression over names; see this module's
            docstring.

    Returns:
        The candidates by name, tied ones once, in the order of the model.

    Raises:
        TalosValueError: nothing matches, or every match has requires_grad=False; another parameter
            shares memory with a candidate; "qk" meets a fused projection whose queries and keys are
            columns or cannot be separated; "attention" meets an attention module that is known only
            in part; a weight is computed from others (torch's parametrizations).
        TalosTypeError: `model` is no module, `params` no text; a candidate is not real floating
            point, or holds no values (meta).

    Example:
        >>> import torch, talos.params
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> candidates = talos.params.select_parameters(block, "qk")
        >>> {name: each.rows for name, each in candidates.items()}
        {'self_attn.in_proj_weight': (0, 16), 'self_attn.in_proj_bias': (0, 16)}
    """
    check_module(model)
    _check_params(params)
    preset = params in _PRESETS
    modules = body(model) if preset else dict(named_modules(model))
    _check_computed(modules, params)
    named = named_parameters(model)
    if preset:
        taken = _preset(model, modules, params)
    else:
        taken = {place(param): None for name, param in named.items() if re.search(params, name)}
    candidates = Candidates()
    for name, param in named.items():
        if place(param) not in taken:
            continue
        if param.requires_grad:
            _check_tensor(name, param)
            candidates[name] = Candidate(param, taken[place(param)])
        else:
            candidates.passed_over += 1
    if not taken:
        nearest = list(named)[:3] if preset else difflib.get_close_matches(params, named, 3, 0.0)
        raise TalosValueError(
            f"params must match a parameter of {type(unwrapped(model)).__name__}, got {params!r}; "
            + ("give a regular expression, its first" if preset else "its nearest")
            + f" names are {', '.join(nearest) or 'none, it has no parameters'}"
        )
    if not candidates:
        raise TalosValueError(
            f"params must match a parameter with requires_grad=True, got {params!r}, which matches "
            f"{candidates.passed_over} frozen ones; call requires_grad_() on those to be selected"
        )
    every = named_parameters(model, remove_duplicate=False)
    check_one_memory(every, {name: each.param for name, each in candidates.items()})
    if candidates.passed_over:
        _logger.info(
            "%d of %d parameters matched by params=%r have requires_grad=False and are passed over",
            candidates.passed_over,
            candidates.passed_over + len(candidates),
            params,
        )
    return candidates


def select_attention(model: nn.Module) -> dict[str, Projection]:
    """Return the candidates of the preset "attention" as projections, by name.

    Raises:
        TalosValueError: as `select_parameters`.
        TalosTypeError: as `select_parameters`.

    Example:
        >>> chosen = select_attention(nn.TransformerEncoderLayer(8, 2, 16))
        >>> chosen["self_attn.out_proj.weight"].roles
        ('output',)
    """
    candidates = select_parameters(model, "attention")
    found: dict[Hashable, Projection] = {}
    for each in attention_projections(body(model).items()):
        found.setdefault(place(each.param), each)
    return {name: found[place(each.param)] for name, each in candidates.items()}


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that modules made of modules hold themselves, without heads.

    Layers hold their weights and are made of nothing. What else a model holds is a class embedding,
    a positional embedding, a projection. Only parameters that require a gradient are returned.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.positions = nn.Parameter(torch.zeros(3))
        ...         self.layer = nn.Linear(3, 2)
        >>> list(own_parameters(Model()))
        ['positions']
    """
    heads = {place(param) for head in _heads(model) for param in head.parameters()}
    holders = {
        place(param)
        for _, module in named_modules(model)
        if next(module.children(), None) is not None
        and not isinstance(module, nn.MultiheadAttention)
        for param in module.parameters(recurse=False)
    }
    return {
        name: param
        for name, param in named_parameters(model).items()
        if place(param) in holders and place(param) not in heads and param.requires_grad
    }


def body(model: nn.Module) -> Modules:
    """Return the modules of a model by name, without those of its heads."""
    heads = {id(module) for head in _heads(model) for module in head.modules()}
    return {name: module for name, module in named_modules(model) if id(module) not in heads}


def check_one_memory(every: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> None:
    """Refuse parameters whose gradient is not the whole gradient of their memory.

    Args:
        every: the model's parameters, by all of their names.
        chosen: what is scored or trained, by name.

    Raises:
        TalosValueError: another parameter is the same memory or shares a part of it: autograd
            gives each of the two the gradient of its own uses only.
    """
    places = {place(param): name for name, param in chosen.items()}
    for name, param in every.items():
        own = places.get(place(param))
        if own is not None and chosen[own] is not param:
            raise TalosValueError(
                f"model must hold tied weights as one parameter, got {own} and {name}, two "
                "parameters of one memory, each with the gradient of its own uses; assign the one "
                "to the module of the other"
            )
    check_separate({**every, **chosen}, "parameters of the model", chosen)


def _maskable(modules: Modules) -> Taken:
    """Yield what the preset "maskable" takes."""
    for module in modules.values():
        whole = _is_known(module)
        for name, param in module.named_parameters(recurse=False):
            if whole or name in (*PACKED, *SPLIT):
                yield param, None
        for param in expert_weights(module):
            yield param, None


def _is_known(module: nn.Module) -> bool:
    """Return whether all parameters of a layer are "maskable"."""
    return is_linear(module) or isinstance(module, nn.Conv2d) or is_norm(module)


def _qk(modules: Modules) -> Taken:
    """Yield what the preset "qk" takes."""
    for path, module in modules.items():
        for each in projections(path, module, modules.get(path.rpartition(".")[0])):
            parts = sum(role in ("query", "key") for role in each.roles)  # they come first
            if each.roles == ("fused",) or (parts and each.transposed):
                if each.param.requires_grad:
                    _refuse_qk(path, each)
            elif parts:
                rows = parts * len(each.param) // len(each.roles)
                yield each.param, None if parts == len(each.roles) else (0, rows)


def _refuse_qk(path: str, found: Projection) -> None:
    shape, leaf = list(found.param.shape), path.rpartition(".")[2]
    if found.transposed:
        why = f"{path}, a transformers.Conv1D, which stores them in columns"
    else:
        why = f"{path} of shape {shape}, whose rows are not known to be thirds"
    raise TalosValueError(
        f"params='qk' cannot select queries and keys in {why}; use params='maskable', or take all "
        f"of it with params={leaf!r}"
    )


def _attention(modules: Modules) -> Taken:
    """Yield what the preset "attention" takes."""
    for each in attention_projections(modules.items()):
        yield each.param, None


_PRESETS: dict[str, Callable[[Modules], Taken]] = {
    "maskable": _maskable,
    "qk": _qk,
    "attention": _attention,
}


def _preset(model: nn.Module, modules: Modules, preset: str) -> dict[Hashable, Rows | None]:
    """Return the row ranges of what a preset takes of a body, by place in memory."""
    inside = set(map(id, modules.values()))
    outside = [module for module in model.modules() if id(module) not in inside]  # heads, wrappers
    left_out = {place(p) for module in outside for p in module.parameters(recurse=False)}
    for module in modules.values():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            left_out.update(map(place, module.parameters()))
    taken: dict[Hashable, Rows | None] = {}
    for param, rows in _PRESETS[preset](modules):
        taken.setdefault(place(param), rows)
    return {key: rows for key, rows in taken.items() if key not in left_out}


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the heads of a model; the module's docstring defines them."""
    for _, module in named_modules(model):
        for getter in ("get_output_embeddings", "get_classifier"):
            try:
                head = getattr(module, getter, lambda: None)()
            except (AttributeError, NotImplementedError):  # a backbone without a head
                continue
            found = head if isinstance(head, tuple | list) else [head]
            yield from (each for each in found if isinstance(each, nn.Module))
    top = unwrapped(model)
    while True:
        children = dict(top.named_children())
        yield from (child for name, child in children.items() if name in _HEADS)
        if len(children) != 1:
            return
        top = unwrapped(next(iter(children.values())))


def _check_params(params: object) -> None:
    """Refuse what is no regular expression."""
    if not isinstance(params, str):
        raise TalosTypeError(
            f"params must be a str, got {type(params).__name__}; join names by '|' to a regular "
            "expression"
        )
    try:
        re.compile(params)
    except re.error as error:
        raise TalosValueError(
            f"params must be one of {', '.join(map(repr, _PRESETS))} or a regular expression, "
            f"got {params!r} ({error}); escape its special characters"
        ) from error


def _check_computed(modules: Modules, params: str) -> None:
    """Refuse computed weights that would be taken if they were parameters."""
    for path, module in modules.items():
        for each in computed_weights(module):
            if not any(param.requires_grad for param in each.sources.values()):
                continue
            inside = f"{path}." if path else ""
            names = [inside + name for name in (each.name, *each.sources)]
            if params not in _PRESETS:
                meant = any(re.search(params, name) for name in names)
            elif params == "maskable":
                meant = _is_known(module) or each.name in (*PACKED, *SPLIT)
            else:
                roles = roles_of(path if is_linear(module) else each.name)
                meant = bool({"query", "key", "fused"} & set(roles)) or (
                    params == "attention" and bool(roles)
                )
            if meant:
                raise TalosValueError(
                    f"params={params!r} must find weights that are parameters, got {names[0]}, "
                    f"computed by {each.kind} from {', '.join(names[1:])}; make it a parameter "
                    f"with {each.remedy}, freeze these to leave it out (requires_grad_(False)), or "
                    "name others by a regular expression"
                )


def _check_tensor(name: str, param: nn.Parameter) -> None:
    """Refuse a candidate that cannot be scored."""
    if isinstance(param, nn.parameter.UninitializedParameter) or param.is_meta:
        raise TalosTypeError(
            f"params must select tensors that hold values, got {name} without any; "
            "materialise it (`to_empty` and load, or one forward for lazy modules) first"
        )
    if param.dtype not in _DTYPES:
        raise TalosTypeError(
            f"params must select real floating-point tensors, got {name} of dtype {param.dtype}; "
            "name the others by a regular expression: params="
        )
