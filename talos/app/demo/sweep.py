"""The demo for several densities and seeds: a run for each, and one summary."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from talos.app.demo.folder import clear, prepare
from talos.app.demo.report import save_results, write_report
from talos.app.demo.report.results import FIGURES, SCHEMA_VERSION, SWEEP_SCHEMA
from talos.app.demo.run import run_demo
from talos.app.demo.settings import TITLES, DemoSettings, OnProgress
from talos.app.experiments.machine import machine, versions
from talos.app.models import Encoder
from talos.app.tasks import ImageTask, Task
from talos.errors import TalosValueError
from talos.methods import METHODS
from talos.options import fraction, integer

__all__ = ["run_sweep"]


def run_sweep(
    settings: DemoSettings,
    out: str | os.PathLike[str],
    densities: Sequence[float],
    seeds: Sequence[int],
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda progress: None,
    encoder: Encoder | None = None,
    tasks: Sequence[Task | ImageTask] | None = None,
) -> dict[str, Any]:
    """Run the demo for each density and seed, in `cells/`, and write a summary of all.

    A method that takes no density, as full fine-tuning, runs once a seed: at the first density.

    Args:
        settings: of all runs; its density and seed are not used.
        out: the folder; it is made where it is missing.
        densities: the densities, each once.
        seeds: the seeds, each once.
        overwrite: as of `run_demo`.
        on_progress: as of `run_demo`; the phase begins with density and seed.
        encoder: as of `run_demo`.
        tasks: as of `run_demo`.

    Returns:
        The results of the sweep, see `talos.app.demo.report.results`.

    Raises:
        TalosValueError: a density or seed is out of range or given twice, or as of `run_demo`.
        TalosOSError: as of `run_demo`.
        TalosRuntimeError: as of `run_demo`.
    """
    for density in densities:
        fraction("density", density)
    for seed in seeds:
        integer("seed", seed, 0)
    for name, given in (("densities", densities), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise TalosValueError(f"{name} must differ, at least one, got {list(given)}")
    start = time.perf_counter()
    folder = prepare(Path(out), overwrite, ())
    clear(folder)
    cells, first = [], None
    for place, density in enumerate(densities):
        methods = [name for name in settings.methods if place == 0 or _takes_density(name)]
        for seed in seeds:
            own = replace(settings, density=density, seed=seed, methods=tuple(methods))
            cell = f"cells/density-{density}-seed-{seed}"
            results = run_demo(
                own,
                folder / cell,
                overwrite=True,
                on_progress=_led_by(f"density {density:g} seed {seed}", on_progress),
                encoder=encoder,
                tasks=tasks,
            )
            first = first or results
            figures = {name: _figures(results, name) for name in methods}
            added = results["addition"]
            cells.append(
                {
                    "density": density,
                    "seed": seed,
                    "folder": cell,
                    "figures": figures,
                    "unedited": [name for name in methods if added[name]["scaling_coef"] == 0],
                }
            )
    assert first is not None
    swept = {
        "schema": SWEEP_SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), "device": first["machine"]["device"]},
        "versions": versions(),
        "settings": {
            **asdict(settings),
            "tasks": first["settings"]["tasks"],
            "task_count": first["settings"]["task_count"],
            "density": list(densities),
            "seed": list(seeds),
            "methods": list(settings.methods),
        },
        "tasks": first["tasks"],
        "methods": [{"name": name, "title": TITLES[name]} for name in settings.methods],
        "zero_shot": _mean(first["zero_shot"]),
        "cells": cells,
        "summary": [
            _summary(cells, name, density)
            for name in settings.methods
            for density in (densities if _takes_density(name) else [None])
        ],
        "timings": {"total": round(time.perf_counter() - start, 3)},
    }
    save_results(swept, folder / "results.json")
    write_report(swept, folder / "report.html")
    return swept


def _led_by(words: str, on_progress: OnProgress) -> OnProgress:
    """Return what hands progress on with these words before the phase."""
    return lambda progress: on_progress(replace(progress, phase=f"{words} · {progress.phase}"))


def _takes_density(method: str) -> bool:
    return method == "talos" or any(each.name == "density" for each in fields(METHODS[method]))


def _figures(results: dict[str, Any], method: str) -> dict[str, float]:
    """Return the means over the tasks of one method's run, by the names of `FIGURES`."""
    added, negated = results["addition"][method], results["negation"][method]
    values = (
        _mean(results["single"][method]),
        added["absolute"]["value"],
        added["normalised"]["value"],
        _mean({task: each["target"] for task, each in negated.items()}),
        _mean({task: each["control"] for task, each in negated.items()}),
    )
    return dict(zip(FIGURES, values, strict=True))


def _summary(cells: Sequence[dict[str, Any]], method: str, density: float | None) -> dict[str, Any]:
    """Return mean and range over the seeds of each figure."""
    own = [
        cell["figures"][method]
        for cell in cells
        if method in cell["figures"] and density in (None, cell["density"])
    ]
    found: dict[str, Any] = {"density": density, "method": method, "seeds": len(own)}
    for key in FIGURES:
        values = [figures[key] for figures in own]
        found[key] = {"mean": fmean(values), "low": min(values), "high": max(values)}
    return found


def _mean(estimates: dict[str, dict[str, float]]) -> float:
    return fmean(estimate["value"] for estimate in estimates.values())
