"""README's accuracies are those of the committed run of the demo."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from talos.tensors import readable_size

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benches" / "results" / "amd-epyc-2-cores" / "demo.json"


def test_the_table_of_the_demo_is_that_of_its_results() -> None:
    results = json.loads(RUN.read_text())
    figures = [each["figures"] for each in results["summary"]]
    pretrained = fmean(each["value"] for each in results["zero_shot"]["minilm"].values())

    def row(words: str, of: Callable[[dict[str, Any]], str]) -> str:
        return f"| {words} | {' | '.join(map(of, figures))} |"

    def interval(key: str) -> Callable[[dict[str, Any]], str]:
        def of(found: dict[str, Any]) -> str:
            each = found[key]
            return f"{percent(each['value'])} % [{percent(each['low'])}, {percent(each['high'])}]"

        return of

    before = f"single-task test accuracy, mean (before training: {percent(pretrained)} %)"
    sizes = [readable_size(run["bytes"]) for run in results["runs"]]
    expected = [
        row(before, lambda found: f"{percent(found['alone']['value'])} %"),
        row("all four task vectors in one model, mean [95 % interval]", interval("added")),
        row("merged accuracy divided by single-task accuracy", interval("normalised")),
        row(
            "negation: accuracy lost on the task to forget",
            lambda found: f"{percent(pretrained - found['target']['value'])} points",
        ),
        f"| file of a task vector, bfloat16 | {' | '.join(sizes)} |",
    ]
    readme = (ROOT / "README.md").read_text()
    assert [line for line in expected if line not in readme] == []


def percent(share: float) -> str:
    return f"{100 * share:.1f}"
