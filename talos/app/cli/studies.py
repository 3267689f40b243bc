"""The folder of an experiment, as `talos report` and `talos plot` read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from talos.app.nearest import beside, did_you_mean
from talos.errors import TalosError, TalosOSError, TalosValueError

__all__ = ["as_written", "results_file"]


def results_file(path: Path) -> Path:
    """Return the results.json of a folder, or the file itself.

    Raises:
        TalosOSError: there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        near = did_you_mean(str(path), beside(path))
        raise TalosOSError(f"DIR must be the folder of an experiment, got {path}{near}")
    file = path / "results.json"
    if not file.exists():
        begun = (path / "cells").is_dir()
        where = f"--out {path}" if begun else "--out DIR"
        raise TalosOSError(
            f"DIR must hold a results.json, got {path} without; `talos experiment RECIPE {where}` "
            "writes it when it ends"
        )
    return file


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """Explain what the reading of results with another structure raises."""
    try:
        yield
    except TalosError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise TalosValueError(
            f"DIR must hold results as `talos experiment` writes them, got {file} with another "
            f"structure ({error!r:.100}); run `talos experiment` again"
        ) from error
