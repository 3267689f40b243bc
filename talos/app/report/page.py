"""The page: who was compared and who won, then the sections with figures and tables."""

import os
from collections.abc import Callable

from talos.app.report import accuracies, artefacts
from talos.app.report.figures import FIGURES
from talos.app.report.headline import chance, compared, remarks, winner
from talos.app.report.html import details, escape, figure, section, table
from talos.app.report.results import Results, check_results
from talos.app.report.style import CSS
from talos.files import atomic_write

__all__ = ["render", "write_report"]

Part = Callable[[str], str]  # the HTML of a part of a section that is about a model


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
    title = escape(results["title"])
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        '<meta name=color-scheme content="light dark">\n'
        f"<title>talos: {title}</title>\n<style>{CSS}</style>\n"
        "</head>\n<body>\n<main>\n"
        "<header><p class=eyebrow>talos · fine-tuning and task arithmetic, compared</p>\n"
        f"<h1>{title}</h1>\n{_answer(results)}</header>\n"
        + "\n".join(_sections(results))
        + "\n</main>\n</body>\n</html>\n"
    )


def _answer(results: Results) -> str:
    """Return the first screen: what was compared, and for each model who won and its table."""
    parts = [f"<p class=lead>{escape(compared(results))}</p>"]
    for model in results["models"]:
        name = model["name"]
        heading = f"<h2>{escape(name)}</h2>" if len(results["models"]) > 1 else ""
        parts.append(
            f"{heading}<p class=lead>{_kept(winner(results, name))}</p>"
            f"{accuracies.answer(results, name)}"
        )
    parts += [f"<p class=more>{escape(line)}</p>" for line in remarks(results)]
    share = results["recipe"].get("evaluation", {}).get("control_share", 0.95)
    legend = {
        "all added": "accuracy of one model with the task vectors of all tasks, mean over the "
        "tasks; the best one is underlined, or all that are level with it",
        "against": "difference from the first row in points, on the same examples and seeds; "
        "better or worse only if its interval leaves out 0 and three seeds were run, with fewer "
        "ahead or behind",
        "alone": "accuracy of each task's own model",
        "normalised": "added divided by alone, task by task; it flatters rows that are weak alone",
        "forgotten task": "accuracy on a task after its vector was subtracted; lower is better; "
        "the first seed alone, interval over test examples and the choice of the coefficient",
        "its other tasks": "accuracy on the others then, first seed: as much is subtracted as they "
        f"allow, which must keep {100 * share:g} % of theirs on validation data",
    }
    lines = "".join(f"<dt>{escape(key)}<dd>{escape(text)}" for key, text in legend.items())
    return "".join(parts) + details(
        "How to read this",
        f"<p>Test accuracy in per cent. Small numbers are 95 % intervals over {chance(results)}; "
        "of twenty such intervals one misses by chance. Coefficients and learning rates were "
        "chosen on validation data; the intervals hold the choice of the coefficient, but not that "
        f"of the rate.</p><dl>{lines}</dl>",
    )


def _kept(text: str) -> str:
    """Return a text as HTML that breaks no line between a number and its sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _sections(results: Results) -> list[str]:
    """Return the sections in the order of the page, without those that have nothing to show."""

    def drawn(name: str, *more: Part, opened: bool = False) -> str:
        """Return the section of a figure: pictures, the same numbers in a table, more tables."""
        shown = FIGURES[name]

        def pictures(model: str) -> str:
            found = shown.pictures(results, model)
            if not found:
                return ""
            head, lines = shown.table(results, model)
            numbers = table(
                [escape(cell) for cell in head],
                [[escape(cell) for cell in line] for line in lines],
            )
            label = f"{shown.title}, {model}"
            grid = "".join(figure(picture, label) for picture in found)
            hidden = numbers if opened else details("The numbers of the figure", numbers)
            return f"<div class=grid>{grid}</div>{hidden}"

        return told(shown.title, shown.about, pictures, *more)

    def told(title: str, about: str, *parts: Part) -> str:
        """Return a section with parts for each model, or nothing where no model has any."""
        found = {m["name"]: "".join(part(m["name"]) for part in parts) for m in results["models"]}
        several = len(found) > 1
        shown = (
            (f"<h3>{escape(model)}</h3>" if several else "") + each
            for model, each in found.items()
            if each
        )
        return section(title, about, *shown) if any(found.values()) else ""

    sections = [
        drawn("summary"),
        section(
            "The tasks",
            "A model answers by comparing the input with each class: a text encoder with the texts "
            "of the classes, a language model by the likelihood of each answer, an image model "
            "with the mean features of each class.",
            accuracies.tasks(results),
        ),
        drawn("rates", lambda model: accuracies.failed_rates(results, model), opened=True),
        told(
            "Addition, task by task",
            "Test accuracy: the task's own model → one model with all vectors added, mean over the "
            "seeds. Small: its 95 % interval over the test examples and the choice of the "
            "coefficient.",
            lambda model: accuracies.added_by_task(results, model),
            lambda model: accuracies.why_zero(results, model, "addition"),
        ),
        drawn("coefficient"),
        drawn("density"),
        drawn(
            "negation",
            lambda model: accuracies.negated_by_task(results, model),
            lambda model: accuracies.why_zero(results, model, "negation"),
        ),
        *map(drawn, ("structure", "overlap", "interference", "disentanglement", "linearity")),
        *map(drawn, ("sensitivity", "drift", "cost")),
        told(
            "Training and files",
            "Means over the tasks and seeds. A task vector's file holds only the entries that were "
            "trained; the checkpoint of all weights is in fp32.",
            lambda model: artefacts.trained(results, model),
        ),
        section(
            "What to do next",
            "Run these in the folder of the study, which has its vectors and masks.",
            artefacts.next_steps(results),
        ),
        section(
            "How it was made",
            "The same recipe on the same machine gives the same numbers. docs/experiments.md says "
            "what each setting means.",
            artefacts.made(results),
        ),
    ]
    return [each for each in sections if each]
