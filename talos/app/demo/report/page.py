"""The page: headline, tiles and sections around the same results."""

import os

from talos.app.demo.report import accuracies, artefacts, sweep
from talos.app.demo.report.html import escape
from talos.app.demo.report.results import (
    SWEEP_SCHEMA,
    Results,
    check_results,
    headline,
    percent,
    vector_bytes,
)
from talos.app.demo.report.style import CSS
from talos.files import atomic_write
from talos.tensors import readable_size

__all__ = ["render", "write_report"]


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Render the results and write the page in one atomic step.

    Raises:
        TalosValueError: the results are of another schema or lack a key.
        TalosRuntimeError: matplotlib is missing.
        TalosOSError: the file cannot be written.
    """
    page = render(results).encode()
    atomic_write(path, lambda new: new.write_bytes(page))


def render(results: Results) -> str:
    """Render results as one HTML document: styles and figures inline, nothing loaded.

    Raises:
        TalosValueError: the results are of another schema or lack a key.
        TalosRuntimeError: matplotlib is missing.
    """
    check_results(results)
    title, body = (sweep.content if results["schema"] == SWEEP_SCHEMA else _content)(results)
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        '<meta name=color-scheme content="light dark">\n'
        f"<title>talos demo: {escape(title)}</title>\n<style>{CSS}</style>\n"
        "</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _content(results: Results) -> tuple[str, list[str]]:
    """Return the title of a demo's page and the HTML of its sections."""
    count = len(results["tasks"])
    first, *others = headline(results)
    body = [
        "<header>",
        "<p class=eyebrow>talos · sparse fine-tuning and task arithmetic</p>",
        f"<h1>{count} tasks, one encoder: edit it with sparse task vectors</h1>",
        f"<p class=lead>{escape(first)}</p>",
        f"<p class=more>{escape(' '.join(others))}</p>",
        _tiles(results),
        "</header>",
        accuracies.tasks(results),
        accuracies.single(results),
        accuracies.addition(results),
        accuracies.negation(results),
        artefacts.masks(results),
        accuracies.interference(results),
        artefacts.files(results),
        artefacts.timings(results),
        artefacts.next_steps(results),
        artefacts.made(results),
    ]
    return f"{count} tasks", body


def _tiles(results: Results) -> str:
    tiles = []
    for method in results["methods"]:
        added = results["addition"][method["name"]]
        absolute, normalised = (percent(added[k]["value"]) for k in ("absolute", "normalised"))
        tiles.append(
            (
                f"{absolute} %",
                f"accuracy of all tasks in one model, {method['title']}; "
                f"normalised: {normalised} %",
            )
        )
    size = vector_bytes(results, results["methods"][0]["name"])
    tiles.append((readable_size(size), f"a task vector of {results['methods'][0]['title']}"))
    tiles.append((f"{results['timings']['total'] / 60:.1f} min", "for everything on this page"))
    return (
        "<div class=tiles>"
        + "".join(
            f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in tiles
        )
        + "</div>"
    )
