"""Select the least sensitive weights in rounds (TaLoS, arXiv 2504.02620).

A mask of density s over N weights comes from R rounds:

    in round r = 0 .. R-1:
        score with theta_0 * m,  m = 1 where a weight is kept, soft where it is dropped
        keep the k = round(s^((r+1)/R) * N) lowest of those still kept

Each round draws its own labels.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from types import EllipsisType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.batches import logits_and_positions
from talos.calibration.capture import Capture
from talos.calibration.estimators import Draws, Estimator, Labels, Target
from talos.calibration.fisher import CalibrationProgress, LogitsFn, Scorer, evaluating
from talos.calibration.left_out import warn_of_left_out
from talos.calibration.ranks import AGREE, facts_of
from talos.calibration.sharded import check_sharded
from talos.distributed import (
    as_part,
    check_same,
    errors_on_all_ranks,
    local,
    part_of,
    reduced,
    reshard,
    sharding,
    whole,
    world_size,
)
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.masks.lowest import lowest_entries
from talos.names import check_module, named_parameters
from talos.options import as_real, fraction, integer
from talos.params import Candidate, Candidates, own_parameters, select_parameters

__all__ = ["calibrate"]

_FEW_SAMPLES = 8
_MANY_DEAD = 0.75  # of the selected weights

# Damped weights pass on so little that squared gradients leave fp32's range: on MiniLM they reach
# 1e-38 in the second round. Only their order matters here, and a power of two keeps it.
_SCALE = 2.0**32


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    density: float = 0.1,
    rounds: int = 4,
    *,
    logits_fn: LogitsFn | None = None,
    params: str = "maskable",
    target: Target | None = None,
    draws: Draws = 1,
    labels: Labels = "sampled",
    soft: float | None = None,
    seed: int = 0,
    select: Literal["lowest", "highest"] = "lowest",
    parity: Literal["paper", "released"] = "paper",
    check: bool = False,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Mask:
    """Select the weights to train: the least sensitive ones, narrowed down in rounds.

    The weights are damped between the rounds and restored bit for bit, also when this raises or is
    interrupted.

    Where torch.distributed runs, all ranks call this and share the work. All get the mask of one
    process on equal hardware with as many threads. If the first batch is the same on all ranks, all
    batches must be, and each rank scores some of them. If no two first batches are the same, each
    rank scores its own (a `DistributedSampler`), as one process would that goes through the first
    batches of all ranks, then through the second ones, and so on. So ranks must not shuffle the
    same data differently: that counts as batches of their own, and scores each sample once a rank.

    A model that FSDP2 shards is scored as it is. Every rank gets the whole mask. While this runs it
    keeps scores of its share of the weights only, 8 bytes a weight, and for a while those of whole
    modules that were passed to `fully_shard`. An error in the forward of one rank alone ends the
    other ranks when torch.distributed's timeout is over; other errors are raised on all ranks at
    once.

    The mask's metadata hold these results, among others:

    - `stability`: the share of the last round's choice that two half-sets of the samples agree on,
      each choosing by itself. None with one batch, or with one round over batches of unknown
      number. `stability_by_chance` is the share for two random choices.
    - `samples`: the number of samples that each round scored, the least of unequal ones;
      `samples_of_rounds` lists them.
    - `left_out`: the names and the share of the weights that params="maskable" leaves out because
      it does not know their kind. From 1 % on there is a warning, too.

    Args:
        model: the model, on any device.
        batches: re-iterable (a DataLoader, a list); every round goes through all of them. Some
            hundred samples are enough, 32 are few.
        density: the fraction of the weights to select, in (0, 1].
        rounds: how many.
        logits_fn: `logits_fn(model, batch)` returns the logits; see `fisher_diag`.
        params: "maskable", "qk", "attention" or a regular expression over names.
        target: "log_prob" (the default) or "logit"; see `fisher_diag`.
        draws: labels drawn per sample, or "exact"; see `fisher_diag`.
        labels: "sampled" or "importance"; see `fisher_diag`.
        soft: the factor of dropped weights in later rounds, in (0, 1]; 0.01 by default, as in the
            paper. Never 0: a layer of zeros would stop the signal.
        seed: of the labels.
        select: "lowest", or "highest" for the most sensitive weights, as a control.
        parity: "released" follows the authors' code where it differs from the paper. target is
            "logit" and soft 0.1. Every entry that ties with the last one is selected, of
            int(density * N), one fewer than before in a round that would keep all. Tensors that
            the model holds by itself (class and positional embedding, `proj` of CLIP) are trained
            whole besides.
        check: a self-test on three samples; see `fisher_diag`.
        on_progress: called after each batch.
        group: the ranks that share the work; None: all there are. Pass a group of one rank to
            calibrate alone.

    Returns:
        A mask of exactly round(density * N) of the N weights, ties in order of (tensor, position).

    Raises:
        TalosValueError: as `fisher_diag`; or `batches` can be gone through only once; or target or
            soft contradicts `parity`; or ranks have different settings or weights.
        TalosTypeError: as `fisher_diag`.
        TalosRuntimeError: as `fisher_diag`; or another rank raised.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> mask = calibrate(model, [torch.randn(16, 4) for _ in range(2)], density=0.25)
        >>> mask.nnz, mask.metadata["samples"]
        (17, 32)
    """
    with errors_on_all_ranks(group):
        if parity not in ("paper", "released"):
            raise TalosValueError(f"parity must be 'paper' or 'released', got {parity!r}")
        released = parity == "released"
        if released and (target not in (None, "logit") or soft not in (None, 0.1)):
            raise TalosValueError(
                "target and soft must be 'logit' and 0.1 with parity='released', got "
                f"target={target!r} and soft={soft!r}; leave them out, or use parity='paper'"
            )
        target = target or ("logit" if released else "log_prob")
        soft = as_real((0.1 if released else 0.01) if soft is None else soft) or 0.0
        estimator = Estimator(target, draws, labels, seed)
        density = fraction("density", density)
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
        check_module(model)
        reshard(model)
        candidates = select_parameters(model, params)
        check_sharded(candidates, check, group)
        entries = sum(each.numel for each in candidates.values())
        if (int if released else round)(density * entries) == 0:
            raise TalosValueError(
                f"density must select at least one of {entries} weights, got {density}: no weight "
                "selected"
            )
        agreed = {**vars(estimator), "density": density, "rounds": rounds, "soft": soft}
        agreed |= {"params": params, "select": select, "parity": parity, "check": check}
        agreed |= facts_of(model, candidates) if world_size(group) > 1 else {}
    check_same(agreed, AGREE, group)
    left_out = warn_of_left_out(model, candidates, params)
    logits_fn = logits_fn or logits_and_positions
    scorer = Scorer(rounds, on_progress, logits_fn, estimator, check, group, halving=True)
    count = entries
    equal = False
    silent: dict[str, Tensor] = {}
    scored: list[int] = []  # samples of each round
    with (
        evaluating(model) as bare,
        _damping(candidates, soft) as damp_,
        Capture(bare, candidates, _SCALE, group) as capture,
    ):
        for index in range(rounds):
            scores, *second = scorer.score(capture, bare, batches)
            scored.append(scorer.total or 0)
            if index == 0:
                kept = _all_of(candidates, scores)
            before, nnz = count, _nnz(density ** ((index + 1) / rounds) * entries, count, released)
            choose = partial(lowest_entries, k=nnz, among=kept, largest=select == "highest")
            halves = [choose(half) for half in (scores, *second)] if second else []
            for half in second:
                for name, score in half.items():
                    local(scores[name]).add_(local(score))
            del second
            if index == 0:  # later rounds choose among the lowest, which may all be 0
                equal = entries > 1 and _all_equal(scores, kept)
                # Damping wakes dead units: only the undamped model shows what has no gradient.
                silent = {name: local(score) == 0 for name, score in scores.items()}
            kept = choose(scores, all_ties=released)
            del scores, choose
            count = _count(kept)  # with all ties more than nnz
            if index + 1 < rounds:
                damp_(kept)
    dead = _count(kept, silent)
    if equal:
        warnings.warn(
            "all scores are equal: the first weights are selected, which says nothing about the "
            "model; check that the logits depend on the input",
            stacklevel=2,
        )
    elif dead > _MANY_DEAD * count:
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
    metadata = {
        "method": "talos",
        "params": params,
        "passed_over": candidates.passed_over,
        "left_out": left_out,
        "density": float(density),
        "rounds": rounds,
        "samples": samples,
        "samples_of_rounds": scored,
        "soft": float(soft),
        "select": select,
        "target": target,
        "draws": estimator.draws,
        "labels": labels,
        "seed": estimator.seed,
        "parity": parity,
        "torch": str(torch.__version__),
        "stability": _overlap(halves, nnz),
        "stability_by_chance": nnz / before,
    }
    dense = dict(kept)
    if released:
        chosen = {id(each.param) for each in candidates.values()}
        shapes = {name: param.shape for name, param in named_parameters(bare).items()}
        dense |= {
            name: torch.ones(shapes[name], dtype=torch.bool, device="cpu")
            for name, param in own_parameters(bare).items()
            if id(param) not in chosen
        }
    return Mask.from_dense(dense, metadata=metadata)


def _nnz(wanted: float, kept: int, released: bool) -> int:
    """How many entries a round keeps: the nearest number, or what the released code counts."""
    return max(1, min(int(wanted), kept - 1)) if released else round(wanted)


def _overlap(halves: list[dict[str, Tensor]], nnz: int) -> float | None:
    """Return the share of entries that both halves chose; None without halves."""
    if not halves:
        return None
    one, other = halves
    return _count(one, {name: local(each) for name, each in other.items()}) / nnz


def _count(chosen: dict[str, Tensor], among: dict[str, Tensor] | None = None) -> int:
    """Count the chosen entries of all ranks that are among some others, given as local parts."""
    parts = {name: local(each) for name, each in chosen.items()}
    if among is not None:
        parts = {name: part & among[name] for name, part in parts.items()}
    here = sum(int(part.sum()) for part in parts.values())
    found = torch.tensor(here, dtype=torch.int64, device="cpu")
    return int(_over_ranks(found, "sum", chosen))


def _over_ranks(number: Tensor, how: Literal["sum", "max"], found: dict[str, Tensor]) -> Tensor:
    """Return the sum or the largest of what the ranks' parts of the tensors in `found` gave."""
    return reduced(number, how, sharding(next(iter(found.values()))))


