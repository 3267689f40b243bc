"""Score weights by the diagonal of the Fisher information, batch by batch.

The sensitivity of weight j at the base weights theta_0 is

    F_jj = sum_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta_j)^2 ],

with labels drawn from the model and gradients of single samples (TaLoS, arXiv 2504.02620).
`talos.calibration.estimators` says which labels are drawn. They depend on (seed, round, sample,
draw) alone, so scores do not depend on the batch size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.batches import evaluation_mode, logits_and_positions
from talos.calibration.capture import REMEDY, Capture, dtypes_of
from talos.calibration.estimators import (
    Draws,
    Estimator,
    Labels,
    Logits,
    Target,
    checked_logits,
)
from talos.calibration.left_out import warn_of_left_out
from talos.calibration.ranks import AGREE, Waves, facts_of, total
from talos.calibration.sharded import check_sharded
from talos.distributed import check_same, errors_on_all_ranks, rank, reshard, world_size
from talos.errors import TalosRuntimeError, TalosValueError
from talos.names import check_module, named_modules, unwrapped
from talos.params import Rows, select_parameters

__all__ = [
    "CalibrationProgress",
    "FisherScores",
    "LogitsFn",
    "Scorer",
    "evaluating",
    "fisher_diag",
]

LogitsFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]

# Of the self-test, by norm: far above rounding, in float32 and where a gradient has 16 bits, and
# far below the error of a use that is missed or counted twice.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1


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
class CalibrationProgress:
    """How far a calibration is; one comes after every batch, or every batch of each rank.

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
    group: dist.ProcessGroup | None = None,
) -> FisherScores:
    """Score weights by the diagonal of the Fisher information, summed over samples.

    The model runs in eval mode. Weights, `.grad`, flags of modules and parameters are as before
    when this returns or raises. One backward of a batch gives the gradients of all its samples.

    Args:
        model: the model, on any device.
        batches: of samples, each passed to `logits_fn`.
        logits_fn: `logits_fn(model, batch)` returns [B, C], or [B, T, V] for a label at each of T
            positions, or a pair of that and a bool [B, T], the positions that count. By default a
            tensor is the input, of a pair the first is, and a mapping goes to `forward` by keyword
            without its labels, or whole where `forward` has one argument. `.logits` is taken from
            outputs of transformers, and padding does not count. `talos.choice_logits` scores
            answers to choose among. The model must run in the calling thread.
        params: "maskable", "qk", "attention" or a regular expression over names; see
            `talos.params`.
        target: "log_prob", or "logit": the gradient of the drawn class's logit, as in the code
            that the paper's authors released.
        draws: labels drawn per sample, over which scores are averaged, or "exact": the expectation
            over all classes, which takes one backward a class.
        labels: "sampled" from the model's own distribution, or "importance": drawn where gradients
            are large and weighted accordingly. That has a smaller variance at the same price.
        seed: of the labels.
        check: first score three samples of the first batch by single backwards, too, and raise if
            the two differ.
        on_progress: called after each batch.
        group: the ranks that share the work; see `talos.calibrate`.

    Returns:
        Scores, fp32, in the shapes of the parameters and on their devices. Of a model that FSDP2
        shards they are DTensors, sharded by rows over all ranks.

    Raises:
        TalosValueError: an option is out of range, there are no samples, no parameter is selected,
            logits or scores are not finite, or samples cannot be told apart.
        TalosTypeError: `logits_fn` did not return a floating-point tensor.
        TalosRuntimeError: a parameter is used in a way that cannot be scored, or not at all, or
            samples influence one another, or a batch was made under `torch.inference_mode`, or the
            self-test failed.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = fisher_diag(model, [torch.eye(2)], draws="exact")
        >>> scores["weight"].shape, scores.samples
        (torch.Size([3, 2]), 2)
    """
    with errors_on_all_ranks(group):
        check_module(model)
        reshard(model)
        estimator = Estimator(target, draws, labels, seed)
        candidates = select_parameters(model, params)
        check_sharded(candidates, check, group)
        agreed = {**vars(estimator), "params": params, "check": check}
        agreed |= facts_of(model, candidates) if world_size(group) > 1 else {}
    check_same(agreed, AGREE, group)
    warn_of_left_out(model, candidates, params)
    found = FisherScores()
    logits_fn = logits_fn or logits_and_positions
    scorer = Scorer(1, on_progress, logits_fn, estimator, check, group)
    with evaluating(model) as bare, Capture(bare, candidates, group=group) as capture:
        found.update(*scorer.score(capture, bare, batches))
    found.samples = scorer.total or 0
    found.rows = candidates.rows
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model without its wrappers into eval mode; flags are restored afterwards."""
    bare = unwrapped(model)
    with evaluation_mode(bare):
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


@dataclass
class Scorer:
    """Scores the batches of one round after another.

    Attributes:
        group: the ranks that share the batches.
        halving: whether the last round is scored in two halves of its batches.
        done: rounds.
        total: samples of the last of them.
    """

    rounds: int
    on_progress: Callable[[CalibrationProgress], None] | None
    logits_fn: LogitsFn
    estimator: Estimator
    check: bool
    group: dist.ProcessGroup | None = None
    halving: bool = False
    done: int = 0
    total: int | None = None
    batches: int = 0

    def score(
        self, capture: Capture, model: nn.Module, batches: Iterable[Any]
    ) -> list[dict[str, Tensor]]:
        """Score every sample of one round.

        Returns:
            The scores of the round, or those of its first and of its second half.
        """
        reshard(model)
        samples = count = 0
        found = []
        waves = Waves(batches, self.group)
        if capture.sharded and waves.idle:
            raise TalosValueError(
                "batches must hold at least one on each rank of a sharded model, got none on rank "
                f"{waves.idle[0]}; pass smaller batches"
            )
        half = self._half(waves.length)
        me = rank(self.group)
        for batch, wave in waves.until(half):
            if count == half:
                found.append(total(capture, self.group))
            with errors_on_all_ranks(self.group) as sizes:
                if wave[me] and self.check and self.done == samples == 0:
                    self._self_test(capture, model, batch)
                runs = wave[me] or capture.sharded  # all ranks have a part of each weight
                logits = self._forward(capture, model, batch) if runs else None
                sizes.append(len(logits.values) if logits is not None and wave[me] else 0)
            with errors_on_all_ranks(self.group):
                if logits is not None:
                    first = samples + sum(sizes[:me])
                    for losses, share, last in self.estimator.losses(logits, self.done, first):
                        capture.backward(losses, share if wave[me] else 0.0, last=last)
                    del losses  # and the activations: not every last backward frees them
                del logits
                samples += sum(sizes)
                count += sum(wave)
                if self.on_progress is not None:
                    self.on_progress(
                        CalibrationProgress(self.done + 1, self.rounds, samples, self.total)
                    )
        if samples == 0 and self.done:
            raise TalosValueError(
                f"batches must be re-iterable, got none in round {self.done + 1} after "
                f"{self.total} samples in the first; pass a list or a DataLoader"
            )
        if samples == 0:
            raise TalosValueError(
                "batches must hold at least one sample, got 0; check the data set"
            )
        found.append(total(capture, self.group))
        self.done, self.total, self.batches = self.done + 1, samples, count
        return found

    def _half(self, length: int | None) -> int | None:
        """Return the first batch of the second half of the last round, if that is known."""
        if self.done + 1 < self.rounds or not self.halving:
            return None
        return (self.batches or length or 0) // 2 or None

    def _forward(
        self, capture: Capture, model: nn.Module, batch: Any, scored: bool = True
    ) -> Logits:
        try:
            with capture.forward(scored=scored):
                found = self.logits_fn(model, batch)
            return checked_logits(found)
        except RuntimeError as error:
            if "inference tensor" not in str(error).lower():
                raise
            raise TalosRuntimeError(
                "batches and model must hold tensors that autograd can use, got some made under "
                "torch.inference_mode; clone() them outside of it, or make them under torch.no_grad"
            ) from error

    def _self_test(self, capture: Capture, model: nn.Module, batch: Any) -> None:
        """Compare the scores of three samples with those of single backwards."""
        losses = self._any_losses(self._forward(capture, model, batch))
        chosen = sorted({0, len(losses) // 2, len(losses) - 1})
        only = torch.zeros_like(losses).index_fill_(
            0, torch.tensor(chosen, dtype=torch.int64, device="cpu").to(losses.device), 1.0
        )
        capture.backward(losses * only)
        scores = capture.take()
        losses = self._any_losses(self._forward(capture, model, batch, scored=False))
        _compare(capture, scores, [losses[row] for row in chosen])

    def _any_losses(self, logits: Logits) -> Tensor:
        """Losses [B] that reach whatever any draw or class reaches."""
        return torch.stack([each for each, _, _ in self.estimator.losses(logits, 0, 0)]).sum(0)


def _compare(capture: Capture, scores: dict[str, Tensor], losses: list[Tensor]) -> None:
    """Refuse scores that differ from the squared gradients of the losses, 0-dim each."""
    params = [each.param for each in capture.candidates.values()]
    expected = {name: torch.zeros_like(score) for name, score in scores.items()}
    dtypes = dtypes_of(losses[0])
    scale = 1.0 if torch.float16 in dtypes else capture.scale
    for loss in losses:
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(loss * scale, params, retain_graph=True, allow_unused=True)
        for score, grad in zip(expected.values(), grads, strict=True):
            if grad is not None:
                wide = grad.to_dense().float()  # an embedding's may be sparse
                score.addcmul_(wide, wide)
    tolerance = _HALF_TOLERANCE if dtypes & {torch.float16, torch.bfloat16} else _TOLERANCE
    # A parameter that no loss depends on, a bias of keys, has a gradient of rounding errors alone.
    largest = max(float(score.mean()) for score in expected.values() if score.numel())
    for name, each in capture.candidates.items():
        rows = slice(*(each.rows or (None,)))
        ours, wanted = scores[name][rows].double(), expected[name][rows].double()
        error, size = float((ours - wanted).norm()), float(wanted.norm())
        noise = tolerance**2 * largest * wanted.numel() ** 0.5
        if not error <= tolerance * size + noise:
            raise TalosRuntimeError(
                f"scores of {name} must equal those of single backwards, got a relative difference "
                f"of {error / max(size, 1e-300):.2g} on {len(losses)} samples: the model uses it "
                f"in a way that is not seen here; {REMEDY}"
            )
