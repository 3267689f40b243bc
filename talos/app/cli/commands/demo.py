"""`talos demo`: the recipe of the demo, with a few of its keys as options."""

from pathlib import Path
from typing import Annotated, Any

import typer

from talos.app.cli.options import Anew, Length, Model, Seed, as_options
from talos.errors import TalosValueError
from talos.options import integer

__all__ = ["EXAMPLES", "demo", "facts"]

EXAMPLES = (
    "talos demo --out demo --quick",
    "talos demo --out demo --overwrite --seed 1",
    "talos demo --out demo --methods talos,nonlinear,linearized,l_lora",
    "talos demo --data a.csv --data b.csv --steps 200 --out study",
    "talos demo --data a.csv --data b.csv --density 0.05 --density 0.1 --seeds 3 --out study",
)
# The option behind each key of the recipe that a message may begin with.
_OPTIONS = {
    **dict.fromkeys(("tasks", "data", "path"), "--data"),
    "out": "--out",
    "models": "--model",
    "method": "--methods",
    "[[methods]]": "--methods",
    "density": "--density",
    "[calibration] density": "--density",
    "[training] steps": "--steps",
    "[training] max_length": "--max-length",
}


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
            "--quick",
            metavar="",
            help="About two minutes on two idle cores: fewer tasks, steps, examples.",
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
            "times, each is a row of the tables.",
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
    overwrite: Anew = False,
) -> None:
    """Fine-tune a model on several tasks, sparse and dense, and compare the task vectors.

    For each task the demo finds the weights that matter least and trains only those. It adds the
    task vectors to get one model for all tasks, and subtracts one to make the model forget its
    task. It does the same with full fine-tuning, and with other --methods. The built-in tasks are
    made of Python's own sources: nothing is downloaded. They take about 12 minutes on two cores.

    It is `talos experiment demo`, or `quick`, with options for some keys of the recipe. Writes
    results.json, report.html (open it in a browser), cells/, vectors/ and masks/. The same command
    again goes on where it was stopped.
    """
    integer("--seeds", seeds, 1)
    if seed + seeds > 2**64:
        raise TalosValueError(
            f"--seed must be at most {2**64 - seeds} with --seeds {seeds}, got {seed}"
        )
    from talos.app.cli.experiments import after_run, run
    from talos.app.experiments.recipe import TITLES, read_content, recipe_of, takes_density

    content = read_content("quick" if quick else "demo")[0]
    content |= {"models": [model], "seeds": list(range(seed, seed + seeds))}
    if data:
        content["tasks"] = list(data)
    for key, value in (("steps", steps), ("max_length", max_length)):
        if value is not None:
            content["training"] = content.get("training", {}) | {key: value}
    names = list(TITLES) if methods == "all" else [name.strip() for name in methods.split(",")]
    entries: list[dict[str, Any]] = [{"method": name} for name in names]
    if density and len(density) == 1:
        content["calibration"] = content.get("calibration", {}) | {"density": density[0]}
    elif density:
        for entry in entries:
            if takes_density(entry["method"]):
                entry["density"] = list(density)
    content["methods"] = entries
    with as_options(_OPTIONS):
        recipe = recipe_of(content)
    after_run(run(recipe, out, overwrite=overwrite, words=_OPTIONS), out)


def facts() -> dict[str, str]:
    """Return what the help says of the methods."""
    from talos.app.experiments.recipe import TITLES

    return {"methods": ", ".join(TITLES)}
