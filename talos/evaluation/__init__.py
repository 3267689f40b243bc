"""What is measured of an edit: figures with intervals, and how tasks get on with each other.

| function | measures |
|---|---|
| `addition` | one model for all tasks: absolute and normalised figure |
| `negation` | forgetting one task, with a control |
| `interference` | each task's vector on every other task |
| `disentanglement` | whether vectors act on their own tasks only |

Each takes an `Outcomes`: a model with judges, which evaluates nothing twice.
"""

from talos.evaluation.addition import Addition, AdditionPoint, addition
from talos.evaluation.coefficients import scaling_coefs
from talos.evaluation.disentanglement import disentanglement
from talos.evaluation.interference import interference
from talos.evaluation.intervals import Bootstrap, Estimate
from talos.evaluation.judging import (
    ACCURACY,
    Judge,
    Metric,
    Models,
    ask,
    evaluation_mode,
    losses,
    predictions,
    right_answers,
)
from talos.evaluation.negation import Negation, NegationPoint, negation
from talos.evaluation.outcomes import Outcomes

__all__ = [
    "ACCURACY",
    "Addition",
    "AdditionPoint",
    "Bootstrap",
    "Estimate",
    "Judge",
    "Metric",
    "Models",
    "Negation",
    "NegationPoint",
    "Outcomes",
    "addition",
    "ask",
    "disentanglement",
    "evaluation_mode",
    "interference",
    "losses",
    "negation",
    "predictions",
    "right_answers",
    "scaling_coefs",
]
