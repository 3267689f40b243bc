"""Which weights matter least: Fisher information from the model's own labels, in rounds.

The sensitivity of weight j is the diagonal of the Fisher information at the base weights theta_0,

    F_jj = sum_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta_j)^2 ],

with labels drawn from the model and gradients of single samples. A mask of density s comes from R
rounds over a set of N weights (TaLoS, arXiv 2504.02620):

    in round r = 0 .. R-1:
        score with theta_0 * m,  m = 1 where a weight is kept, soft where it is dropped
        keep the k = round(s^((r+1)/R) * N) lowest of those still kept

Labels depend on (seed, round, sample, draw) alone, so a mask does not depend on the batch size.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .batches import default_logits
from .capture import Capture
from .errors import TalosRuntimeError, TalosTypeError, TalosValueError
from .masks import Mask
from .params import Rows, Selected, Selection, named_modules, select_parameters, unwrapped
from .selection import lowest_entries

__all__ = ["CalibrationProgress", "FisherScores", "calibrate", "fisher_diag"]

Target = Literal["log_prob", "logit"]
Draws = int | Literal["exact"]
LogitsFn = Callable[[nn.Module, Any], Tensor]

_FEW_SAMPLES = 8
_MANY_DEAD = 0.75  # of the selected weights

# Damped weights pass on so little that squared gradients leave fp32's range: on MiniLM they reach
# 1e-38 in the second round. Only their order matters here, and a power of two keeps it.
_SCALE = 2.0**32


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is; one comes after every batch.

    Attributes:
        round: from 1.
        rounds: how many there are.
        samples: scored in this round so far.
        samples_total: of a round, known once the first is over.
    """

    round: int
    rounds: int
    samples: int
    samples_total: int | None


class FisherScores(dict[str, Tensor]):
    """Scores by name of the parameter.

    Attributes:
        samples: how many samples they are the sum over.
        rows: the row ranges that were scored, for tensors of which only a part was; the scores of
            their other rows are 0 and mean nothing.
    """

    samples: int = 0
    rows: dict[str, Rows]


@dataclass(frozen=True)
class _Scoring:
    """How samples are scored: the options that `fisher_diag` and `calibrate` share."""

    logits_fn: LogitsFn
    target: Target
    draws: Draws
    seed: int

    def __post_init__(self) -> None:
        if self.target not in ("log_prob", "logit"):
            raise TalosValueError(f"target must be 'log_prob' or 'logit', got {self.target!r}")
        if self.draws != "exact":
            draws = _integer("draws", self.draws, 1, "a number of labels a sample or 'exact'")
            object.__setattr__(self, "draws", draws)
        object.__setattr__(self, "seed", _integer("seed", self.seed, 0))