@contextmanager
def _damping(candidates: Candidates, soft: float) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Yield a function that damps the dropped weights; every weight is restored bit for bit."""
    parts = {name: local(each.param).detach() for name, each in candidates.items()}
    base = {name: part.clone() for name, part in parts.items()}

    def damp_(kept: dict[str, Tensor]) -> None:
        for name, each in candidates.items():
            chosen = whole(local(kept[name]), kept[name])
            stays = torch.ones_like(chosen)
            stays[_rows(each)] = chosen[_rows(each)]
            torch.mul(base[name], soft, out=parts[name])
            own = part_of(stays, each.param).to(base[name].device)
            torch.where(own, base[name], parts[name], out=parts[name])

    try:
        yield damp_
    finally:
        for name, part in parts.items():
            part.copy_(base[name])


def _all_of(candidates: Candidates, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries that may be selected: bool, shaped and sharded as the scores."""
    among = {}
    for name, each in candidates.items():
        dense = torch.zeros(each.param.shape, dtype=torch.bool, device=scores[name].device)
        dense[_rows(each)] = True
        among[name] = as_part(part_of(dense, scores[name]).clone(), scores[name])
    return among


def _rows(each: Candidate) -> slice | EllipsisType:
    return ... if each.rows is None else slice(*each.rows)


def _all_equal(scores: dict[str, Tensor], among: dict[str, Tensor]) -> bool:
    """Whether all entries that may be selected have one and the same score."""
    highest = [-inf, -inf]  # of the scores and of their negatives
    for name, score in scores.items():
        part = local(score)[local(among[name])]
        if part.numel():
            low, high = map(float, torch.aminmax(part))
            highest = [max(highest[0], high), max(highest[1], -low)]
    ends = torch.tensor(highest, dtype=torch.float64, device="cpu")
    high, lowest = _over_ranks(ends, "max", scores).tolist()
    return bool(high == -lowest)
