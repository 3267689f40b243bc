"""The demo from end to end: calibrate, fine-tune, add, negate, report."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import talos
from talos.app.demo.folder import clear, prepare
from talos.app.demo.report import save_results, write_report
from talos.app.demo.settings import TITLES, DemoSettings, OnProgress, Progress
from talos.app.demo.summary import Measured, summarise
from talos.app.experiments.judging import TaskModels, calibration_batches, training_batches
from talos.app.experiments.machine import default_device
from talos.app.models import Encoder, load_encoder
from talos.app.provenance import base_of, made_with
from talos.app.tasks import ImageTask, Task, available_tasks, load_task
from talos.errors import TalosValueError
from talos.evaluation import (
    Negation,
    Outcomes,
    addition,
    interference,
    negation,
    scaling_coefs,
)
from talos.masks import Mask
from talos.methods import method_of
from talos.task_vectors import TaskVector
from talos.training import FineTuneStep

__all__ = ["run_demo"]


def run_demo(
    settings: DemoSettings,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda progress: None,
    encoder: Encoder | None = None,
    tasks: Sequence[Task | ImageTask] | None = None,
) -> dict[str, Any]:
    """Run the demo and write `results.json`, `report.html`, `vectors/` and `masks/`.

    Every file is written whole or not at all, `results.json` and `report.html` last.

    Args:
        settings: the settings of the run.
        out: the folder; it is made where it is missing.
        overwrite: replace the files of an earlier demo in the folder; other files stay.
        on_progress: called with a `Progress` at every step.
        encoder: use this encoder instead of `settings.model`; its weights are restored.
        tasks: use these tasks instead of built-in ones of the names in `settings.tasks`.

    Returns:
        The results, see `talos.app.demo.report.results`.

    Raises:
        TalosValueError: a task is unknown, or fewer tasks are available than asked for.
        TalosOSError: the folder is not empty, or cannot be written.
        TalosRuntimeError: a package of the `demo` extra is missing.
    """
    folder = prepare(Path(out), overwrite)
    return _Demo(settings, folder, on_progress).run(encoder, tasks)


class _Demo:
    """The state that the phases share."""

    def __init__(self, settings: DemoSettings, out: Path, on_progress: OnProgress) -> None:
        self.settings = settings
        self.out = out
        self.on_progress = on_progress
        self.phases: list[dict[str, Any]] = []
        self.files: list[dict[str, Any]] = []
        self.training: dict[str, dict[str, Any]] = {name: {} for name in settings.methods}
        self.start = time.perf_counter()

    @contextmanager
    def phase(
        self, name: str, method: str | None = None, task: str | None = None, total: int = 1
    ) -> Iterator[Callable[..., None]]:
        """Time a phase; yield the function to call after each of its steps."""
        start = time.perf_counter()
        title = TITLES[method] if method else None
        done = 0

        def tick(loss: float | None = None) -> None:
            nonlocal done
            done += 1
            self.on_progress(Progress(name, title, task, done, total, loss))

        self.on_progress(Progress(name, title, task, 0, total))
        yield tick
        if done < total:
            self.on_progress(Progress(name, title, task, total, total))
        seconds = round(time.perf_counter() - start, 3)
        self.phases.append({"phase": name, "method": method, "task": task, "seconds": seconds})

    def run(
        self, encoder: Encoder | None, tasks: Sequence[Task | ImageTask] | None
    ) -> dict[str, Any]:
        """Run all phases in order."""
        settings = self.settings
        with self.phase("load") as tick:
            tasks = load_tasks(settings) if tasks is None else tasks
            encoder = encoder or load_encoder(settings.model).to(default_device())
            tick()
        clear(self.out)
        with self.phase("zero-shot", total=2 * len(tasks)) as tick:
            models = TaskModels(encoder, tasks)
            outcomes = models.outcomes(
                max_length=settings.max_length,
                batch_size=settings.evaluation_batch_size,
                resamples=settings.bootstrap,
                seed=settings.seed,
            )
            for task in tasks:
                for split in ("validation", "test"):
                    outcomes.of(split, tasks=[task.name])
                    tick()
        masks = {task.name: self.calibrate(models, task) for task in tasks}
        vectors: dict[str, dict[str, TaskVector]] = {name: {} for name in settings.methods}
        for task in tasks:
            for method in settings.methods:
                mask = masks[task.name] if method == "talos" else None
                vectors[method][task.name] = self.train(models, task, method, mask)
                models.restore_()
        measured = {
            method: self.measure(
                outcomes.through(models.linearized()) if method == "linearized" else outcomes,
                method,
                vectors[method],
            )
            for method in settings.methods
        }
        results = summarise(
            settings,
            models,
            masks=masks,
            measured=measured,
            zero_shot=outcomes.of("test"),
            bootstrap=outcomes.bootstrap,
            training=self.training,
            files=self.files,
        )
        results["timings"] = {"total": self.seconds(), "phases": list(self.phases)}
        save_results(results, self.out / "results.json")  # whatever becomes of the page
        with self.phase("report"):
            write_report(results, self.out / "report.html")
        return results

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return round(time.perf_counter() - self.start, 3)

    def calibrate(self, models: TaskModels, task: Task | ImageTask) -> Mask:
        """Find the least sensitive entries for one task, and save the mask."""
        settings = self.settings
        batches = calibration_batches(
            task,
            models.encoder,
            count=settings.samples,
            batch_size=settings.calibration_batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
        )
        with self.phase("calibrate", "talos", task.name, settings.rounds * len(batches)) as tick:
            mask = talos.calibrate(
                models.classifiers[task.name],
                batches,
                settings.density,
                settings.rounds,
                seed=settings.seed,
                on_progress=lambda progress: tick(),
            )
        path = self.out / "masks" / f"{task.name}.safetensors"
        made = made_with(task, models.encoder, settings.max_length)
        made["base"] = base_of(mask, models.classifiers[task.name])
        mask = replace(mask, metadata=mask.metadata | made)
        mask.save(path)
        self.note_file(path, "mask", None, task.name, mask.nnz)
        return mask

    def train(
        self, models: TaskModels, task: Task | ImageTask, method: str, mask: Mask | None
    ) -> TaskVector:
        """Fine-tune on one task and save its vector; the weights stay tuned."""
        settings = self.settings
        batches = training_batches(
            task,
            models.encoder,
            count=settings.steps * settings.batch_size,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
        )
        losses: list[float] = []
        torch.manual_seed(settings.seed)  # dropout
        chosen = method_of(method, mask, {"density": settings.density})
        rate, total = settings.rate(method), settings.steps * chosen.phases
        with self.phase("train", method, task.name, total) as tick:

            def on_step(step: FineTuneStep) -> None:
                losses.append(step.loss)
                tick(step.loss)

            vector = talos.fine_tune(
                models.classifiers[task.name],
                batches,
                method=chosen,
                steps=settings.steps,
                lr=rate,
                on_step=on_step,
            )
        setup = {"steps": settings.steps, "lr": rate, "seed": settings.seed}
        made = made_with(task, models.encoder, settings.max_length, **setup)
        # What is evaluated are the values of the file: bfloat16, 2 bytes per entry.
        vector = replace(vector, metadata=vector.metadata | made).astype(torch.bfloat16)
        last = losses[-10:]
        self.training[method][task.name] = {
            "steps": total,
            "first_loss": losses[0],
            "last_loss": sum(last) / len(last),
        }
        with self.phase("save", method, task.name):
            path = self.out / "vectors" / f"{method}-{task.name}.safetensors"
            vector.save(path)
        self.note_file(path, "vector", method, task.name, vector.mask.nnz)
        return vector

    def measure(self, outcomes: Outcomes, method: str, vectors: dict[str, TaskVector]) -> Measured:
        """Evaluate the single-task models, their sum and their negations."""
        settings = self.settings
        coefs = scaling_coefs(settings.grid)
        with self.phase("single tasks", method, total=len(vectors)) as tick:
            for task, vector in vectors.items():
                with outcomes.resident(vector):
                    outcomes.of("test", vector)
                    outcomes.of("validation", vector, tasks=[task])
                tick()
        with self.phase("addition", method, total=len(coefs) + 1) as tick:
            added = addition(outcomes, vectors, coefs=coefs, on_point=lambda point: tick())
        negated = {
            task: self.negate(outcomes, method, task, vector, coefs)
            for task, vector in vectors.items()
        }
        return Measured(
            single=outcomes.of_each(vectors, "test"),
            addition=added,
            negation=negated,
            interference=interference(outcomes, vectors),
        )

    def negate(
        self, outcomes: Outcomes, method: str, task: str, vector: TaskVector, coefs: list[float]
    ) -> Negation:
        """Evaluate how far a task's vector makes the model forget it."""
        share = self.settings.control_share
        with self.phase("negation", method, task, len(coefs) + 1) as tick:
            return negation(
                outcomes,
                vector,
                task,
                control_share=share,
                coefs=coefs,
                on_point=lambda point: tick(),
            )

    def note_file(self, path: Path, kind: str, method: str | None, task: str, entries: int) -> None:
        """Keep the facts of a written file for the results."""
        self.files.append(
            {
                "path": path.relative_to(self.out).as_posix(),
                "kind": kind,
                "method": method,
                "task": task,
                "bytes": path.stat().st_size,
                "entries": entries,
            }
        )


def load_tasks(settings: DemoSettings) -> list[Task]:
    """Load the tasks that the settings name, or the first of those available.

    Raises:
        TalosValueError: a task is unknown, or fewer are available than asked for.
    """
    names = list(settings.tasks)
    if not names:
        available = available_tasks()
        if len(available) < settings.task_count:
            raise TalosValueError(
                f"task_count must be at most {len(available)}, the tasks that this Python holds "
                f"enough text for ({', '.join(available)}), got {settings.task_count}"
            )
        names = available[: settings.task_count]
    # Always in the splits of seed 0, as in `talos eval`: no vector is judged on its training data.
    return [load_task(name, sizes=settings.sizes) for name in names]
