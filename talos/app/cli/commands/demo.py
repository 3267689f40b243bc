"""`talos demo`: all steps at once, with a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talos.app.cli.console import Bars, command, next_step, note, on_interrupt, stdout
from talos.app.cli.options import Length, Model, Overwrite, Seed, as_options
from talos.app.extras import check_installed
from talos.errors import TalosValueError
from talos.options import fraction, integer

if TYPE_CHECKING:
    from talos.app.demo import DemoSettings

__all__ = ["EXAMPLES", "demo", "facts"]

EXAMPLES = (
    "talos demo --out demo --quick",
    "talos demo --out demo --overwrite --seed 1",
    "talos demo --out demo --methods talos,nonlinear,linearized,l_lora",
    "talos demo --data a.csv --data b.csv --steps 200 --out study",
    "talos demo --data a.csv --data b.csv --density 0.05 --density 0.1 --seeds 3 --out study",
)
# What messages name otherwise than the options are named.
_OPTIONS = {"tasks": "--data", "densities": "--density", "source": "--model"}


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it is made if missing.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="A task of your own, or a built-in one, as `talos train` takes it; given at least "
            "twice. By default four built-in tasks.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", metavar="", help="About two minutes: fewer tasks, steps and examples."
        ),
    ] = False,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="The methods to compare, separated by commas: {methods}; or all, which "
            "takes several times as long.",
        ),
    ] = "talos,nonlinear",
    model: Model = "minilm",
    density: Annotated[
        list[float] | None,
        typer.Option(
            "--density",
            help="Fraction of the weights to train, in (0, 1], by default 0.1. Given several "
            "times, each is run.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Training steps, by default 80, or 30 with --quick."),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", help="How many seeds to run, from --seed on.")
    ] = 1,
    max_length: Length = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model on several tasks, sparse and dense, and compare the task vectors.

    For each task the demo finds the weights that matter least and trains only those. It adds the
    task vectors to get one model for all tasks, and subtracts one to make the model forget its
    task. It does the same with full fine-tuning, and with other --methods. The built-in tasks are
    made of Python's own sources: nothing is downloaded. They take about 20 minutes on two cores.

    Writes results.json, report.html (open it in a browser), vectors/ and masks/. Of several
    densities or seeds, each run is in a folder of its own under cells/, and the report has means
    and ranges over the seeds.
    """
    integer("--seeds", seeds, 1)
    if seed + seeds > 2**64:
        raise TalosValueError(
            f"--seed must be at most {2**64 - seeds} with --seeds {seeds}, got {seed}"
        )
    from talos.app.cli.loading import find_model
    from talos.app.demo import DemoSettings, Progress, kept, run_demo, run_sweep
    from talos.app.demo.folder import check
    from talos.app.demo.report.tables import show_results

    densities = density or [DemoSettings.density]
    with as_options(_OPTIONS):
        given: dict[str, Any] = {"steps": steps, "max_length": max_length}
        settings = replace(
            (DemoSettings.quick if quick else DemoSettings)(),
            **{key: value for key, value in given.items() if value is not None},
            tasks=tuple(data or ()),
            model=model,
            seed=seed,
            density=densities[0],
            methods=_parse_methods(methods),
        )
        for each in densities:
            fraction("density", each)
        if len(set(densities)) < len(densities):
            raise TalosValueError(f"density must differ, got {' '.join(map(str, densities))}")
        check(out, overwrite)
    check_installed("transformers", "matplotlib")
    find_model(model)
    with as_options(_OPTIONS), on_interrupt(lambda: kept(out)), Bars() as bars:

        def show(progress: Progress) -> None:
            method = progress.method and progress.method.split(" (")[0].split(" fine")[0]
            label = " · ".join(part for part in (progress.phase, method, progress.task) if part)
            bars.show(label, progress.done, progress.total, progress.loss)

        own: dict[str, Any] = {}
        if data is not None:
            settings, own = _own_tasks(settings, data, max_length)
        own |= {"overwrite": overwrite, "on_progress": show}
        several = len(densities) > 1 or seeds > 1
        results = (
            run_sweep(settings, out, densities, range(seed, seed + seeds), **own)
            if several
            else run_demo(settings, out, **own)
        )
    show_results(stdout(), results)
    note(f"\nfigures: {out / 'results.json'}; report: {out / 'report.html'}")
    _next(out, results, model, data)


def _own_tasks(
    settings: "DemoSettings", data: Sequence[str], max_length: int | None
) -> tuple["DemoSettings", dict[str, Any]]:
    """Load the tasks of --data and the model; return the settings and further arguments."""
    from talos.app.cli.loading import check_names, load_data, load_encoder
    from talos.app.cli.reading import show_data, tokens_for

    tasks = [load_data(each) for each in data]
    check_names(tasks)
    encoder = load_encoder(settings.model, *tasks)
    tokens = min(tokens_for(task, encoder, max_length) for task in tasks)
    for task in tasks:
        show_data(task, encoder, tokens)
    names = tuple(task.name for task in tasks)
    own = {"encoder": encoder, "tasks": tasks}
    return replace(settings, tasks=names, max_length=tokens), own


def _next(out: Path, results: dict[str, Any], model: str, data: Sequence[str] | None) -> None:
    names = [task["name"] for task in results["tasks"]]
    method = results["methods"][0]["name"]
    if "cells" in results:
        folder = out / results["cells"][0]["folder"]
        edited = method not in results["cells"][0]["unedited"]
    else:
        folder, edited = out, results["addition"][method]["scaling_coef"] != 0
    first, second = (folder / "vectors" / f"{method}-{name}.safetensors" for name in names[:2])
    tasks = [word for each in list(data or names)[:2] for word in ("--data", each)]
    edit = (
        command("merge", f"{first}:0.6", f"{second}:-0.4", "--out", "edit.safetensors"),
        command("eval", "--model", model, *tasks, "--vector", "edit.safetensors"),
    )
    next_step(
        f"open {out / 'report.html'} in a browser",
        command("inspect", first, second),
        *(edit if edited else ()),
    )


def facts() -> dict[str, str]:
    """Return what the help says of the methods."""
    from talos.app.demo.settings import TITLES

    return {"methods": ", ".join(TITLES)}


def _parse_methods(text: str) -> tuple[str, ...]:
    """Read --methods, in the order of the report; the settings check the names."""
    from talos.app.demo.settings import TITLES

    order = list(TITLES)
    names = order if text == "all" else [name.strip() for name in text.split(",")]
    return tuple(sorted(names, key=lambda name: order.index(name) if name in order else -1))
