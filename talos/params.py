"""Which weights may be selected: presets, regular expressions, row ranges, names without wrappers.

Three presets and any regular expression choose the tensors:

- `"maskable"`, the set of the paper (arXiv 2504.02620): `nn.Linear` and Conv1D of transformers, the
  projections of `nn.MultiheadAttention` (in_proj, out_proj, q/k/v_proj_weight), `nn.Conv2d` (in a
  vision transformer the patch embedding), LayerNorm and RMSNorm, the experts of a mixture that are
  stacked in one tensor, biases included. Not the head, not embeddings of any kind, nothing that is
  tied to an embedding.
- `"qk"`, the projections to queries and keys: `q_proj`/`k_proj`, `query`/`key`, `q`/`k` and their
  like, of fused projections (`in_proj_weight`, `qkv`, `Wqkv`) the rows `[0, 2E)`. The `c_attn` of
  GPT-2 has its queries and keys in columns and is refused, and so is a fused layer whose rows are
  not three times its inputs or not known to be thirds (`query_key_value`, `qkv_proj`).
- `"attention"`, the projections to queries, keys and values and the one behind the heads, biases
  included, every row and column of them (Jin 2025, arXiv 2407.07089).
  `talos.architecture.attention` says what is attention; a module that is known in part is refused.
- anything else is a regular expression, tried with `re.search` on each name; what it matches is
  taken as it is, heads and embeddings too.

A head is what `get_output_embeddings()` (transformers) or `get_classifier()` (timm) returns, and a
module called head, heads, classifier, pre_classifier, lm_head, score, fc, visual_projection or
text_projection at the top of the model. The top is the model, or what it holds where it holds a
single module.
"""

import difflib
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talos.architecture.attention import attention_projections
from talos.architecture.computed import computed_weights
from talos.architecture.experts import expert_weights
from talos.architecture.projections import (
    PACKED,
    SPLIT,
    Projection,
    is_linear,
    projections,
    roles_named,
)
from talos.errors import TalosTypeError, TalosValueError
from talos.names import named_modules, named_parameters, unwrapped
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
    """The selected parameters by name, in the order of the model.

    Attributes:
        passed_over: how many parameters were matched and left out because of requires_grad=False.
    """

    passed_over: int = 0

    @property
    def rows(self) -> dict[str, Rows]:
        """The row ranges of those parameters of which not every row may be selected."""
        return {name: each.rows for name, each in self.items() if each.rows is not None}


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient and that modules made of modules hold by themselves.

    Layers hold their weights and are made of nothing; what else a model has is a class embedding, a
    positional embedding, a projection. Heads are left out.

    Args:
        model: any module.

    Returns:
        Name and parameter.
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


def is_norm(module: nn.Module) -> bool:
    """LayerNorm and RMSNorm of torch, and the RMS norms that model libraries write themselves."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    vectors = all(param.dim() == 1 for param in module.parameters(recurse=False))
    return type(module).__name__.lower().endswith(("rmsnorm", "t5layernorm")) and vectors


def _is_known(module: nn.Module) -> bool:
    """Whether all parameters of a layer are "maskable"."""
    return is_linear(module) or isinstance(module, nn.Conv2d) or is_norm(module)


def _maskable(modules: Modules) -> Iterator[tuple[nn.Parameter, Rows | None]]:
    """What the preset "maskable" takes."""
    for module in modules.values():
        whole = _is_known(module)
        for name, param in module.named_parameters(recurse=False):
            if whole or name in PACKED or name in SPLIT:
                yield param, None
        for param in expert_weights(module):
            yield param, None


def _qk(modules: Modules) -> Iterator[tuple[nn.Parameter, Rows | None]]:
    """What the preset "qk" takes."""
    for path, module in modules.items():
        for each in projections(path, module, modules.get(path.rpartition(".")[0])):
            parts = sum(role in ("query", "key") for role in each.roles)  # the first
            if each.roles == ("fused",) or (parts and each.transposed):
                if each.param.requires_grad:
                    _refuse_qk(path, each)
            elif parts:
                rows = parts * len(each.param) // len(each.roles)
                yield each.param, None if parts == len(each.roles) else (0, rows)


def _refuse_qk(path: str, found: Projection) -> None:
    what = "a transformers.Conv1D, whose columns they are"
    if not found.transposed:
        what = f"of shape {list(found.param.shape)}, whose rows are not thirds of them and values"
    leaf = path.rpartition(".")[2]
    raise TalosValueError(
        f"params='qk' must find queries and keys in rows of a weight, got {path}, {what}; use "
        f"params='maskable', or take all of it with params={leaf!r}"
    )


def _attention(modules: Modules) -> Iterator[tuple[nn.Parameter, Rows | None]]:
    """What the preset "attention" takes."""
    for each in attention_projections(modules.items()):
        yield each.param, None


_PRESETS: dict[str, Callable[[Modules], Iterator[tuple[nn.Parameter, Rows | None]]]] = {
    "maskable": _maskable,
    "qk": _qk,
    "attention": _attention,
}


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The heads of the model; the module's docstring says what counts as one."""
    for _, module in named_modules(model):
        for getter in ("get_output_embeddings", "get_classifier"):
            try:
                head = getattr(module, getter, lambda: None)()
            except (AttributeError, NotImplementedError):  # a backbone that has no head says so
                continue
            candidates = head if isinstance(head, tuple | list) else [head]
            yield from (each for each in candidates if isinstance(each, nn.Module))
    top = unwrapped(model)
    while True:
        children = dict(top.named_children())
        yield from (child for name, child in children.items() if name in _HEADS)
        if len(children) != 1:
            return
        top = unwrapped(next(iter(children.values())))


