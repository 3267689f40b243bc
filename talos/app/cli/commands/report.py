"""`talos report`: the page of an experiment, made from its results.json."""

from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import next_step, on_interrupt, stdout
from talos.app.cli.options import Overwrite, Study, check_output
from talos.app.cli.studies import as_written, results_file

__all__ = ["EXAMPLES", "report"]

EXAMPLES = ("talos report demo", "talos report demo/results.json --out page.html")


def report(
    results: Study,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The page to write (.html); by default report.html in DIR, made anew."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show who won an experiment, and write its report: one HTML page with tables and figures."""
    file = results_file(results)
    page = out or file.parent / "report.html"
    check_output(page, overwrite or out is None, ".html")
    from talos.app.cli.tables import show_results
    from talos.app.report import load_results, write_report

    loaded = load_results(file)
    with as_written(file), on_interrupt("nothing was written"):
        show_results(stdout(), loaded)
        write_report(loaded, page)
    next_step(f"open {page} in a browser")
