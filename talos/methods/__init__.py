"""Methods of fine-tuning: one file each, one interface, run by `talos.fine_tune`.

| method | trains |
|---|---|
| `talos` | the entries that a mask selects (arXiv 2504.02620) |
| `nonlinear` | every weight (arXiv 2212.04089) |
| `linearized` | every weight, on the model's first-order expansion (arXiv 2305.12827) |
| `l_lora` | linearized low-rank adapters on queries and values (arXiv 2310.04742) |
| `lota` | the entries that full fine-tuning moved most, from the start (arXiv 2406.16797) |
| `attention_only` | the projections of attention (arXiv 2407.07089) |
| `random`, `magnitude` | as many entries as TaLoS, drawn or by size: controls |
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.methods.attention_only import AttentionOnly
from talos.methods.base import Hyperparameters, LogitsFunction, Method, Phase
from talos.methods.controls import Magnitude, Random
from talos.methods.l_lora import LLora
from talos.methods.linearized import Linearized, LinearizedModel
from talos.methods.lota import Lota
from talos.methods.nonlinear import Nonlinear
from talos.methods.talos import Talos

__all__ = [
    "METHODS",
    "AttentionOnly",
    "Hyperparameters",
    "LLora",
    "Linearized",
    "LinearizedModel",
    "LogitsFunction",
    "Lota",
    "Magnitude",
    "Method",
    "Nonlinear",
    "Phase",
    "Random",
    "Talos",
    "method_of",
]

METHODS: dict[str, type[Method]] = {
    each.name: each
    for each in (Talos, Nonlinear, Linearized, LLora, Lota, AttentionOnly, Random, Magnitude)
}
"""Every method by its name."""


def method_of(
    method: Method | str | None,
    mask: Mask | None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Method:
    """Return the method that a caller named.

    Args:
        method: one with its settings, the name of one with its defaults, or None: talos with a
            mask, nonlinear without.
        mask: the entries that talos trains; other methods take none.
        settings: by name; they replace those that the method has.

    Raises:
        TalosValueError: the name is unknown, or a mask is missing or not wanted.
        TalosTypeError: `method` is something else.

    Example:
        >>> method_of("l_lora", None)
        LLora(rank=16, lora_alpha=16.0, seed=0)
        >>> method_of("lota", None, {"rank": 8, "density": 0.2})
        Lota(density=0.2, sparse_lr=None)
    """
    if method is None:
        method = "nonlinear" if mask is None else "talos"
    if isinstance(method, str):
        if method not in METHODS:
            raise TalosValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == Talos.name:
            if mask is None:
                raise TalosValueError(
                    "mask must be given for the method talos, got none; find one with "
                    "talos.calibrate"
                )
            return Talos(mask)  # it has no other setting
        method = METHODS[method]()
    if not isinstance(method, Method):
        raise TalosTypeError(f"method must be a name or a Method, got {type(method).__name__}")
    if mask is not None and isinstance(method, Talos):
        raise TalosValueError(
            "mask must be left out with method=Talos(mask), which has one, got another; pass mask "
            "alone"
        )
    if mask is not None:
        raise TalosValueError(
            f"mask must be left out with the method {method.name}, got one; only talos takes a mask"
        )
    own = {field.name for field in fields(method)}
    return replace(method, **{key: value for key, value in settings.items() if key in own})
