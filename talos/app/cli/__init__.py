"""The command line: `talos demo | calibrate | train | merge | eval | compare | inspect | report`.

Only this package imports typer and rich.
"""

from talos.app.cli.app import main

__all__ = ["main"]
