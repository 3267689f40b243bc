"""What the commands that run a recipe share: the run with its bars, and the dry run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talos.app.cli.console import (
    Bars,
    command,
    next_step,
    note,
    on_interrupt,
    print_line,
    stdout,
    table,
)
from talos.app.cli.options import as_options
from talos.app.experiments.recipe import Recipe
from talos.app.extras import check_installed

__all__ = ["after_run", "duration", "run", "show_plan"]


def run(recipe: Recipe, out: Path, *, overwrite: bool, words: Mapping[str, str]) -> dict[str, Any]:
    """Run a recipe with bars; print its tables, and write its report.

    Args:
        recipe: the recipe.
        out: the folder of the run.
        overwrite: begin anew in the folder of an earlier run.
        words: the option of each of the recipe's keys that a message may begin with.

    Returns:
        The results.
    """
    from talos.app.cli.loading import find_model
    from talos.app.cli.tables import show_results
    from talos.app.experiments.run import Progress, run_experiment
    from talos.app.experiments.store import check, kept
    from talos.app.report import write_report

    with as_options(words):
        check(out, overwrite=overwrite)
        check_installed("matplotlib")
        for model in recipe.models:
            with as_options({"--model": "models"}):
                find_model(model.source)
    with as_options(words), on_interrupt(lambda: kept(out)), Bars() as bars:
        begun = set[str]()

        def show(progress: Progress) -> None:
            if not progress.ended:
                begun.add(progress.label)
                if progress.done == progress.total:  # it is still to be judged or written
                    return
            elif progress.label not in begun:  # a cell that was done before
                return
            else:
                begun.remove(progress.label)
            left = f", about {duration(progress.left)} left" if progress.left else ""
            number = f"cell {progress.cells} of {progress.all_cells}{left} · "
            label = number * (progress.cells > 0) + progress.label
            bars.show(label, progress.done, progress.total, progress.loss)

        results = run_experiment(recipe, out, overwrite=overwrite, on_progress=show, on_note=note)
    show_results(stdout(), results)
    write_report(results, out / "report.html")
    note(f"\nfigures: {out / 'results.json'}; report: {out / 'report.html'}")
    return results


def show_plan(recipe: Recipe, out: Path, *, overwrite: bool) -> None:
    """Print which cells a run would make, and its time, memory and disk, about.

    Args:
        recipe: the recipe.
        out: the folder of the run; cells that are done there are not counted again.
        overwrite: whether the run would make all anew.
    """
    from talos.app.cli.loading import find_model
    from talos.app.experiments.machine import default_device
    from talos.app.experiments.plan import estimates, finished, probe, space
    from talos.app.experiments.run import check_reads, load_tasks
    from talos.app.models import load_encoder
    from talos.tensors import readable_size

    tasks, probes = load_tasks(recipe), {}
    done: dict[str, list[float]] = {}
    for model in recipe.models:
        with as_options({"--model": "models"}):
            find_model(model.source)
        check_reads(model.source, tasks)
    with on_interrupt("nothing was written"), Bars() as bars:
        for model in bars.each("measure a step of each model", recipe.models):
            encoder = load_encoder(model.source).to(default_device())
            probes[model.name] = probe(encoder, tasks[0], recipe)
            kept = {} if overwrite else finished(recipe, model.name, encoder, tasks, out)
            for kind, seconds in kept.items():
                done.setdefault(kind, []).extend(seconds)
    found = estimates(recipe, tasks, probes, done)
    shown = table(["kind of cell"], ["cells", "left", "each, about", "time left, about"])
    for each in found:
        times = (duration(each.each), duration(each.left * each.each))
        shown.add_row(each.kind, f"{each.cells:,}", f"{each.left:,}", *times)
    console = stdout()
    counts = {
        "model": recipe.models,
        "task": tasks,
        "row": recipe.rows,
        "seed": recipe.seeds,
    }
    print_line(console, f"{recipe.title}: " + ", ".join(_count(*each) for each in counts.items()))
    console.print(shown)
    disk, memory = space(recipe, tasks, probes)
    total = sum(each.left * each.each for each in found)
    sizes = f"{readable_size(disk)} of vectors and masks"
    sizes += "" if memory is None else f", {readable_size(memory)} of memory"
    print_line(console, f"in all about {duration(total)} on this machine, {sizes}")
    if done:
        numbers = (sum(map(len, done.values())), sum(each.cells for each in found))
        print_line(console, "{:,} of {:,} cells are done in {}".format(*numbers, out))


def duration(seconds: float) -> str:
    """Format a time with two figures or so, for example "45 s", "12 min", "3 h 20 min".

    Example:
        >>> duration(0.4), duration(45), duration(754), duration(12_000)
        ('0.4 s', '45 s', '13 min', '3 h 20 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def after_run(results: dict[str, Any], out: Path) -> None:
    """Print what a user would do next with an experiment.

    Args:
        results: its results.
        out: its folder.
    """
    from talos.app.report.artefacts import commands

    steps = [command(*line) for _, lines in commands(results, out) for line in lines]
    next_step(f"open {out / 'report.html'} in a browser", command("report", out), *steps)


def _count(word: str, entries: Any) -> str:
    return f"{len(entries)} {word}{'' if len(entries) == 1 else 's'}"
