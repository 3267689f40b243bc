"""`talos report`: make the page of a demo again from its results.json."""

from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import next_step, on_interrupt, stdout
from talos.app.cli.options import Overwrite, check_input, check_output
from talos.errors import TalosError, TalosValueError

__all__ = ["EXAMPLES", "report"]

EXAMPLES = ("talos report demo/results.json --out again.html",)


def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="The results.json of a demo.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write (.html).")],
    overwrite: Overwrite = False,
) -> None:
    """Make the HTML report of a demo again from its results.json, which holds all figures."""
    check_input("RESULTS", results)
    check_output(out, overwrite, ".html")
    from talos.app.cli.tables import show_results
    from talos.app.report import load_results, write_report

    loaded = load_results(results)
    try:
        show_results(stdout(), loaded)
        with on_interrupt("nothing was written"):
            write_report(loaded, out)
    except TalosError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise TalosValueError(
            f"RESULTS must be as `talos demo` wrote it, got {results} with another structure "
            f"({error!r:.100}); run `talos demo` again"
        ) from error
    next_step(f"open {out} in a browser")
