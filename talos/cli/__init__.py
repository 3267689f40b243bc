"""The command line: `talos demo | calibrate | train | merge | eval | inspect | report | bench`.

Only this package and `talos.demo`, `talos.report`, `talos.costs` import typer, rich and matplotlib.
"""

from talos.cli.app import main

__all__ = ["main"]
