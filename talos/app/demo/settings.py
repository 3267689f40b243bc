"""What one run of the demo does, and how it tells where it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from talos.errors import TalosValueError
from talos.methods import METHODS

__all__ = ["TITLES", "DemoSettings", "OnProgress", "Progress"]

TITLES = {
    "talos": "TaLoS (sparse)",
    "nonlinear": "non-linear fine-tuning",
    "linearized": "linearized fine-tuning",
    "l_lora": "L-LoRA",
    "lota": "LoTA",
    "attention_only": "attention only",
    "random": "random mask",
    "magnitude": "magnitude mask",
}
"""Every method that the demo can compare, as the report calls it."""


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's numbers.

    Attributes:
        model: the encoder, as `talos.app.models.load_text_encoder` takes it.
        tasks: names of built-in tasks; empty for the first `task_count` of those available.
        task_count: how many tasks where none are named.
        seed: of the calibration's labels, the batches and the bootstrap.
        density: fraction of the weights that the sparse methods train.
        rounds: calibration rounds.
        samples: calibration samples.
        steps: training steps of each method; LoTA takes them twice.
        batch_size: examples a training step.
        max_length: tokens a text.
        lr: learning rate of the sparse method (SparseAdam).
        nonlinear_lr: learning rate of fine-tuning all weights (AdamW); other methods have their
            usual one.
        sizes: train, validation and test examples of each task.
        grid: the scaling coefficients tried on validation data are linspace(0, 1, grid).
        control_share: share of the control's pretrained accuracy that negation must keep.
        bootstrap: resamples of a confidence interval.
        methods: what is compared, talos first, whose masks the report shows.

    Example:
        >>> DemoSettings(steps=10).lr
        0.001
    """

    model: str = "minilm"
    tasks: tuple[str, ...] = ()
    task_count: int = 4
    seed: int = 0
    density: float = 0.1
    rounds: int = 4
    samples: int = 256
    steps: int = 80
    batch_size: int = 32
    max_length: int = 48
    lr: float = 1e-3
    nonlinear_lr: float = 5e-5
    sizes: tuple[int, int, int] = (1600, 96, 400)
    grid: int = 21
    control_share: float = 0.95
    bootstrap: int = 2000
    calibration_batch_size: int = field(default=32, kw_only=True)
    evaluation_batch_size: int = field(default=128, kw_only=True)
    methods: tuple[str, ...] = field(default=("talos", "nonlinear"), kw_only=True)

    def __post_init__(self) -> None:
        """Refuses what cannot run, before anything is loaded."""
        for name in ("density", "control_share"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise TalosValueError(f"{name} must be in (0, 1], got {value:g}")
        for name in ("lr", "nonlinear_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TalosValueError(f"{name} must be positive and finite, got {value:g}")
        for name in (
            *("rounds", "samples", "steps", "batch_size", "bootstrap"),
            *("calibration_batch_size", "evaluation_batch_size"),
        ):
            if getattr(self, name) < 1:
                raise TalosValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (len(self.tasks) or self.task_count) < 2:
            raise TalosValueError(
                f"tasks must name at least two tasks, got {self.tasks or self.task_count}; "
                "addition and negation need another task to stand beside"
            )
        if len(set(self.tasks)) < len(self.tasks):
            raise TalosValueError(f"tasks must differ, got {', '.join(self.tasks)}")
        if unknown := [name for name in self.methods if name not in TITLES]:
            raise TalosValueError(
                f"methods must be among {', '.join(TITLES)}, got {', '.join(unknown)}"
            )
        if self.methods[:1] != ("talos",) or len(set(self.methods)) < len(self.methods):
            raise TalosValueError(
                f"methods must differ and begin with talos, got {', '.join(self.methods)}; its "
                "masks are part of the report"
            )
        if self.grid < 2:
            raise TalosValueError(f"grid must be at least 2, got {self.grid}")

    def rate(self, method: str) -> float:
        """Tells a method's peak learning rate.

        Args:
            method: one of `methods`.

        Returns:
            The rate.
        """
        own = {"talos": self.lr, "nonlinear": self.nonlinear_lr}
        return own.get(method, METHODS[method].usual_lr)

    @classmethod
    def quick(
        cls,
        *,
        model: str = "minilm",
        seed: int = 0,
        methods: tuple[str, ...] = ("talos", "nonlinear"),
    ) -> "DemoSettings":
        """The same from end to end, in about two minutes: fewer steps, samples and examples.

        Args:
            model: the encoder.
            seed: the seed.
            methods: what is compared.

        Returns:
            Settings whose numbers have wide confidence intervals.
        """
        return cls(
            model=model,
            seed=seed,
            methods=methods,
            task_count=2,
            samples=128,
            steps=30,
            sizes=(960, 96, 240),
            grid=11,
        )


@dataclass(frozen=True)
class Progress:
    """Where a run of the demo is.

    Attributes:
        phase: what is being done: tasks, zero-shot, calibrate, train, evaluate, addition, negation,
            report.
        method: the method's title, or None for what both share.
        task: the task's name, or None for what all share.
        done: steps of this phase that are done.
        total: all its steps.
        loss: the training loss of the last step.
    """

    phase: str
    method: str | None
    task: str | None
    done: int
    total: int
    loss: float | None = None


OnProgress = Callable[[Progress], None]