def fisher_diag(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    logits_fn: LogitsFn | None = None,
    params: str = "maskable",
    target: Target = "log_prob",
    draws: Draws = 1,
    seed: int = 0,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> FisherScores:
    """Scores weights by the diagonal of the Fisher information, summed over samples.

    The model runs in eval mode; weights, `.grad`, flags of modules and parameters are as before
    when this returns or raises. One backward of a batch gives the gradients of all its samples.

    Args:
        model: the model, on any device.
        batches: of samples, each passed to `logits_fn`.
        logits_fn: `logits_fn(model, batch)` returns [B, C], or [B, T, V] for labels at each of T
            positions whose log-probabilities add up. By default a tensor is the input, of a pair
            the first is, a mapping goes to `forward` by keyword without its labels, or whole where
            `forward` has one argument; `.logits` is taken of what transformers return.
        params: "maskable", "qk" or a regular expression over names; see `talos.params`.
        target: "log_prob", or "logit": the gradient of the drawn class's logit, as in the code
            that the paper's authors released.
        draws: labels drawn a sample, over which scores are averaged, or "exact": the expectation
            over all classes, at the price of one backward a class.
        seed: of the labels.
        on_progress: called after each batch.

    Returns:
        Scores, fp32, in the shapes of the parameters and on their devices.

    Raises:
        TalosValueError: an option is out of range, there are no samples, no parameter is selected,
            logits or scores are not finite, or samples cannot be told apart.
        TalosTypeError: the logits are none.
        TalosRuntimeError: a parameter is used in a way that cannot be scored, or not at all, or
            samples influence one another, or a batch was made under `torch.inference_mode`.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = fisher_diag(model, [torch.eye(2)], draws="exact")
        >>> scores["weight"].shape, scores.samples
        (torch.Size([3, 2]), 2)
    """
    scoring = _Scoring(logits_fn or default_logits, target, draws, seed)
    selection = select_parameters(model, params)
    found = FisherScores()
    with _evaluating(model) as bare, Capture(bare, selection) as capture:
        rounds = _Rounds(1, on_progress)
        found.samples = _score(capture, bare, batches, scoring, rounds)
        found.update(capture.scores)
    found.rows = selection.rows
    return found


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    density: float = 0.1,
    rounds: int = 4,
    *,
    logits_fn: LogitsFn | None = None,
    params: str = "maskable",
    target: Target = "log_prob",
    draws: Draws = 1,
    soft: float = 0.01,
    seed: int = 0,
    select: Literal["lowest", "highest"] = "lowest",
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> Mask:
    """Finds the weights to train: the least sensitive ones, narrowed down in rounds.

    The weights are damped between the rounds and put back bit for bit, also when this raises or
    is interrupted. For the other options see `fisher_diag`.

    Args:
        model: the model, on any device.
        batches: re-iterable (a DataLoader, a list); every round goes through all of them. Some
            hundred samples are enough, 32 are few.
        density: the fraction of the weights to select, in (0, 1].
        rounds: how many.
        logits_fn: `logits_fn(model, batch)` returns [B, C] or [B, T, V].
        params: "maskable", "qk" or a regular expression over names.
        target: "log_prob" or "logit".
        draws: labels drawn a sample, or "exact".
        soft: what dropped weights are multiplied by in later rounds, in (0, 1]: 0.01 in the
            paper, 0.1 in its released code. Never 0: a layer of zeros would stop the signal.
        seed: of the labels.
        select: "lowest", or "highest" for the most sensitive weights, as a control.
        on_progress: called after each batch.

    Returns:
        A mask of exactly round(density * N) of the N weights, ties in order of (tensor, position).

    Raises:
        TalosValueError: as `fisher_diag`; or `batches` can be gone through only once.
        TalosTypeError: as `fisher_diag`.
        TalosRuntimeError: as `fisher_diag`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> mask = calibrate(model, [torch.randn(16, 4) for _ in range(2)], density=0.25)
        >>> mask.nnz, mask.metadata["samples"]
        (17, 32)
    """
    scoring = _Scoring(logits_fn or default_logits, target, draws, seed)
    if not 0.0 < density <= 1.0:
        raise TalosValueError(f"density must lie in (0, 1], got {density}")
    rounds = _integer("rounds", rounds, 1)
    if not 0.0 < soft <= 1.0:
        raise TalosValueError(f"soft must lie in (0, 1], got {soft}; 0 would stop the signal")
    if select not in ("lowest", "highest"):
        raise TalosValueError(f"select must be 'lowest' or 'highest', got {select!r}")
    if rounds > 1 and iter(batches) is batches:
        raise TalosValueError(
            "batches must be re-iterable, got an iterator, which the first of "
            f"{rounds} rounds would exhaust; pass a list or a DataLoader"
        )
    selection = select_parameters(model, params)
    entries = sum(each.numel for each in selection.values())
    if round(density * entries) == 0:
        raise TalosValueError(
            f"density must select at least one of {entries} weights, got {density}: no weight "
            "selected"
        )
    kept = _selectable(selection)
    progress = _Rounds(rounds, on_progress)
    equal = False
    with ExitStack() as stack:
        bare = stack.enter_context(_evaluating(model))
        damp_ = stack.enter_context(_damping(selection, soft))
        capture = stack.enter_context(Capture(bare, selection, _SCALE))
        for index in range(rounds):
            capture.reset()
            samples = _score(capture, bare, batches, scoring, progress)
            scores = capture.scores
            if index == 0:  # later rounds choose among the lowest, which may all be 0
                equal = _warn_if_equal(scores, kept)
            if select == "highest":
                scores = {name: -score for name, score in scores.items()}
            nnz = round(density ** ((index + 1) / rounds) * entries)
            kept = lowest_entries(scores, nnz, kept)
            if index + 1 < rounds:
                damp_(kept)
    dead = sum(int((scores[name][mask] == 0).sum()) for name, mask in kept.items())
    if dead > _MANY_DEAD * nnz and not equal:
        warnings.warn(
            f"{dead} of the {nnz} selected weights have a score of 0: no gradient reaches them on "
            "these samples (dead units, inputs that are always zero), so training will not move "
            "them; use more varied samples, or leave their layers out with params=",
            stacklevel=2,
        )
    if samples < _FEW_SAMPLES:
        warnings.warn(
            f"a mask from {samples} samples is mostly noise; pass some hundred in batches",
            stacklevel=2,
        )
    options: dict[str, Any] = {"soft": float(soft), "select": select, "target": target}
    options |= {"draws": scoring.draws, "seed": scoring.seed}
    sizes = {"density": float(density), "rounds": rounds, "samples": samples}
    made = {"method": "talos", "params": params, "passed_over": selection.passed_over}
    made |= sizes | options | {"torch": str(torch.__version__)}
    return Mask.from_dense({name: mask.cpu() for name, mask in kept.items()}, metadata=made)


@dataclass
class _Rounds:
    """Counts rounds and samples, and reports them."""

    rounds: int
    on_progress: Callable[[CalibrationProgress], None] | None
    done: int = 0
    total: int | None = None

    def report(self, samples: int) -> None:
        if self.on_progress is not None:
            self.on_progress(CalibrationProgress(self.done + 1, self.rounds, samples, self.total))


def _score(
    capture: Capture, model: nn.Module, batches: Iterable[Any], scoring: _Scoring, rounds: _Rounds
) -> int:
    """Adds the scores of every sample of one round and returns their number."""
    samples = 0
    for batch in batches:
        capture.forget()
        with _refusing_inference_tensors():
            logits = _checked(scoring.logits_fn(model, batch))
        labels_of = (scoring.seed, rounds.done, samples)
        for losses, share, last in _losses(logits, scoring, labels_of):
            capture.backward(losses, share, last=last)
        samples += len(logits)
        rounds.report(samples)
    if samples == 0 and rounds.done:
        raise TalosValueError(
            f"batches must be re-iterable, got none in round {rounds.done + 1} after "
            f"{rounds.total} samples in the first; pass a list or a DataLoader"
        )
    if samples == 0:
        raise TalosValueError("batches must hold at least one sample, got 0; check the data set")
    capture.check()
    rounds.done, rounds.total = rounds.done + 1, samples
    return samples


@contextmanager
def _refusing_inference_tensors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        raise TalosRuntimeError(
            "batches and model must hold tensors that autograd can use, got some made under "
            "torch.inference_mode; clone() them outside of it, or make them under torch.no_grad"
        ) from error


def _losses(
    logits: Tensor, scoring: _Scoring, origin: tuple[int, int, int]
) -> Iterator[tuple[Tensor, float, bool]]:
    """What to square the gradients of, one of each sample: fp32 or fp64 [B], share, whether last.

    Drawn labels: the target of the label, with equal shares. Exact: sqrt(p_c) times the target of
    class c, whose squared gradients sum over c to the expectation.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = logits.log_softmax(-1) if scoring.target == "log_prob" else logits
    probs = logits.detach().double().softmax(-1)
    if scoring.draws == "exact":
        if logits.dim() != 2:
            raise TalosValueError(
                f"draws must be a number for logits [B, T, V], got 'exact' for "
                f"{list(logits.shape)}, whose label sequences cannot all be visited"
            )
        for label in range(logits.shape[1]):
            weight = probs[:, label].sqrt().to(values.dtype)
            possible = torch.where(weight > 0, values[:, label], 0.0)  # 0 * log 0 is 0
            yield weight * possible, 1.0, label + 1 == logits.shape[1]
        return
    for draw in range(scoring.draws):
        labels = _draw_labels(probs, origin, draw)
        chosen = values.gather(-1, labels[..., None])[..., 0]
        yield (
            chosen.flatten(1).sum(1) if chosen.dim() > 1 else chosen,
            1.0 / scoring.draws,
            (draw + 1 == scoring.draws),
        )


def _draw_labels(probs: Tensor, origin: tuple[int, int, int], draw: int) -> Tensor:
    """Labels by the inverse of the distribution function: fp64 [..., C] to int64 [...].

    Each sample has a generator of its own, seeded by (seed, round, sample, draw).
    """
    seed, round_index, first = origin
    uniform = np.stack(
        [
            np.random.default_rng([seed, round_index, first + row, draw]).random(probs.shape[1:-1])
            for row in range(len(probs))
        ]
    )
    totals = probs.cumsum(-1)
    points = torch.from_numpy(uniform).to(probs.device)[..., None] * totals[..., -1:]
    labels = torch.searchsorted(totals, points, right=True)[..., 0]
    return labels.clamp_(max=probs.shape[-1] - 1)


def _checked(logits: object) -> Tensor:
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TalosTypeError(
            f"logits_fn must return a floating-point tensor, got {type(logits).__name__}; pass "
            "logits_fn=lambda model, batch: ..."
        )
    if logits.dim() not in (2, 3) or 0 in logits.shape:
        raise TalosValueError(
            f"logits_fn must return logits [B, C] or [B, T, V], got {list(logits.shape)}"
        )
    if bool((logits.isnan() | logits.isposinf()).any()):  # -inf rules a class out
        raise TalosValueError(
            "logits_fn must return finite logits, got NaN or infinity; look for overflow in the "
            "model, or calibrate in float32"
        )
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and gradients; hands out the model without its wrappers, flags come back."""
    bare = unwrapped(model)
    flags = [(module, module.training) for module in bare.modules()]
    try:
        bare.eval()
        for name, module in named_modules(bare):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or module.running_mean is None
            ):
                raise TalosValueError(
                    f"model must not mix samples, got {name}, a {type(module).__name__} that uses "
                    "statistics of the batch in eval mode; give it running statistics"
                )
        with torch.inference_mode(False), torch.enable_grad():
            yield bare
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _damping(selection: Selection, soft: float) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Hands out what damps the dropped weights; every weight comes back bit for bit."""
    base = {name: each.param.detach().clone() for name, each in selection.items()}

    def damp_(kept: dict[str, Tensor]) -> None:
        for name, each in selection.items():
            damped = torch.where(kept[name], base[name], base[name] * soft)
            with torch.no_grad():
                each.param[_rows(each)] = damped[_rows(each)]

    try:
        yield damp_
    finally:
        with torch.no_grad():
            for name, each in selection.items():
                each.param.copy_(base[name])


def _selectable(selection: Selection) -> dict[str, Tensor]:
    """The entries that may be selected: bool, in the shapes of the parameters."""
    among = {}
    for name, each in selection.items():
        among[name] = torch.zeros(each.param.shape, dtype=torch.bool, device=each.param.device)
        among[name][_rows(each)] = True
    return among


def _rows(each: Selected) -> slice | EllipsisType:
    return ... if each.rows is None else slice(*each.rows)


def _warn_if_equal(scores: dict[str, Tensor], kept: dict[str, Tensor]) -> bool:
    ends = [torch.aminmax(score[kept[name]]) for name, score in scores.items() if kept[name].any()]
    low, high = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    equal = low == high and sum(int(each.sum()) for each in kept.values()) > 1
    if equal:
        warnings.warn(
            "all scores are equal: the first weights are selected, which says nothing about the "
            "model; check that the logits depend on the input",
            stacklevel=3,
        )
    return equal


def _integer(name: str, value: Any, least: int, kind: str | None = None) -> int:
    """An option as an int, from integers of any type."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        kind = kind or f"an integer of at least {least}"
        raise TalosValueError(f"{name} must be {kind}, got {value!r}")
    return number
