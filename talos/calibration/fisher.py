"""Which weights matter least: Fisher information from the model's own labels, in rounds.

The sensitivity of weight j is the diagonal of the Fisher information at the base weights theta_0,

    F_jj = sum_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta_j)^2 ],

with labels drawn from the model and gradients of single samples. A mask of density s comes from R
rounds over a set of N weights (TaLoS, arXiv 2504.02620):

    in round r = 0 .. R-1:
        score with theta_0 * m,  m = 1 where a weight is kept, soft where it is dropped
        keep the k = round(s^((r+1)/R) * N) lowest of those still kept

`talos.calibration.estimators` says which labels are drawn. Labels depend on (seed, round, sample,
draw) alone, so a mask does not depend on the batch size.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from talos.batches import logits_and_positions
from talos.calibration.capture import Capture
from talos.calibration.estimators import Draws, Estimator, Labels, Target
from talos.calibration.left_out import left_out
from talos.calibration.rounds import CalibrationProgress, LogitsFn, Rounds
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.masks.lowest import lowest_entries
from talos.names import named_modules, named_parameters, unwrapped
from talos.options import as_real, integer
from talos.params import Candidate, Candidates, Rows, own_parameters, select_parameters

__all__ = ["CalibrationProgress", "FisherScores", "calibrate", "fisher_diag"]

Parity = Literal["paper", "released"]

_FEW_SAMPLES = 8
_MANY_DEAD = 0.75  # of the selected weights

# Damped weights pass on so little that squared gradients leave fp32's range: on MiniLM they reach
# 1e-38 in the second round. Only their order matters here, and a power of two keeps it.
_SCALE = 2.0**32


class FisherScores(dict[str, Tensor]):
    """Scores by name of the parameter.

    Attributes:
        samples: how many samples they are the sum over.
        rows: the row ranges that were scored, for tensors of which only a part was; the scores of
            their other rows are 0 and mean nothing.
    """

    samples: int = 0
    rows: dict[str, Rows]


def fisher_diag(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    logits_fn: LogitsFn | None = None,
    params: str = "maskable",
    target: Target = "log_prob",
    draws: Draws = 1,
    labels: Labels = "sampled",
    seed: int = 0,
    check: bool = False,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> FisherScores:
    """Scores weights by the diagonal of the Fisher information, summed over samples.

    The model runs in eval mode; weights, `.grad`, flags of modules and parameters are as before
    when this returns or raises. One backward of a batch gives the gradients of all its samples.

    Args:
        model: the model, on any device.
        batches: of samples, each passed to `logits_fn`.
        logits_fn: `logits_fn(model, batch)` returns [B, C], or [B, T, V] for labels at each of T
            positions whose log-probabilities add up, or a pair of that and a bool [B, T], the
            positions that count. By default a tensor is the input, of a pair the first is, a
            mapping goes to `forward` by keyword without its labels, or whole where `forward` has
            one argument; `.logits` is taken of what transformers return, and padding does not
            count. `talos.choice_logits` scores answers to choose among.
        params: "maskable", "qk", "attention" or a regular expression over names; see
            `talos.params`.
        target: "log_prob", or "logit": the gradient of the drawn class's logit, as in the code
            that the paper's authors released.
        draws: labels drawn a sample, over which scores are averaged, or "exact": the expectation
            over all classes, at the price of one backward a class.
        labels: "sampled" from the model's own distribution, or "importance": drawn where gradients
            are large and weighted accordingly, a smaller variance at the same price; see
            `talos.calibration.estimators`.
        seed: of the labels.
        check: first score three samples of the first batch by single backwards, too, and refuse
            to go on if the two differ.
        on_progress: called after each batch.

    Returns:
        Scores, fp32, in the shapes of the parameters and on their devices.

    Raises:
        TalosValueError: an option is out of range, there are no samples, no parameter is selected,
            logits or scores are not finite, or samples cannot be told apart.
        TalosTypeError: the logits are none.
        TalosRuntimeError: a parameter is used in a way that cannot be scored, or not at all, or
            samples influence one another, or a batch was made under `torch.inference_mode`, or the
            self-test failed.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = fisher_diag(model, [torch.eye(2)], draws="exact")
        >>> scores["weight"].shape, scores.samples
        (torch.Size([3, 2]), 2)
    """
    estimator = Estimator(target, draws, labels, seed)
    selection = select_parameters(model, params)
    _left_out(model, selection, params)
    found = FisherScores()
    with _evaluating(model) as bare, Capture(bare, selection) as capture:
        rounds = Rounds(1, on_progress, logits_fn or logits_and_positions, estimator, check)
        found.samples = rounds.score(capture, bare, batches)
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
    labels: Labels = "sampled",
    soft: float = 0.01,
    seed: int = 0,
    select: Literal["lowest", "highest"] = "lowest",
    parity: Parity = "paper",
    check: bool = False,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> Mask:
    """Finds the weights to train: the least sensitive ones, narrowed down in rounds.

    The weights are damped between the rounds and put back bit for bit, also when this raises or
    is interrupted. For the other options see `fisher_diag`.

    The mask's metadata tell how stable it is: `stability` is the share of the last round's choice
    that two half-sets of the samples agree on, each choosing by itself, and `stability_by_chance`
    what halves that agree on nothing would share. It is None where there is one batch, or where a
    single round has an unknown number of batches. `samples` is the number of the samples that each
    round scored, of unequal ones the least, and `samples_of_rounds` lists them. `left_out` holds
    the names and the share of the weights that params="maskable" leaves out because it does not
    know what they are; from 1 % on there is a warning, too.

    Args:
        model: the model, on any device.
        batches: re-iterable (a DataLoader, a list); every round goes through all of them. Some
            hundred samples are enough, 32 are few.
        density: the fraction of the weights to select, in (0, 1].
        rounds: how many.
        logits_fn: `logits_fn(model, batch)` returns [B, C], [B, T, V], or a pair of that and the
            positions that count.
        params: "maskable", "qk", "attention" or a regular expression over names.
        target: "log_prob" or "logit".
        draws: labels drawn a sample, or "exact".
        labels: "sampled" or "importance".
        soft: what dropped weights are multiplied by in later rounds, in (0, 1]: 0.01 in the
            paper, 0.1 in its released code. Never 0: a layer of zeros would stop the signal.
        seed: of the labels.
        select: "lowest", or "highest" for the most sensitive weights, as a control.
        parity: "released" does what the code that the authors released does where it differs from
            the paper: target="logit" and soft=0.1 whatever is passed here, int(density * N) entries
            (one fewer than before in a round that would keep all) and all that tie with the last of
            them, and the tensors that the model holds by itself
            (class and positional embedding, `proj` of CLIP) trained whole besides.
        check: a self-test on three samples; see `fisher_diag`.
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
    if parity not in ("paper", "released"):
        raise TalosValueError(f"parity must be 'paper' or 'released', got {parity!r}")
    released = parity == "released"
    if released:
        target, soft = "logit", 0.1
    estimator = Estimator(target, draws, labels, seed)
    density, soft = as_real(density) or 0.0, as_real(soft) or 0.0
    if not 0.0 < density <= 1.0:
        raise TalosValueError(f"density must lie in (0, 1], got {density}")
    rounds = integer("rounds", rounds, 1)
    if not 0.0 < soft <= 1.0:
        raise TalosValueError(f"soft must lie in (0, 1], got {soft}; 0 would stop the signal")
    if select not in ("lowest", "highest"):
        raise TalosValueError(f"select must be 'lowest' or 'highest', got {select!r}")
    if rounds > 1 and isinstance(batches, Iterator):
        raise TalosValueError(
            "batches must be re-iterable, got an iterator, which the first of "
            f"{rounds} rounds would exhaust; pass a list or a DataLoader"
        )
    selection = select_parameters(model, params)
    entries = sum(each.numel for each in selection.values())
    if (int if released else round)(density * entries) == 0:
        raise TalosValueError(
            f"density must select at least one of {entries} weights, got {density}: no weight "
            "selected"
        )
    unknown = _left_out(model, selection, params)
    kept = _selectable(selection)
    asked = logits_fn or logits_and_positions
    progress = Rounds(rounds, on_progress, asked, estimator, check, halving=True)
    equal = False
    silent: dict[str, Tensor] = {}
    count = entries
    scored: list[int] = []  # samples of each round
    with ExitStack() as stack:
        bare = stack.enter_context(_evaluating(model))
        damp_ = stack.enter_context(_damping(selection, soft))
        capture = stack.enter_context(Capture(bare, selection, _SCALE))
        for index in range(rounds):
            capture.reset()
            scored.append(progress.score(capture, bare, batches))
            before, nnz = count, _nnz(density ** ((index + 1) / rounds) * entries, count, released)
            choose = partial(lowest_entries, k=nnz, among=kept, largest=select == "highest")
            halves = [choose(scores) for scores in progress.halves]
            if halves:  # the second half's scores are the capture's; here they become the sum
                for name, score in progress.halves.pop(0).items():
                    capture.scores[name] += score
            if index == 0:  # later rounds choose among the lowest, which may all be 0
                equal = _warn_if_equal(capture.scores, selection)
                # Damping wakes dead units: only the undamped model tells what has no gradient.
                silent = {name: score == 0 for name, score in capture.scores.items()}
            kept = choose(capture.scores, all_ties=released)
            count = sum(int(each.sum()) for each in kept.values())  # with all ties more than nnz
            if index + 1 < rounds:
                damp_(kept)
    dead = sum(int((mask & silent[name]).sum()) for name, mask in kept.items())
    if dead > _MANY_DEAD * count and not equal:
        warnings.warn(
            f"{dead} of the {count} selected weights have a score of 0: no gradient reaches them "
            "on these samples (dead units, inputs that are always zero), so training will not move "
            "them; use more varied samples, or leave their layers out with params=",
            stacklevel=2,
        )
    samples = min(scored)
    if len(set(scored)) > 1:
        warnings.warn(
            f"the rounds scored {', '.join(map(str, scored))} samples: batches yields unequal "
            "numbers of them each time it is gone through; pass a list or a DataLoader of a fixed "
            "data set",
            stacklevel=2,
        )
    if samples < _FEW_SAMPLES:
        warnings.warn(
            f"a mask from {samples} samples is mostly noise; pass some hundred in batches",
            stacklevel=2,
        )
    options: dict[str, Any] = {"soft": float(soft), "select": select, "target": target}
    options |= {"draws": estimator.draws, "labels": labels, "seed": estimator.seed}
    options |= {"parity": parity}
    sizes: dict[str, Any] = {"density": float(density), "rounds": rounds, "samples": samples}
    sizes |= {"samples_of_rounds": scored}
    made = {"method": "talos", "params": params, "passed_over": selection.passed_over}
    made |= {"left_out": unknown}
    made |= sizes | options | {"torch": str(torch.__version__)}
    made |= {"stability": _overlap(halves, nnz), "stability_by_chance": nnz / before}
    dense = {name: mask.cpu() for name, mask in kept.items()}
    if released:
        chosen = {id(each.param) for each in selection.values()}
        left = [name for name, param in own_parameters(bare).items() if id(param) not in chosen]
        dense |= {
            name: torch.ones(named_parameters(bare)[name].shape, dtype=torch.bool, device="cpu")
            for name in left
        }
    return Mask.from_dense(dense, metadata=made)


