"""One experiment's results as tables, figures and a single HTML file that loads nothing.

`load_results` reads and checks a `results.json`, whose schema is in `talos.app.report.results`.
`render` makes a page of it, `write_report` writes the page. The figures need matplotlib (the extra
`report`); reading, checking and `headline` do not.
"""

from talos.app.report.headline import headline
from talos.app.report.page import render, write_report
from talos.app.report.results import SCHEMA, SCHEMA_VERSION, load_results, save_results

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "headline",
    "load_results",
    "render",
    "save_results",
    "write_report",
]
