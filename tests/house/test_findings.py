"""The tables of docs/findings.md and of README are those of the committed studies.

    python -m tests.house.test_findings     prints the tables, to be put into the page
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "benches" / "results" / "amd-epyc-2-cores" / "experiments"
NAMES = ("text", "vision", "decoder", "density", "causes", "overlap-same", "overlap-different")
Figures = Mapping[str, Any]


def study(name: str) -> dict[str, Any]:
    """The results of a study."""
    found: dict[str, Any] = json.loads((STUDIES / f"{name}.json").read_text())
    return found


def percent(share: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def with_interval(figure: Figures) -> str:
    """A share with its interval, in percent."""
    return f"{percent(figure['value'])} [{percent(figure['low'])}, {percent(figure['high'])}]"


def zero_shot(results: Figures) -> float:
    """The pretrained model's mean accuracy on test examples."""
    (tasks,) = results["zero_shot"].values()
    return fmean(each["value"] for each in tasks.values())


def behind(entry: Figures) -> str:
    """How far a row's sum is behind the best row's, paired, in points."""
    best = entry["against_best"]
    if best is None:
        return "best"
    lost = {"value": best["added"]["value"], "low": best["added"]["low"]}
    return with_interval(lost | {"high": best["added"]["high"]})


def table(name: str) -> list[str]:
    """The table of a study: a line for each row, in the order of the sums."""
    results = study(name)
    titles = {row["row"]: row["title"] for row in results["rows"]}
    lines = [
        "| method | rate | alone, % | one model, % | of alone, % | behind the best, points |",
        "|---|---|---|---|---|---|",
    ]
    order = sorted(results["summary"], key=lambda each: -each["figures"]["added"]["value"])
    for each in order:
        figures = each["figures"]
        cells = (
            titles[each["row"]],
            f"{each['lr']:g}",
            percent(figures["alone"]["value"]),
            with_interval(figures["added"]),
            percent(figures["normalised"]["value"]),
            behind(each),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, f"| pretrained | | {percent(zero_shot(results))} | | | |"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_table_of_a_study(name: str) -> None:
    page = (ROOT / "docs" / "findings.md").read_text()
    assert "\n".join(table(name)) in page


if __name__ == "__main__":
    for each in NAMES:
        print(f"\n{each}\n", *table(each), sep="\n")
