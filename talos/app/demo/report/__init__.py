"""One demo's results as tables, figures and a single HTML file that loads nothing from elsewhere.

`load_results` reads and checks a `results.json`, whose schema is in `results`.
`render` makes a page of it, `write_report` writes the page. The figures need matplotlib (the extra
`report`); reading, checking and `headline` do not.
"""

from talos.app.demo.report.page import render, write_report
from talos.app.demo.report.results import (
    SCHEMA,
    SCHEMA_VERSION,
    SWEEP_SCHEMA,
    headline,
    load_results,
    save_results,
)

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "SWEEP_SCHEMA",
    "headline",
    "load_results",
    "render",
    "save_results",
    "write_report",
]
