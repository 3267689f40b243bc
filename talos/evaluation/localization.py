"""Localization: how much an edit can change the predictions on data that it is not meant for.

With g(x, y) the gradient of log p(y|x) at the base theta_0, an edit tau changes log p(y|x) by
tau . g(x, y) in first order. Its root mean square over x in the data and y ~ p(.|x) is

    change^2 = E_x E_y [ (tau . g(x, y))^2 ] = E_x Var_{y ~ p} [ (J(x) tau)_y ]

with J the derivative of the logits; to second order it is twice the KL divergence from the base's
predictions to the edited ones. Let F_j = E_x E_y [ g_j(x, y)^2 ] be the sensitivity of entry j on
that data (the score of `talos.fisher_diag` over its samples), k the number of entries of tau, t
the largest F_j among them and mu the largest |tau_j|. Then

    change <= sum_j |tau_j| sqrt(F_j)       (1) the triangle inequality of the root mean square
           <= ||tau||_2 sqrt(k t)           (2) Cauchy and Schwarz, F_j <= t
           <= k mu sqrt(t) <= k^2 mu eta    (3) the form of the paper, with eta = sqrt(t)

The bounds hold for F of the same data and of the exact expectation over y. A mask of the least
sensitive entries has the smallest t of all masks of k entries.

The paper's equation 9 bounds |tau . grad f| of one output by k^2 mu eta. Its factor k^2 comes from
the product of two sums over k entries; by Hoelder's inequality one k is enough, as in (3).

Source: Iurada et al. 2025, arXiv 2504.02620, section 4.3, equations 6 and 9.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from talos.batches import default_logits
from talos.calibration.fisher import FisherScores, evaluating
from talos.errors import TalosTypeError, TalosValueError
from talos.methods import LogitsFunction
from talos.methods.linearized import first_order
from talos.names import match_tensors
from talos.task_vectors import TaskVector
from talos.task_vectors.editing import check_base, check_scale, touched_weights
from talos.task_vectors.fingerprints import base_fingerprints
from talos.task_vectors.sums import slices_of
from talos.tensors import place

__all__ = ["Localization", "localization"]


@dataclass(frozen=True)
class Localization:
    """The first-order change of log-probabilities on some data, and what bounds it.

    Attributes:
        change: root mean square of tau . grad log p(y|x), measured.
        bound: sum of |tau_j| sqrt(F_j), bound (1).
        uniform: ||tau|| sqrt(k t), bound (2): known from the mask's threshold and the vector alone.
        paper: k^2 mu sqrt(t), bound (3).
        entries: k, the number of entries that the vector changes.
        threshold: t, the largest mean squared gradient among them.
    """

    change: float
    bound: float
    uniform: float
    paper: float
    entries: int
    threshold: float


def localization(
    model: nn.Module,
    vector: TaskVector,
    batches: Iterable[Any],
    scores: FisherScores,
    *,
    scale: float = 1.0,
    logits_fn: LogitsFunction | None = None,
) -> Localization:
    """Measure the first-order change that a vector makes on data, and bound it by sensitivities.

    For the localization of task i on the data of task j pass i's vector, j's batches and j's
    scores. The model is not edited; the vector's tensors are dense in memory meanwhile.

    Args:
        model: the base; it runs in eval mode.
        vector: the edit.
        batches: of the data, as for `scores`.
        scores: what `talos.fisher_diag` gave for those batches; with `draws="exact"` the bounds
            are certain, with sampled labels they are estimates.
        scale: the scaling coefficient.
        logits_fn: `logits_fn(model, batch)` returns logits [B, C]; by default as `talos.calibrate`.

    Raises:
        TalosValueError: the vector belongs to another base or touches an entry without a score,
            the logits have another shape, or there is no batch.
        TalosTypeError: `scores` did not come from `talos.fisher_diag`.

    Example:
        >>> from talos import Mask, fisher_diag
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> data = [torch.randn(16, 4)]
        >>> scores = fisher_diag(model, data, draws="exact")
        >>> mask = Mask.from_scores(scores, density=0.1)
        >>> vector = TaskVector(mask, torch.full((mask.nnz,), 0.1))
        >>> found = localization(model, vector, data, scores)
        >>> found.change <= found.bound <= found.uniform <= found.paper
        True
    """
    if not isinstance(scores, FisherScores):
        raise TalosTypeError(
            f"scores must come from talos.fisher_diag, got {type(scores).__name__}; it knows how "
            "many samples they are the sum over"
        )
    bound, threshold = _bounds(vector, scores)
    k, size = int(vector.values.count_nonzero()), abs(check_scale(scale))
    return Localization(
        change=size * _change(model, vector, batches, logits_fn or default_logits),
        bound=size * bound,
        uniform=size * vector.norm() * sqrt(k * threshold),
        paper=k**2 * size * vector.largest * sqrt(threshold),
        entries=k,
        threshold=threshold,
    )


def _bounds(vector: TaskVector, scores: FisherScores) -> tuple[float, float]:
    """Return the sum of |tau_j| sqrt(F_j), and the largest F_j where tau_j is not 0."""
    touched = {name: index for name, index in vector.mask.indices.items() if index.nnz}
    matched = match_tensors(
        {name: vector.mask.shapes[name] for name in touched}, scores, what="vector"
    )
    places = {id(score): name for name, score in scores.items()}
    total = threshold = 0.0
    parts = slices_of(vector.mask)
    for name, score in matched.items():
        where = touched[name].positions_int64()
        first, last = scores.rows.get(places[id(score)], (0, max(1, len(score))))
        row = score.numel() // max(1, len(score))
        if int(where[0]) < first * row or int(where[-1]) >= last * row:
            raise TalosValueError(
                f"scores must cover the entries of the vector, got {name} scored only in the rows "
                f"[{first}, {last}); score it whole, with params='maskable'"
            )
        values = vector.values[parts[name]].double().abs()
        own = score.detach().reshape(-1)[where.to(score.device)].double().cpu() / scores.samples
        total += float(values @ own.sqrt())
        own = own[values > 0]
        threshold = max(threshold, float(own.max()) if len(own) else 0.0)
    return total, threshold


def _change(
    model: nn.Module,
    vector: TaskVector,
    batches: Iterable[Any],
    logits_fn: LogitsFunction,
) -> float:
    """Return the root mean square change that the vector makes in first order."""
    touched = touched_weights(model, vector.mask)
    check_base(base_fingerprints(touched, verify=bool(vector.fingerprints)), vector.fingerprints)
    squares, count = 0.0, 0
    with evaluating(model) as bare, torch.no_grad():
        own = {place(tensor): name for name, tensor in _all_tensors(bare)}
        weights = {own[place(tensor)]: tensor.detach() for tensor in touched.values()}
        direction = {
            own[place(tensor)]: vector.to_dense(name).to(tensor) for name, tensor in touched.items()
        }
        for batch in batches:
            variances = _variances(*first_order(bare, logits_fn, weights, direction, batch))
            squares += float(variances.sum())
            count += len(variances)
    if not count:
        raise TalosValueError("batches must hold at least one sample, got 0; check the data set")
    return sqrt(squares / count)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_buffers()
    yield from model.named_parameters()


def _variances(logits: Tensor, change: Tensor) -> Tensor:
    """Return the variance of the logits' change over y ~ p of each sample, float64 [B]."""
    if logits.dim() != 2:
        raise TalosValueError(
            f"logits_fn must return logits [B, C], got {list(logits.shape)}; of [B, T, V] choose a "
            "position, as logits_fn=lambda model, batch: talos.batches.default_logits(model, "
            "batch)[:, -1] does; or pass logits_fn=talos.choice_logits"
        )
    probs = logits.double().softmax(-1)
    change = change.double().where(probs > 0, 0.0)  # -inf rules a class out
    centred = change - (probs * change).sum(-1, keepdim=True)
    return (probs * centred.square()).sum(-1)
