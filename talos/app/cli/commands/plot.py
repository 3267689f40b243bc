"""`talos plot`: one figure of an experiment, as a picture and as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from talos.app.cli.console import next_step, note, on_interrupt, stdout, table
from talos.app.cli.options import Overwrite, Study, check_choice, check_output
from talos.app.cli.studies import as_written, results_file
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from talos.app.report.results import Results

__all__ = ["EXAMPLES", "facts", "plot"]

EXAMPLES = (
    "talos plot summary demo --out summary.svg",
    "talos plot interference demo --out interference.png --model minilm",
)


def plot(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The figure: {figures}.")],
    results: Study,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The picture to write (.svg or .png); by default NAME.svg in DIR, made anew.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model of the experiment; by default its first one."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw one figure of an experiment, and show its numbers.

    An experiment has the figures that its recipe measures; the report shows them all.
    """
    from talos.app.report.figures import FIGURES
    from talos.app.report.results import load_results

    check_choice("NAME", name, FIGURES)
    file = results_file(results)
    picture = out or file.parent / f"{name}.svg"
    check_output(picture, overwrite or out is None, (".svg", ".png"))
    loaded, figure = load_results(file), FIGURES[name]
    with as_written(file):
        of = _model(loaded, name, model)
        head, lines = figure.table(loaded, of)
        with on_interrupt("nothing was written"):
            figure.save(loaded, of, picture)
    shown = table(head[:1], head[1:])
    for line in lines:
        shown.add_row(*map(Text, line))
    note(figure.about)
    stdout().print(shown)
    if model is None and len(loaded["models"]) > 1:
        note(f"of {of}; the others: {', '.join(_names(loaded, of))}; pass --model for one of them")
    next_step(f"open {picture}")


def _model(results: "Results", name: str, model: str | None) -> str:
    """Return the model to draw: the one that is given, or the first that has the figure."""
    from talos.app.report.figures import FIGURES

    names = _names(results)
    if model is not None:
        check_choice("--model", model, names)
    for each in names if model is None else [model]:
        if FIGURES[name].available(results, each):
            return each
    here = [figure.name for figure in FIGURES.values() if figure.available(results, model)]
    raise TalosValueError(
        f"NAME must be a figure that DIR has, got {name}, for which a recipe needs "
        f"{FIGURES[name].needs}; DIR has {', '.join(here) or 'none'}"
    )


def _names(results: "Results", without: str | None = None) -> Sequence[str]:
    return [each["name"] for each in results["models"] if each["name"] != without]


def facts() -> dict[str, str]:
    """Return what fills the braces in the help."""
    from talos.app.report.figures import FIGURES

    return {"figures": ", ".join(FIGURES)}
