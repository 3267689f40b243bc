"""The figures of a study, each as a picture and as a table of the same numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from talos.app.report import comparisons, curves, matrices
from talos.app.report.results import Results
from talos.app.report.rows import Table
from talos.app.report.svg import Panel, picture, save

__all__ = ["FIGURES", "Figure"]


@dataclass(frozen=True)
class Figure:
    """One kind of figure, which every model of a study may have.

    Attributes:
        name: what `talos plot` calls it.
        title: a heading.
        about: what it shows and how to read it, in a sentence or three.
        needs: what a recipe must have for it.
        panels: its plots of a model, none where the results have nothing for it.
        table: the numbers of its plots of a model.
        apart: whether each plot says all by itself, as one of each row does.
    """

    name: str
    title: str
    about: str
    needs: str
    panels: Callable[[Results, str], list[Panel]]
    table: Callable[[Results, str], Table]
    apart: bool = False

    def available(self, results: Results, model: str | None = None) -> bool:
        """Return whether the results have what it needs, of a model or of any."""
        models = [each["name"] for each in results["models"]] if model is None else [model]
        return any(self.panels(results, each) for each in models)

    def draw(self, results: Results, model: str) -> str:
        """Return its plots below each other as one SVG element without a background."""
        return picture(f"{self.name}-{model}", self.panels(results, model))

    def pictures(self, results: Results, model: str) -> list[str]:
        """Return SVG elements for a page that lays them out: those plots apart that can be."""
        panels = self.panels(results, model)
        parts = [[panel] for panel in panels] if self.apart else [panels] if panels else []
        return [picture(f"{self.name}-{model}-{n}", part) for n, part in enumerate(parts)]

    def save(self, results: Results, model: str, path: Path) -> None:
        """Write its plots below each other to a file, .svg or .png, on white ground.

        Raises:
            TalosRuntimeError: matplotlib is missing.
            TalosOSError: the file cannot be written.
        """
        save(path, self.name, self.panels(results, model))


def _measure(name: str) -> str:
    return f'"{name}" among the measures of [evaluation]'


FIGURES: Mapping[str, Figure] = {
    each.name: each
    for each in (
        Figure(
            "summary",
            "All tasks in one model",
            "The test accuracy of the model with all task vectors added, mean over the tasks, with "
            "its 95 % interval over test examples, seeds and the choice of the coefficient; small "
            "strokes are the seeds. With one seed the interval holds no chance of training. Below: "
            "the difference from the first row, on the same examples and seeds. Chance rarely "
            "explains an interval that does not touch the line.",
            "two tasks",
            comparisons.summary,
            comparisons.summary_table,
        ),
        Figure(
            "coefficient",
            "Accuracy against the coefficient",
            "The mean accuracy on validation data of the pretrained model plus the coefficient "
            "times the sum of all task vectors, mean over the seeds. Large markers: the "
            "coefficients that were chosen; small ones only tell the curves apart.",
            "two coefficients",
            curves.coefficient,
            curves.coefficient_table,
        ),
        Figure(
            "rates",
            "Learning rates",
            "The accuracy on validation data for each learning rate that was tried, first seed. "
            "Large markers: "
            "the rate that was chosen, the best of all vectors added.",
            "a method with two learning rates",
            curves.rates,
            curves.rates_table,
        ),
        Figure(
            "density",
            "Accuracy against the density",
            "The test accuracy for each share of trained entries, with 95 % intervals as bands. "
            "Dotted: the rows without several densities.",
            "a method with two densities",
            curves.density,
            curves.density_table,
        ),
        Figure(
            "negation",
            "Forgetting a task",
            "The pretrained model minus a task vector: the test accuracy on the task to forget, "
            "against the mean of the other tasks. First seed; 95 % intervals over test examples "
            "and the choice of the coefficient. Better is up and left.",
            _measure("negation"),
            comparisons.negation,
            comparisons.negation_table,
        ),
        Figure(
            "interference",
            "Interference",
            "What one task's vector of the first seed, added alone, does to every task: 100 % is "
            "the accuracy of the pretrained model. The diagonal is its own task. "
            "Elsewhere less than 100 % is harm.",
            _measure("interference"),
            matrices.interference,
            matrices.over_tasks_table("interference"),
            apart=True,
        ),
        Figure(
            "disentanglement",
            "Disentanglement error",
            "How often the model with two vectors of the first seed predicts otherwise than the "
            "model with the task's own vector alone, the sum of both tasks' shares. 0 everywhere: "
            "the vectors do not disturb each other.",
            _measure("disentanglement"),
            matrices.disentanglement,
            matrices.disentanglement_table,
            apart=True,
        ),
        Figure(
            "linearity",
            "Linearity",
            "Each task's tuned model against its first-order expansion at the same weights, a "
            "marker for each task, first seed. On the dashed line both are as good: training "
            "stayed in the linear regime, where task vectors add up.",
            _measure("linearity"),
            comparisons.linearity,
            comparisons.linearity_table,
        ),
        Figure(
            "drift",
            "Gradient drift",
            "How far training moves the gradient of the output from where it began, mean over the "
            "tasks, first seed. 0: the model behaves like its first-order expansion.",
            _measure("drift"),
            curves.drift,
            curves.drift_table,
        ),
        Figure(
            "structure",
            "What the masks select",
            "The share of each layer's and kind's entries that is trained, mean over the tasks, "
            "first seed. A dot: there are no such weights.",
            "a method with masks",
            matrices.structure,
            matrices.structure_table,
            apart=True,
        ),
        Figure(
            "overlap",
            "Overlap of the masks",
            "How far the first seed's masks of two tasks select the same entries: those in both, "
            "divided by those in either. Random masks of density d have d / (2 - d).",
            "a method with masks",
            matrices.overlap,
            matrices.over_tasks_table("mask_iou"),
            apart=True,
        ),
        Figure(
            "sensitivity",
            "Sensitivity transfer",
            "The entries that one task's mask selects are set to zero, first seed; every task is "
            "judged without them. 100 % is the accuracy of the pretrained model: near it "
            "everywhere, no task needs what the mask selects.",
            _measure("sensitivity"),
            matrices.sensitivity,
            matrices.over_tasks_table("sensitivity"),
            apart=True,
        ),
        Figure(
            "cost",
            "Costs",
            "The median time of a step of training, the peak memory of the process, and the size "
            "of one task vector's file.",
            "a trained method",
            comparisons.cost,
            comparisons.cost_table,
        ),
    )
}
