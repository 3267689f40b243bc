"""The demo: a real encoder, real tasks, sparse and dense fine-tuning, one report.

`run_demo` runs it from end to end and writes `results.json`, `report.html`, `vectors/` and
`masks/`. `run_sweep` does so for several densities and seeds. `DemoSettings` holds every number.
Nothing here prints.
"""

from talos.app.demo.folder import kept
from talos.app.demo.run import run_demo
from talos.app.demo.settings import TITLES, DemoSettings, Progress
from talos.app.demo.sweep import run_sweep

__all__ = ["TITLES", "DemoSettings", "Progress", "kept", "run_demo", "run_sweep"]