def body(model: nn.Module) -> Modules:
    """The modules of the model by name, without those of its heads."""
    heads = {id(module) for head in _heads(model) for module in head.modules()}
    return {name: module for name, module in named_modules(model) if id(module) not in heads}


def _preset(model: nn.Module, modules: Modules, preset: str) -> dict[Hashable, Rows | None]:
    """The row ranges of the parameters that a preset takes of a body, by their places in memory."""
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


def _matching(named: dict[str, nn.Parameter], pattern: str) -> dict[Hashable, Rows | None]:
    """The parameters whose name a regular expression finds, by place, every row of each."""
    return {place(param): None for name, param in named.items() if re.search(pattern, name)}


def _check_pattern(params: str) -> None:
    try:
        re.compile(params)
    except re.error as error:
        raise TalosValueError(
            f"params must be one of {', '.join(map(repr, _PRESETS))} or a regular expression, "
            f"got {params!r} ({error}); escape its special characters"
        ) from error


def _check_computed(modules: Modules, params: str) -> None:
    """Refuse weights that would be taken if they were parameters."""
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
                leaf = path.rpartition(".")[2] if is_linear(module) else each.name
                roles = roles_named(leaf)
                wanted = ("query", "key") if params == "qk" else ("query", "key", "value", "output")
                meant = any(role in wanted for role in roles)
            if meant:
                raise TalosValueError(
                    f"params={params!r} must find weights that are parameters, got {names[0]}, "
                    f"computed by {each.kind} of {', '.join(names[1:])}; make it a parameter with "
                    f"{each.remedy}, freeze these to leave it out (requires_grad_(False)), or name "
                    "others by a regular expression"
                )


def _check_tensor(name: str, param: nn.Parameter) -> None:
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


def select_parameters(model: nn.Module, params: str = "maskable") -> Candidates:
    """Chooses the parameters that may be scored and selected.

    Parameters with requires_grad=False are passed over: that is how a user says that a part of the
    model is frozen. How many is in the result's `passed_over` and in the log (level INFO).

    Args:
        model: any module, wrapped or not.
        params: "maskable", "qk", "attention" or a regular expression over names; see this module's
            docstring.

    Returns:
        The chosen parameters by name, tied ones once, in the order of the model.

    Raises:
        TalosValueError: nothing matches, or all that does has requires_grad=False; another
            parameter shares memory with a chosen one; "qk" meets a fused projection whose queries
            and keys are columns, or not told apart; "attention" meets an attention module of which
            it knows a part; a weight is computed of others, as torch's parametrizations do.
        TalosTypeError: a chosen tensor is not real floating point, or holds no values (meta).

    Example:
        >>> import torch, talos.params
        >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> chosen = talos.params.select_parameters(block, "qk")
        >>> {name: each.rows for name, each in chosen.items()}
        {'self_attn.in_proj_weight': (0, 16), 'self_attn.in_proj_bias': (0, 16)}
    """
    if not isinstance(params, str):
        raise TalosTypeError(
            f"params must be a str, got {type(params).__name__}; join names by '|' to a regular "
            "expression"
        )
    _check_pattern(params)
    modules = body(model) if params in _PRESETS else dict(named_modules(model))
    _check_computed(modules, params)
    named = named_parameters(model)
    taken = _preset(model, modules, params) if params in _PRESETS else _matching(named, params)
    selection = Candidates()
    for name, param in named.items():
        if place(param) not in taken:
            continue
        if param.requires_grad:
            _check_tensor(name, param)
            selection[name] = Candidate(param, taken[place(param)])
        else:
            selection.passed_over += 1
    if not taken:
        preset = params in _PRESETS
        nearest = list(named)[:3] if preset else difflib.get_close_matches(params, named, 3, 0.0)
        raise TalosValueError(
            f"params must match a parameter of {type(unwrapped(model)).__name__}, got {params!r}; "
            + ("give a regular expression, its first" if preset else "its nearest")
            + f" names are {', '.join(nearest) or 'none, it has no parameters'}"
        )
    if not selection:
        raise TalosValueError(
            f"params must match a parameter with requires_grad=True, got {params!r}, which matches "
            f"{selection.passed_over} frozen ones; call requires_grad_() on those to be selected"
        )
    every = named_parameters(model, remove_duplicate=False)
    check_one_memory(every, {name: each.param for name, each in selection.items()})
    if selection.passed_over:
        _logger.info(
            "%d of %d parameters matched by params=%r have requires_grad=False and are passed over",
            selection.passed_over,
            selection.passed_over + len(selection),
            params,
        )
    return selection


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


def select_attention(model: nn.Module) -> dict[str, Projection]:
    """What the preset "attention" chooses, and what each of it projects to.

    Args:
        model: any module, wrapped or not.

    Returns:
        The chosen projections by the names of their parameters.

    Raises:
        TalosValueError: see `select_parameters`.
        TalosTypeError: see there.

    Example:
        >>> chosen = select_attention(nn.TransformerEncoderLayer(8, 2, 16))
        >>> chosen["self_attn.out_proj.weight"].roles
        ('output',)
    """
    chosen = select_parameters(model, "attention")
    found: dict[Hashable, Projection] = {}
    for each in attention_projections(body(model).items()):
        found.setdefault(place(each.param), each)
    return {name: found[place(each.param)] for name, each in chosen.items()}
