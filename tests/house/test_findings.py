"""The tables of docs/findings.md and of README are those of the committed studies.

python -m tests.house.test_findings     prints the tables, to be put into the page
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "benches" / "results" / "amd-epyc-2-cores" / "experiments"
NAMES = ("text", "vision", "decoder", "density", "causes", "overlap-same", "overlap-different")
WORDS = {"against_best": "behind the best", "against_first": "ahead of TaLoS"}
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


def lead(entry: Figures, key: str) -> str:
    """How far a row's sum is from another's in points, paired; nothing for that row itself."""
    gap = entry[key]
    return "" if gap is None else with_interval(gap["added"])


def apart(matrix: Sequence[Sequence[float]]) -> float:
    """The mean of a matrix over the tasks without its diagonal."""
    return fmean(x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j)


def table(name: str, other: str = "against_best") -> list[str]:
    """The table of a study: a line for each row, the best sum first.

    Args:
        name: of the study.
        other: "against_best": how far each row is behind the best one; "against_first": how far it
            is ahead of the first one.
    """
    results = study(name)
    titles = {row["row"]: row["title"] for row in results["rows"]}
    lines = [
        f"| method | rate | alone, % | one model, % | of alone, % | {WORDS[other]}, points |",
        "|---|---|---|---|---|---|",
    ]
    for each in sorted(results["summary"], key=lambda each: -each["figures"]["added"]["value"]):
        figures = each["figures"]
        cells = (
            titles[each["row"]],
            f"{each['lr']:g}",
            percent(figures["alone"]["value"]),
            with_interval(figures["added"]),
            percent(figures["normalised"]["value"]),
            lead(each, other),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, f"| pretrained | | {percent(zero_shot(results))} | | | |"]


def rates(name: str) -> list[str]:
    """The mean accuracy on validation data by learning rate, alone and as one model."""
    results = study(name)
    (found,) = results["rates"].values()
    lines = ["| method | rate: alone → one model, % |", "|---|---|"]
    for row in results["rows"]:
        points = [
            f"{point['lr']:g}: {percent(point['alone'])} → {percent(point['added'])}"
            for point in found.get(row["row"], ())
        ]
        lines.append(f"| {row['title']} | {', '.join(points)} |")
    return lines


def negation(name: str) -> list[str]:
    """What each row forgets: accuracy on the task to forget, and on the others."""
    results = study(name)
    titles = {row["row"]: row["title"] for row in results["rows"]}
    lines = ["| method | the task to forget, % | the other tasks, % |", "|---|---|---|"]
    for each in sorted(results["summary"], key=lambda each: each["figures"]["target"]["value"]):
        figures = each["figures"]
        cells = titles[each["row"]], *map(with_interval, (figures["target"], figures["control"]))
        lines.append(f"| {' | '.join(cells)} |")
    before = percent(zero_shot(results))
    return [*lines, f"| pretrained | {before} | {before} |"]


def regime(name: str) -> list[str]:
    """How far a vector leaves its own task and the linear regime, first seed."""
    results = study(name)
    parts = ("interference", "linearity", "sensitivity")
    interference, linearity, sensitivity = (next(iter(results[part].values())) for part in parts)
    lines = [
        "| method | own task, % | other tasks, % | answers of the expansion, % "
        "| without its mask, % |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        key, size = row["row"], len(results["tasks"])
        own = fmean(interference[key][place][place] for place in range(size))
        pruned = sensitivity.get(key)
        cells = (
            row["title"],
            percent(own),
            percent(apart(interference[key])),
            percent(fmean(each["equal"] for each in linearity[key].values())),
            "" if pruned is None else percent(fmean(map(fmean, pruned))),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def departure(name: str) -> list[str]:
    """How far training leads from the first-order expansion, and tasks from one another."""
    results = study(name)
    drift, disentanglement = (
        next(iter(results[part].values())) for part in ("drift", "disentanglement")
    )
    lines = ["| method | gradient drift, % | disentanglement error, % |", "|---|---|---|"]
    for row in results["rows"]:
        ends = [points[-1]["ratio"] for points in drift[row["row"]].values()]
        errors = [each for line in disentanglement[row["row"]]["error"] for each in line]
        lines.append(f"| {row['title']} | {percent(fmean(ends))} | {percent(fmean(errors))} |")
    return lines


def masks(names: Sequence[str]) -> list[str]:
    """Where the first row's masks are, and how far those of different tasks overlap."""
    lines = [
        "| study | in Q and K, % | tensors with a selected weight | overlap of tasks (IoU), % "
        "| stability, % |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        results = study(name)
        ((row, found),) = list(next(iter(results["masks"].values())).items())[:1]
        (overlaps,) = results["mask_iou"].values()
        each = list(found.values())
        attention = fmean(
            sum(part["nnz"] for part in mask["structure"] if part["kind"] in ("query", "key"))
            / mask["nnz"]
            for mask in each
        )
        touched = fmean(mask["tensors_touched"] for mask in each)
        cells = (
            name,
            percent(attention),
            f"{touched:.0f} of {each[0]['tensors']}",
            percent(apart(overlaps[row])),
            percent(fmean(mask["stability"] for mask in each)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def penalties() -> list[str]:
    """What each form does to the sum, with the weight and the rate that were taken."""
    found = json.loads((STUDIES.parent / "penalties.json").read_text())["records"]
    lines = [
        "| training | w | rate | alone, % | one model, % | gain over plain, points |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        if not each["taken"]:
            continue
        cells = (
            f"{each['method']}, {each['form']}",
            f"{each['weight']:g}" if each["weight"] else "",
            f"{each['lr']:g}",
            percent(each["alone"]),
            with_interval(each["absolute"]),
            "" if each["form"] == "plain" else with_interval(each["gain"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    **{name: partial(table, name) for name in NAMES},
    "causes": partial(table, "causes", "against_first"),
    "rates": partial(rates, "text"),
    "rates of vision": partial(rates, "vision"),
    "regime": partial(regime, "text"),
    "departure": partial(departure, "density"),
    "negation": partial(negation, "text"),
    "masks": partial(masks, ("text", "vision", "decoder")),
    "penalties": penalties,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_of_the_committed_results(name: str) -> None:
    page = (ROOT / "docs" / "findings.md").read_text()
    assert "\n".join(TABLES[name]()) in page


if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"\n{name}\n", *make(), sep="\n")
