"""What is measured of an edit: figures with intervals, and how tasks get on with each other.

| function | measures |
|---|---|
| `addition` | one model for all tasks: absolute and normalised figure |
| `negation` | forgetting one task, with a control |
| `interference` | each task's vector on every other task |
| `disentanglement` | whether vectors act on their own tasks only |
| `linearity` | the tuned model beside its first-order expansion |
| `sensitivity_transfer` | pruning one task's least sensitive entries, on every task |

Each takes an `Outcomes`: a model with judges, which evaluates nothing twice. Three others need no
judge: `localization` bounds the first-order change of the predictions, `GradientDrift` watches a
training, `mask_similarity` compares masks.
"""

from talos.evaluation.addition import Addition, AdditionPoint, addition
from talos.evaluation.coefficients import scaling_coefs
from talos.evaluation.disentanglement import disentanglement
from talos.evaluation.drift import DriftPoint, GradientDrift
from talos.evaluation.interference import interference
from talos.evaluation.intervals import Bootstrap, Estimate
from talos.evaluation.judging import (
    ACCURACY,
    Judge,
    Metric,
    Models,
    ask,
    losses,
    predictions,
    right_answers,
)
from talos.evaluation.linearity import Linearity, linearity
from talos.evaluation.localization import Localization, localization
from talos.evaluation.negation import Negation, NegationPoint, negation
from talos.evaluation.outcomes import Outcomes
from talos.evaluation.sensitivity import sensitivity_transfer
from talos.evaluation.similarity import MaskSimilarity, mask_similarity

__all__ = [
    "ACCURACY",
    "Addition",
    "AdditionPoint",
    "Bootstrap",
    "DriftPoint",
    "Estimate",
    "GradientDrift",
    "Judge",
    "Linearity",
    "Localization",
    "MaskSimilarity",
    "Metric",
    "Models",
    "Negation",
    "NegationPoint",
    "Outcomes",
    "addition",
    "ask",
    "disentanglement",
    "interference",
    "linearity",
    "localization",
    "losses",
    "mask_similarity",
    "negation",
    "predictions",
    "right_answers",
    "scaling_coefs",
    "sensitivity_transfer",
]
