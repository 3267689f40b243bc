"""The settings of an experiment: how masks are found, vectors trained, edits judged."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from talos.app.nearest import did_you_mean
from talos.app.tasks.splits import DEFAULT_SIZES
from talos.errors import TalosValueError
from talos.options import as_real, fraction, integer

__all__ = [
    "MEASURES",
    "Calibration",
    "Evaluation",
    "Training",
    "check_choice",
    "check_differ",
    "check_params",
    "check_text",
]

MEASURES = (
    *("addition", "negation", "interference"),
    *("disentanglement", "linearity", "sensitivity", "drift"),
)
"""Everything that an experiment can measure."""

_MAP_POINTS = 11


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a mask is found; see `talos.calibrate`.

    Attributes:
        density: fraction of the maskable weights to train; also of the methods random, magnitude
            and lota.
        rounds: rounds of scoring.
        samples: training examples to score on, of a smaller task all there are.
        batch_size: examples per batch.
        soft: the factor of dropped weights in later rounds.
        draws: labels drawn per example, or "exact".
        labels: "sampled" or "importance".
        target: "log_prob" or "logit".
        params: the candidates.
        select: "lowest", or "highest": the most sensitive entries, a control.
        disjoint: no two tasks share an entry: each is scored in one round, then they take turns,
            and each takes its lowest-scored entries that are free, up to the density.
    """

    density: float = 0.1
    rounds: int = 4
    samples: int = 256
    batch_size: int = 32
    soft: float = 0.01
    draws: int | str = 1
    labels: str = "sampled"
    target: str = "log_prob"
    params: str = "maskable"
    select: str = "lowest"
    disjoint: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be calibrated with."""
        _store(self, density=fraction("density", self.density), soft=fraction("soft", self.soft))
        for name in ("rounds", "samples", "batch_size"):
            integer(name, getattr(self, name), 1)
        if self.draws != "exact":
            integer("draws", self.draws, 1, "an integer of at least 1, or exact")
        check_choice("labels", self.labels, ("sampled", "importance"))
        check_choice("target", self.target, ("log_prob", "logit"))
        check_choice("select", self.select, ("lowest", "highest"))
        check_params(self.params)
        if not isinstance(self.disjoint, bool):
            raise TalosValueError(f"disjoint must be true or false, got {self.disjoint!r}")
        if self.disjoint and self.select != "lowest":
            raise TalosValueError(f"select must be 'lowest' with disjoint, got {self.select!r}")
        if self.labels != "sampled" and (self.draws == "exact" or self.target == "logit"):
            raise TalosValueError(
                "labels must be 'sampled' with the draws 'exact' or the target 'logit', got "
                f"{self.labels!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """How each vector is trained; see `talos.fine_tune`.

    Attributes:
        steps: training steps; LoTA takes them twice.
        batch_size: examples per step.
        max_length: tokens per text.
        sizes: examples of train, validation and test of each task, at most.
        weight_decay: decoupled weight decay.
        warmup: steps of linear warm-up; None: a tenth of the steps.
        accumulate: batches per step.
        autocast: "bfloat16", or None: float32.
    """

    steps: int = 80
    batch_size: int = 32
    max_length: int = 48
    sizes: tuple[int, int, int] = DEFAULT_SIZES
    weight_decay: float = 0.0
    warmup: int | None = None
    accumulate: int = 1
    autocast: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in ("steps", "batch_size", "accumulate"):
            integer(name, getattr(self, name), 1)
        integer("max_length", self.max_length, 3)
        sizes = self.sizes
        if not isinstance(sizes, list | tuple) or len(sizes) != 3:
            raise TalosValueError(
                f"sizes must be three numbers, of train, validation and test, got {sizes!r}"
            )
        _store(self, sizes=tuple(integer("sizes", size, 1) for size in sizes))
        decay = as_real(self.weight_decay)
        if decay is None or not 0.0 <= decay < float("inf"):
            raise TalosValueError(
                f"weight_decay must be finite and at least 0, got {self.weight_decay!r}"
            )
        _store(self, weight_decay=decay)
        if self.warmup is not None:
            kind = f"an integer from 0 to the {self.steps} steps"
            integer("warmup", self.warmup, 0, kind, most=self.steps)
        if self.autocast is not None:
            check_choice("autocast", self.autocast, ("bfloat16",))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, and how.

    Attributes:
        coefficients: the scaling coefficients tried on validation data are linspace(0, 1, n).
        control_share: share of the control's pretrained accuracy that negation must keep.
        resamples: of the bootstrap.
        batch_size: examples per forward pass.
        measures: what is measured, among `MEASURES`.
        pair: the two tasks of the disentanglement map; empty: the first two.
    """

    coefficients: int = 21
    control_share: float = 0.95
    resamples: int = 2000
    batch_size: int = 128
    measures: tuple[str, ...] = MEASURES[:3]
    pair: tuple[str, ...] = ()

    @property
    def map_points(self) -> int:
        """The coefficients of a disentanglement map, each way."""
        return min(_MAP_POINTS, self.coefficients)

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated with."""
        integer("coefficients", self.coefficients, 2)
        _store(self, control_share=fraction("control_share", self.control_share))
        for name in ("resamples", "batch_size"):
            integer(name, getattr(self, name), 1)
        for name in ("measures", "pair"):
            given = getattr(self, name)
            if not isinstance(given, list | tuple) or not all(isinstance(x, str) for x in given):
                raise TalosValueError(f"{name} must be a list of names, got {given!r}")
            check_differ(name, given)
            _store(self, **{name: tuple(given)})
        for each in self.measures:
            check_choice("measures", each, MEASURES)
        if len(self.pair) not in (0, 2):
            raise TalosValueError(f"pair must name two tasks, got {', '.join(self.pair)}")


def check_params(value: Any) -> str:
    """Return the name of a preset or a regular expression over parameters' names.

    Raises:
        TalosValueError: it is none.
    """
    try:
        re.compile(check_text("params", value))
    except re.error as error:
        raise TalosValueError(
            f"params must be a preset or a regular expression, got {value!r}: {error}"
        ) from None
    return str(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is not among the choices; the message proposes the nearest one."""
    known = list(choices)
    if value not in known:
        near = did_you_mean(value, known) if isinstance(value, str) else ""
        raise TalosValueError(f"{name} must be among {', '.join(known)}, got {value!r}{near}")


def check_differ(name: str, values: Sequence[Any]) -> None:
    """Refuse a list that holds a value twice."""
    twice = [each for place, each in enumerate(values) if each in values[:place]]
    if twice:
        raise TalosValueError(
            f"{name} must differ, got {twice[0]!r} twice; leave one out"
            + (", or rename it" if isinstance(twice[0], str) else "")
        )


def check_text(name: str, value: Any) -> str:
    """Return a text that is not empty and has one line.

    Raises:
        TalosValueError: it is none.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise TalosValueError(f"{name} must be a text in one line, got {value!r}")
    return value


def _store(settings: object, **values: Any) -> None:
    """Store settings in the form in which they were read."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)
