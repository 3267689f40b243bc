"""The demo: a real encoder, real tasks, sparse against dense fine-tuning, one report.

`run_demo` does it from end to end and writes `results.json`, `report.html`, `vectors/` and
`masks/`; `DemoSettings` decides every number; nothing here prints.
"""

from talos.app.demo.folder import kept
from talos.app.demo.run import run_demo
from talos.app.demo.settings import TITLES, DemoSettings, Progress

__all__ = ["TITLES", "DemoSettings", "Progress", "kept", "run_demo"]
