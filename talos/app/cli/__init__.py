"""The command line: `talos demo | calibrate | train | merge | eval | inspect | report | bench`.

Only this package and `talos.app.demo`, `talos.app.report`, `talos.app.costs` import typer, rich and
matplotlib.
"""

from talos.app.cli.app import main

__all__ = ["main"]
