"""The command line: `talos demo | calibrate | train | extract | merge | export | eval | ...`.

Only this package imports typer and rich.
"""

from talos.app.cli.app import main

__all__ = ["main"]
