"""The committed studies, and their figures as tables of Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from talos.app.report.headline import zero_shot
from talos.app.report.rows import percent

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benches" / "results" / "amd-epyc-2-cores"
Figures = Mapping[str, Any]


def results(path: str) -> dict[str, Any]:
    """Committed results."""
    found: dict[str, Any] = json.loads((RESULTS / path).read_text())
    return found


def study(name: str) -> dict[str, Any]:
    """The results of a study."""
    return results(f"experiments/{name}.json")


def pretrained(found: Figures) -> str:
    """The mean accuracy on test examples of a study's one model, in percent."""
    (model,) = found["zero_shot"]
    return percent(zero_shot(found, model))


def with_interval(figure: Figures, sign: str = "") -> str:
    """A share with its interval, in percent."""
    low, high = percent(figure["low"]), percent(figure["high"])
    return f"{percent(figure['value'])}{sign} [{low}, {high}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---")
