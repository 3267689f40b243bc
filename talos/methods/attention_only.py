"""Attention only: AdamW over the projections to queries, keys and values and back.

What is trained is `talos.params`' preset "attention": those linear layers of the attention modules
with their biases; norms, MLPs, embeddings and heads are frozen.

Source: Jin et al. 2025, "Fine-tuning attention modules only: enhancing weight disentanglement in
task arithmetic", arXiv 2407.07089.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from talos.errors import TalosValueError
from talos.params import named_modules, select_parameters
from talos.projections import projections

from .base import Hyperparameters, LogitsFunction, Method, Phase
from .nonlinear import Dense

__all__ = ["AttentionOnly"]


@dataclass(frozen=True)
class AttentionOnly(Method):
    """All query, key, value and output projections, biases included.

    Example:
        >>> AttentionOnly().metadata
        {'method': 'attention_only'}
    """

    name = "attention_only"
    usual_lr = 5e-5

    def start(self, model: nn.Module, hyper: Hyperparameters, logits_fn: LogitsFunction) -> Phase:
        """See `Method.start`."""
        params = {name: each.param for name, each in select_parameters(model, "attention").items()}
        chosen = {id(param) for param in params.values()}
        roles = {
            role
            for path, module in named_modules(model)
            for each in projections(path, module)
            if id(each.param) in chosen
            for role in each.roles
        }
        if roles == {"output"}:
            raise TalosValueError(
                "model must have query, key and value projections beside its output projections, "
                "got none whose names are known; talos.projections lists those that are"
            )
        return Dense(model, params, hyper, logits_fn, self.metadata)