def _nnz(wanted: float, kept: int, released: bool) -> int:
    """How many entries a round keeps: the nearest number, or what the released code counts."""
    return max(1, min(int(wanted), kept - 1)) if released else round(wanted)


def _overlap(halves: list[dict[str, Tensor]], nnz: int) -> float | None:
    """The share of entries that both halves chose; None where there are no halves."""
    if not halves:
        return None
    one, other = halves
    return sum(int((one[name] & other[name]).sum()) for name in one) / nnz


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
def _damping(selection: Candidates, soft: float) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Hands out what damps the dropped weights; every weight comes back bit for bit."""
    base = {name: each.param.detach().clone() for name, each in selection.items()}

    def damp_(kept: dict[str, Tensor]) -> None:
        for name, each in selection.items():
            rows = _rows(each)
            whole, damped = base[name][rows], each.param.detach()[rows]
            torch.mul(whole, soft, out=damped)
            torch.where(kept[name][rows], whole, damped, out=damped)

    try:
        yield damp_
    finally:
        with torch.no_grad():
            for name, each in selection.items():
                each.param.copy_(base[name])


def _selectable(selection: Candidates) -> dict[str, Tensor]:
    """The entries that may be selected: bool, in the shapes of the parameters."""
    among = {}
    for name, each in selection.items():
        among[name] = torch.zeros(each.param.shape, dtype=torch.bool, device=each.param.device)
        among[name][_rows(each)] = True
    return among


def _rows(each: Candidate) -> slice | EllipsisType:
    return ... if each.rows is None else slice(*each.rows)


def _left_out(model: nn.Module, selection: Candidates, params: str) -> dict[str, Any] | None:
    """What a mask's metadata say of weights that the preset does not know; a warning of many."""
    if params != "maskable":
        return None  # who names a part means to leave out the rest
    found = left_out(model, selection)
    if found.message is not None:
        warnings.warn(found.message, stacklevel=3)
    return {"names": list(found.sizes), "share": found.share}


def _warn_if_equal(scores: dict[str, Tensor], selection: Candidates) -> bool:
    parts = [scores[name][_rows(each)] for name, each in selection.items() if each.numel]
    ends = [torch.aminmax(part) for part in parts]
    low, high = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    equal = low == high and sum(part.numel() for part in parts) > 1
    if equal:
        warnings.warn(
            "all scores are equal: the first weights are selected, which says nothing about the "
            "model; check that the logits depend on the input",
            stacklevel=3,
        )
    return equal
