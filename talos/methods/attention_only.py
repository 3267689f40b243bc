"""Attention only: AdamW over the preset "attention" of `talos.params`.

Norms, MLPs, embeddings and heads are frozen.

Source: Jin et al. 2025, "Fine-tuning attention modules only: enhancing weight disentanglement in
task arithmetic", arXiv 2407.07089.
"""

from dataclasses import dataclass

from talos.methods.base import Method, Phase, Setup
from talos.methods.nonlinear import Dense
from talos.params import select_parameters

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

    def _first_phase(self, setup: Setup) -> Phase:
        params = {
            name: each.param for name, each in select_parameters(setup.model, "attention").items()
        }
        return Dense(setup, params)
