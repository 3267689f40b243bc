"""`talos demo`: everything at once, with a report to look at."""

from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import Bars, keeping, next_step, say, stdout
from talos.app.cli.options import Model, Overwrite, Seed
from talos.app.cli.tables import accuracies, negation, overview
from talos.app.demo.settings import TITLES
from talos.errors import TalosRuntimeError, TalosValueError

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = (
    "talos demo --out demo --quick",
    "talos demo --out demo",
    "talos demo --out demo --overwrite --seed 1",
    "talos demo --out demo --methods talos,nonlinear,linearized,l_lora",
)


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write; made when missing.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="About two minutes: fewer tasks, steps and examples.")
    ] = False,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help=f"What is compared, separated by commas: {', '.join(TITLES)}; or all, which takes "
            "several times as long.",
        ),
    ] = "talos,nonlinear",
    model: Model = "minilm",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Calibrate, fine-tune, add and negate on real tasks, beside ordinary fine-tuning.

    A sentence encoder and classification tasks made of Python's own sources: nothing is downloaded.
    For each task the weights that matter least are found and trained; the sparse task vectors are
    then added to one model for all tasks, and subtracted to make it forget one. The same is done
    with ordinary fine-tuning of all weights, and with the other --methods that are asked for.
    Takes about ten minutes on two cores.

    Writes results.json, report.html (one file, to look at), vectors/ and masks/.
    """
    from talos.app.demo import DemoSettings, Progress, kept, run_demo
    from talos.app.demo.folder import prepare
    from talos.app.report import headline

    make = DemoSettings.quick if quick else DemoSettings
    settings = make(model=model, seed=seed, methods=_parse_methods(methods))
    prepare(out, overwrite)
    _check_installed()
    with keeping(lambda: kept(out)), Bars() as bars:

        def show(progress: Progress) -> None:
            method = progress.method and progress.method.split(" (")[0].split(" fine")[0]
            label = " · ".join(part for part in (progress.phase, method, progress.task) if part)
            bars.show(label, progress.done, progress.total, progress.loss)

        results = run_demo(settings, out, overwrite=True, on_progress=show)
    console = stdout()
    console.print("\n[bold]test accuracy in % with 95 % intervals[/bold]")
    if len(results["methods"]) > 2:
        console.print(overview(results))
    else:
        console.print(accuracies(results))
        console.print("\n[bold]negation: target down, control kept[/bold]")
        console.print(negation(results))
    console.print()
    for sentence in headline(results):
        say(console, sentence)
    say(console, f"\nreport: {out / 'report.html'}")
    names = [task["name"] for task in results["tasks"]]
    first, second = (out / "vectors" / f"talos-{name}.safetensors" for name in names[:2])
    next_step(
        console,
        f"open {out / 'report.html'} in a browser",
        f"talos inspect {first}",
        f"talos merge {first}:0.6 {second}:-0.4 --out edit.safetensors",
        f"talos eval --data {names[0]} --data {names[1]} --vector edit.safetensors",
    )


def _parse_methods(text: str) -> tuple[str, ...]:
    """Reads --methods: talos first, then the others in one order."""
    names = list(TITLES) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in TITLES]
    if unknown or "talos" not in names or len(set(names)) < len(names):
        raise TalosValueError(
            f"--methods must be all or different names of {', '.join(TITLES)}, talos among them, "
            f"got {text}"
        )
    return tuple(name for name in TITLES if name in names)


def _check_installed() -> None:
    """Refuses to start ten minutes of work whose report could not be drawn."""
    import importlib.util

    for name in ("transformers", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise TalosRuntimeError(
                f"the demo must have {name}, got no such module; pip install 'talos-sparse[demo]'"
            )
