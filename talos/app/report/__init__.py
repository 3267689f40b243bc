"""One demo's results as tables, figures and a single HTML file that loads nothing from elsewhere.

`results.json` is the source (its schema: `talos.app.report.results`): `load_results` checks it,
`render` turns it into a page, `write_report` puts the page on disk in one atomic step. The figures
need matplotlib (the extra `report`); reading, checking and `headline` do not.
"""

from talos.app.report.page import render, write_report
from talos.app.report.results import SCHEMA, SCHEMA_VERSION, headline, load_results, save_results

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "headline",
    "load_results",
    "render",
    "save_results",
    "write_report",
]
