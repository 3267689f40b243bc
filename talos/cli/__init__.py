"""The command line: `talos demo | calibrate | train | merge | eval | inspect | report`.

Only this package and `talos.demo`, `talos.report` import typer, rich and matplotlib.
"""

from talos.cli.app import main

__all__ = ["main"]
