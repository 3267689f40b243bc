"""`talos report`: the page of an experiment, made from its results.json."""

from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import next_step, on_interrupt, stdout
from talos.app.cli.options import Overwrite, check_input, check_output
from talos.errors import TalosError, TalosOSError, TalosValueError

__all__ = ["EXAMPLES", "report"]

EXAMPLES = ("talos report demo", "talos report demo/results.json --out page.html")


def report(
    results: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The folder of an experiment, or its results.json."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The page to write (.html); by default report.html in DIR, made anew."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show who won an experiment, and write its report: one HTML page with tables and figures."""
    file = _file(results)
    page = out or file.parent / "report.html"
    check_output(page, overwrite or out is None, ".html")
    from talos.app.cli.tables import show_results
    from talos.app.report import load_results, write_report

    loaded = load_results(file)
    try:
        show_results(stdout(), loaded)
        with on_interrupt("nothing was written"):
            write_report(loaded, page)
    except TalosError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise TalosValueError(
            f"DIR must hold results as `talos experiment` writes them, got {file} with another "
            f"structure ({error!r:.100}); run `talos experiment` again"
        ) from error
    next_step(f"open {page} in a browser")


def _file(path: Path) -> Path:
    """Return the results.json of a folder, or the file itself."""
    if not path.is_dir():
        check_input("DIR", path)
        return path
    file = path / "results.json"
    if not file.exists():
        raise TalosOSError(
            f"DIR must hold a results.json, got {path} without; `talos experiment RECIPE "
            f"--out {path}` writes it when it ends"
        )
    return file
