"""The tables of docs/findings.md are those of the committed studies.

python -m tests.house.test_findings     prints the tables, to be put into the page
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pytest

from talos.app.report.rows import number, percent
from tests.house.studies import (
    ROOT,
    Figures,
    markdown,
    pretrained,
    results,
    study,
    with_interval,
)

NAMES = ("text", "vision", "decoder", "density", "causes", "overlap-same", "overlap-different")
WORDS = {"against_best": "behind the best", "against_first": "ahead of TaLoS"}


def titles(found: Figures) -> dict[str, str]:
    """The title of each row."""
    return {row["row"]: row["title"] for row in found["rows"]}


def measured(found: Figures, part: str) -> Any:
    """A measure of a study's one model, by row."""
    (by_row,) = found[part].values()
    return by_row


def apart(matrix: Sequence[Sequence[float]]) -> float:
    """The mean of a matrix over the tasks without its diagonal."""
    return fmean(x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j)


def table(name: str, other: str = "against_best") -> str:
    """The table of a study: a line for each row, the best sum first.

    Args:
        name: of the study.
        other: "against_best": how far each row is behind the best one; "against_first": how far it
            is ahead of the first one.
    """
    found = study(name)
    named, rows = titles(found), []
    for each in sorted(found["summary"], key=lambda each: -each["figures"]["added"]["value"]):
        figures, gap = each["figures"], each[other]
        rows.append(
            [
                named[each["row"]],
                number(each["lr"], "g"),
                percent(figures["alone"]["value"]),
                with_interval(figures["added"]),
                percent(figures["normalised"]["value"]),
                with_interval(gap["added"]) if gap else "",
            ]
        )
    rows.append(["pretrained", "", pretrained(found), "", "", ""])
    last = f"{WORDS[other]}, points"
    return markdown(("method", "rate", "alone, %", "one model, %", "of alone, %", last), rows)


def rates(name: str) -> str:
    """The mean accuracy on validation data by learning rate, alone and as one model."""
    found = study(name)
    swept = measured(found, "rates")
    rows = [
        (
            title,
            ", ".join(
                f"{point['lr']:g}: {percent(point['alone'])} → {percent(point['added'])}"
                for point in swept[row]
            ),
        )
        for row, title in titles(found).items()
    ]
    return markdown(("method", "rate: alone → one model, %"), rows)


def negation(name: str) -> str:
    """What each row forgets: accuracy on the task to forget, and on the others."""
    found = study(name)
    named, rows = titles(found), []
    for each in sorted(found["summary"], key=lambda each: each["figures"]["target"]["value"]):
        ends = (with_interval(each["figures"][key]) for key in ("target", "control"))
        rows.append((named[each["row"]], *ends))
    rows.append(("pretrained", pretrained(found), pretrained(found)))
    return markdown(("method", "the task to forget, %", "the other tasks, %"), rows)


def regime(name: str) -> str:
    """How far a vector leaves its own task and the linear regime, first seed."""
    found = study(name)
    parts = ("interference", "linearity", "sensitivity")
    interference, linearity, sensitivity = (measured(found, part) for part in parts)
    rows = [
        (
            title,
            percent(fmean(line[place] for place, line in enumerate(interference[row]))),
            percent(apart(interference[row])),
            percent(fmean(each["equal"] for each in linearity[row].values())),
            percent(fmean(map(fmean, sensitivity[row]))) if row in sensitivity else "",
        )
        for row, title in titles(found).items()
    ]
    head = ("own task, %", "other tasks, %", "answers of the expansion, %", "without its mask, %")
    return markdown(("method", *head), rows)


def departure(name: str) -> str:
    """How far training leads from the first-order expansion, and tasks from one another."""
    found = study(name)
    drift, maps = measured(found, "drift"), measured(found, "disentanglement")
    rows = [
        (
            title,
            percent(fmean(points[-1]["ratio"] for points in drift[row].values())),
            percent(fmean(map(fmean, maps[row]["error"]))),
        )
        for row, title in titles(found).items()
    ]
    return markdown(("method", "gradient drift, %", "disentanglement error, %"), rows)


def masks(names: Sequence[str]) -> str:
    """Where the masks of TaLoS are, and how far those of different tasks overlap."""
    rows = []
    for name in names:
        found = study(name)
        of_tasks = list(measured(found, "masks")["talos"].values())
        attention = fmean(
            sum(part["nnz"] for part in mask["structure"] if part["kind"] in ("query", "key"))
            / mask["nnz"]
            for mask in of_tasks
        )
        touched = fmean(mask["tensors_touched"] for mask in of_tasks)
        rows.append(
            (
                name,
                percent(attention),
                f"{touched:.0f} of {of_tasks[0]['tensors']}",
                percent(apart(measured(found, "mask_iou")["talos"])),
                percent(fmean(mask["stability"] for mask in of_tasks)),
            )
        )
    head = ("in Q and K, %", "tensors with a selected weight", "overlap of tasks (IoU), %")
    return markdown(("study", *head, "stability, %"), rows)


def penalties() -> str:
    """What each form does to the sum, over all seeds, with the weight and the rate it chose."""
    rows = [
        (
            f"{each['method']}, {each['form']}",
            number(each["weight"] or None, "g"),
            number(each["lr"], "g"),
            percent(each["alone"]["value"]),
            with_interval(each["absolute"]),
            "" if each["form"] == "plain" else with_interval(each["gain"]),
        )
        for each in results("penalties.json")["summary"]
    ]
    head = ("training", "w", "rate", "alone, %", "one model, %", "gain over plain, points")
    return markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(table, name) for name in NAMES},
    "causes": partial(table, "causes", "against_first"),
    "rates": partial(rates, "text"),
    "rates of vision": partial(rates, "vision"),
    "rates of decoder": partial(rates, "decoder"),
    "regime": partial(regime, "text"),
    "departure": partial(departure, "density"),
    "negation": partial(negation, "text"),
    "masks": partial(masks, ("text", "vision", "decoder")),
    "penalties": penalties,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_of_the_committed_results(name: str) -> None:
    assert TABLES[name]() in (ROOT / "docs" / "findings.md").read_text()


def test_most_of_the_gap_on_the_decoder_is_one_task() -> None:
    found = study("decoder")

    def mean(row: str, part: str, *, spam: bool) -> float:
        runs = [run for run in found["runs"] if run["row"] == row]
        tasks = [run["addition"]["tasks"] if part == "added" else run["single"] for run in runs]
        return fmean(e["value"] for t in tasks for n, e in t.items() if (n == "spam") == spam)

    def both(part: str, *, spam: bool) -> list[str]:
        return [percent(mean(row, part, spam=spam)) for row in ("talos", "nonlinear")]

    text = " ".join((ROOT / "docs" / "findings.md").read_text().split())
    spam, others = both("single", spam=True), both("single", spam=False)
    gap = mean("nonlinear", "added", spam=False) - mean("talos", "added", spam=False)
    assert f"reach {spam[0]} %, those of full fine-tuning {spam[1]} %" in text
    assert f"({others[0]} and {others[1]} % alone), and its sum is {percent(gap)} points" in text
    by_seed = [each["figures"]["added"]["by_seed"] for each in found["summary"]]
    gaps = [percent(full - sparse) for sparse, _, full in zip(*by_seed, strict=True)]
    assert f"{gaps[0]}, {gaps[1]} and {gaps[2]} points behind full fine-tuning" in text


if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"\n{name}\n", make(), sep="\n")
