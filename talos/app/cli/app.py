"""The application: its commands, and what an error or Ctrl-C looks like."""

import inspect as inspection
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

import talos
from talos.app.cli.commands import (
    calibrate,
    compare,
    demo,
    evaluate,
    experiment,
    export,
    extract,
    inspect,
    merge,
    plot,
    predict,
    report,
    train,
)
from talos.app.cli.console import Interrupted, printable
from talos.app.cli.options import OF_A_RANK
from talos.app.cli.parsing import Command, usage_message
from talos.app.cli.processes import IN_SEVERAL, errors_of_all, is_loss, joined, several
from talos.errors import TalosError, TalosOSError, TalosRuntimeError, TalosValueError

__all__ = ["app", "main"]

Command.facts = {
    "demo": demo.facts,
    "experiment": experiment.facts,
    "train": train.facts,
    "merge": merge.facts,
    "eval": evaluate.facts,
    "plot": plot.facts,
}

_CTRL_C = 130  # also what typer returns for it

app = typer.Typer(
    name="talos",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _paragraphs(text: str | None) -> str:
    """Join the lines of each paragraph, so that the terminal breaks them by its own width."""
    return "\n\n".join(
        " ".join(part.split()) for part in inspection.cleandoc(text or "").split("\n\n")
    )


for _command, _examples in (
    (demo.demo, demo.EXAMPLES),
    (experiment.experiment, experiment.EXAMPLES),
    (calibrate.calibrate, calibrate.EXAMPLES),
    (train.train, train.EXAMPLES),
    (extract.extract, extract.EXAMPLES),
    (merge.merge, merge.EXAMPLES),
    (evaluate.evaluate, evaluate.EXAMPLES),
    (compare.compare, compare.EXAMPLES),
    (export.export, export.EXAMPLES),
    (predict.predict, predict.EXAMPLES),
    (inspect.inspect, inspect.EXAMPLES),
    (report.report, report.EXAMPLES),
    (plot.plot, plot.EXAMPLES),
):
    app.command(
        "eval" if _command is evaluate.evaluate else _command.__name__,
        cls=Command,
        help=_paragraphs(_command.__doc__),
        epilog="\n".join(("[bold]Examples[/bold]", *(f"  {line}" for line in _examples))),
    )(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"talos {talos.__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    help=_paragraphs(
        """Sparse fine-tuning for task arithmetic.

        Find the weights that matter least, train only those, and edit models with the small task
        vectors that result: add tasks, forget tasks, combine them.

        Start with `talos demo --out demo --quick`. The --help of each command ends with examples.
        """
    ),
)
def _talos(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, metavar="", help="Show the version."
        ),
    ] = False,
) -> None:
    """Show the help where no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif several() > 1 and context.invoked_subcommand not in IN_SEVERAL:
        raise TalosValueError(
            f"talos {context.invoked_subcommand} must run in one process, got {several()} by "
            "WORLD_SIZE; start it without torchrun"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows `talos`; by default the arguments of the process.

    Returns:
        The exit status: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.

    Example:
        >>> main(["--version"])
        talos 0...
        0
    """
    if sys.stdout is None:  # it was closed; its number would be that of the next file
        return _fail(TalosOSError("stdout must be open, got none; redirect it to /dev/null"))
    try:
        with joined():
            return _run(arguments)
    except TalosRuntimeError as error:
        return _fail(error)


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command line; what it raises becomes an exit status and a message."""
    try:
        with warnings.catch_warnings(), errors_of_all():
            warnings.showwarning = _warn
            status = app(
                args=None if arguments is None else list(arguments),
                prog_name="talos",
                standalone_mode=False,
            )
        if status == _CTRL_C:  # where a command does not say itself what it kept
            raise KeyboardInterrupt
        sys.stdout.flush()
        return int(status or 0)
    except (TalosError, typer.TyperException) as error:
        return _fail(error)
    except RuntimeError as error:
        if not is_loss(error):
            raise
        return _fail(
            TalosRuntimeError(
                "every process must run to the end, got one that is gone; its own output may say "
                "why; a training with --checkpoint goes on with --resume"
            )
        )
    except Interrupted as interrupted:
        sys.stderr.write(f"\ninterrupted: {interrupted}\n")
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\ninterrupted: nothing was written\n")
    except OSError as error:
        if error.filename is not None:  # not of stdout
            raise
        # Python's own flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of a pipe (`| head`) has left
            return 1
        return _fail(TalosOSError(f"stdout must be writable, got {error.strerror}"))
    return _CTRL_C


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning in one line, without the place in the code that raised it."""
    sys.stderr.write(f"warning: {printable(' '.join(str(message).split()))}\n")


def _fail(error: TalosError | typer.TyperException) -> int:
    """Print an error in one line."""
    text = usage_message(error) if isinstance(error, typer.TyperException) else str(error)
    text = OF_A_RANK.sub(r"rank \1: ", text, count=1)
    sys.stderr.write(f"error: {printable(' '.join(text.split()))}\n")
    return 2
