"""The command line: `talos demo | calibrate | train | merge | eval | inspect | report`.

Only this package, `talos.app.demo` and `talos.app.report` import typer, rich and matplotlib.
"""

from talos.app.cli.app import main

__all__ = ["main"]
