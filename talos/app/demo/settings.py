"""The settings of a run of the demo, and its progress."""

from collections.abc import Callable
from dataclasses import dataclass, field

from talos.app.models import takes_images
from talos.app.tasks.splits import DEFAULT_SIZES
from talos.errors import TalosValueError
from talos.methods import METHODS
from talos.options import fraction, integer, positive

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
"""Every method that the demo can compare, with its title in the report."""


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's numbers.

    Attributes:
        model: as `talos.app.models.load_encoder` takes it; without `tasks` it must read texts.
        tasks: names of tasks, built-in ones if `run_demo` is given no others; empty for the first
            `task_count` of those available.
        task_count: number of tasks where none are named.
        seed: of the calibration's labels, the batches and the bootstrap.
        density: fraction of the weights that the sparse methods train.
        rounds: calibration rounds.
        samples: calibration samples, of a smaller task all there are.
        steps: training steps of each method; LoTA takes them twice.
        batch_size: examples per training step.
        max_length: tokens per text.
        lr: learning rate of the sparse method (SparseAdam).
        nonlinear_lr: learning rate of fine-tuning all weights (AdamW); other methods have their
            usual one.
        sizes: train, validation and test examples of each task; `talos eval` judges the same rows
            if they are the default ones.
        grid: the scaling coefficients tried on validation data are linspace(0, 1, grid).
        control_share: share of the control's pretrained accuracy that negation must keep.
        bootstrap: resamples of a confidence interval.
        methods: the methods to compare; the first is talos, whose masks the report shows.

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
    sizes: tuple[int, int, int] = DEFAULT_SIZES
    grid: int = 21
    control_share: float = 0.95
    bootstrap: int = 2000
    calibration_batch_size: int = field(default=32, kw_only=True)
    evaluation_batch_size: int = field(default=128, kw_only=True)
    methods: tuple[str, ...] = field(default=("talos", "nonlinear"), kw_only=True)

    def __post_init__(self) -> None:
        """Refuse settings that cannot run, before anything is loaded."""
        if takes_images(self.model) and not self.tasks:
            raise TalosValueError(
                f"model must read texts, got {self.model}, which reads images; take minilm or a "
                "folder, or tasks of images"
            )
        for name in ("density", "control_share"):
            fraction(name, getattr(self, name))
        for name in ("lr", "nonlinear_lr"):
            positive(name, getattr(self, name))
        for name in (
            *("rounds", "samples", "steps", "batch_size", "bootstrap"),
            *("calibration_batch_size", "evaluation_batch_size"),
        ):
            integer(name, getattr(self, name), 1)
        if (len(self.tasks) or self.task_count) < 2:
            given = ", ".join(self.tasks) or self.task_count
            raise TalosValueError(
                f"tasks must name at least two tasks, got {given}; addition and negation need them"
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
        integer("grid", self.grid, 2)
        integer("max_length", self.max_length, 3)

    def rate(self, method: str) -> float:
        """Return the peak learning rate of a method."""
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
        """Return settings of a run of about two minutes, with wide confidence intervals."""
        return cls(
            model=model,
            seed=seed,
            methods=methods,
            task_count=2,
            samples=128,
            steps=30,
            grid=11,
        )


@dataclass(frozen=True)
class Progress:
    """The progress of a run of the demo.

    Attributes:
        phase: load, zero-shot, calibrate, train, save, single tasks, addition, negation or report.
        method: the method's title, or None for a phase that all methods share.
        task: the task's name, or None for a phase that all tasks share.
        done: steps of this phase that are done.
        total: all steps of this phase.
        loss: the training loss of the last step.
    """

    phase: str
    method: str | None
    task: str | None
    done: int
    total: int
    loss: float | None = None


OnProgress = Callable[[Progress], None]
