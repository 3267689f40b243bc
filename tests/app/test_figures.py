"""The figures of an experiment: drawn alone, beside each other, and as tables of their numbers."""

import copy
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure as Canvas

from talos.app.cli import main
from talos.app.report.figures import FIGURES
from talos.app.report.rows import row_style
from talos.app.report.style import VARIABLES
from talos.app.report.svg import Panel, picture
from tests.app.report_data import FIRST, made_up

HEAT_MAPS = ("structure", "overlap", "interference", "disentanglement", "sensitivity")
MODEL = "minilm"
Results = dict[str, Any]


def studied() -> Results:
    """Results of one model that have every figure: two rows differ in their density alone."""
    results = made_up((MODEL,))
    first, second = results["rows"][:2]
    second["title"], second["method"] = "TaLoS, density 0.2", "talos"
    second["settings"] = {**first["settings"], "density": 0.2}
    return results


def smallest() -> Results:
    """Results of one row, two tasks and one seed, without masks and measures."""
    results = made_up((MODEL,))
    results["tasks"] = results["tasks"][:2]
    results["rows"] = results["rows"][:1]
    results["rows"][0]["settings"] = {}
    kept = [task["name"] for task in results["tasks"]]
    results["runs"] = [r for r in results["runs"] if (r["row"], r["seed"]) == (FIRST, 0)]
    results["summary"] = [each for each in results["summary"] if each["row"] == FIRST]
    for part in ("interference", "disentanglement", "linearity", "sensitivity", "drift"):
        results[part] = {}
    for part in ("masks", "mask_iou"):
        results[part] = {}
    [run], [summary] = results["runs"], results["summary"]
    run["negation"] = dict.fromkeys(kept)
    run["single"] = {task: run["single"][task] for task in kept}
    summary["figures"] |= {"target": None, "control": None}
    for each in summary["figures"].values():
        if each:
            each["by_seed"] = each["by_seed"][:1]
    results["rates"][MODEL] = {FIRST: results["rates"][MODEL][FIRST][:1]}
    results["zero_shot"][MODEL] = {task: results["zero_shot"][MODEL][task] for task in kept}
    return results


def painted(panels: list[Panel]) -> tuple[list[tuple[float, float]], list[str]]:
    """Return the points and the texts that plots show, not those of lines without a label."""
    points, words = [], []
    for panel in panels:
        axes = Canvas().add_subplot()
        panel.paint(axes)
        for line in axes.lines:
            if not str(line.get_label()).startswith("_"):
                points += list(zip(*map(list, line.get_data()), strict=True))
        words += [text.get_text().strip() for text in axes.texts]
    return points, words


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    results = studied()
    return {name: figure.draw(results, MODEL) for name, figure in FIGURES.items()}


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_stands_alone(name: str, drawn: dict[str, str]) -> None:
    tree = ElementTree.fromstring(drawn[name])
    assert tree.tag == "svg"
    assert {each.tag for each in tree.iter()} <= {
        *("svg", "defs", "style", "g", "path", "text", "tspan", "use", "clipPath", "rect"),
    }
    assert "://" not in drawn[name]
    assert all(use.startswith("url(#") for use in re.findall(r"url\([^)]*", drawn[name]))
    texts = ["".join(each.itertext()) for each in tree.iter("text")]
    assert len(texts) > 4


def test_ids_do_not_collide_on_one_page(drawn: dict[str, str]) -> None:
    panel = [Panel(1.0, lambda axes: axes.plot([0, 1], [0, 1], marker="o"))]
    page = "".join(drawn.values()) + picture("a b", panel) + picture("a-b", panel)
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > len(FIGURES)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) == set(ids)


@pytest.mark.parametrize("name", sorted(set(FIGURES) - set(HEAT_MAPS)))
def test_every_colour_has_a_dark_one(name: str, drawn: dict[str, str]) -> None:
    used = set(re.findall(r"(?:fill|stroke): (#\w+)", drawn[name]))
    assert used <= set(VARIABLES)
    texts = re.findall(r"<text[^>]*>", drawn[name])
    assert all("fill: #" in text for text in texts)  # without it text is black


def test_a_picture_is_the_same_in_every_run(drawn: dict[str, str]) -> None:
    assert FIGURES["negation"].draw(studied(), MODEL) == drawn["negation"]


def test_no_two_rows_look_alike() -> None:
    results = {"rows": [{"row": str(place)} for place in range(16)]}
    styles = [row_style(results, str(place)) for place in range(16)]
    assert len({(each.colour, each.marker) for each in styles}) == 16
    assert len({each.marker for each in styles[:8]}) == 8  # not by their colours alone


def test_rates_are_not_rounded_and_do_not_run_into_each_other() -> None:
    results = studied()
    tried = (2.5e-5, 1.5e-4, 3.5e-4, 3.6e-4)
    point = results["rates"][MODEL][FIRST][0]
    results["rates"][MODEL] = {FIRST: [{**point, "lr": lr} for lr in tried]}
    figure = FIGURES["rates"]
    lines = figure.table(results, MODEL)[1]
    assert [line[1] for line in lines] == ["2.5e-05", "0.00015", "0.00035", "0.00036"]
    axes = Canvas().add_subplot()
    figure.panels(results, MODEL)[0].paint(axes)
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["2.5e-05", "0.00015", "0.00035"]


def test_what_is_of_the_first_seed_says_so() -> None:
    of_all = {"summary", "coefficient", "density", "cost"}
    for name, figure in FIGURES.items():
        assert ("first seed" in figure.about.lower()) == (name not in of_all), name


@pytest.mark.parametrize("name", ["coefficient", "rates", "density", "linearity"])
def test_the_table_has_the_points_of_the_curves(name: str) -> None:
    results, figure = studied(), FIGURES[name]
    points, _ = painted(figure.panels(results, MODEL))
    _, lines = figure.table(results, MODEL)
    cells = {word for line in lines for cell in line for word in re.findall(r"[\d.]+", cell)}
    shown = {f"{y:.1f}" for _, y in points}
    assert len(shown) > 5
    assert shown <= cells


def test_the_table_of_drift_has_its_points() -> None:
    results = studied()
    points, _ = painted(FIGURES["drift"].panels(results, MODEL))
    _, lines = FIGURES["drift"].table(results, MODEL)
    assert {(line[0], cell) for line in lines for cell in line[1:]} == {
        (str(step), f"{ratio:.3g}") for step, ratio in points
    }


@pytest.mark.parametrize("name", [*HEAT_MAPS[1:], "cost"])
def test_the_table_has_the_numbers_in_the_picture(name: str) -> None:
    results, figure = studied(), FIGURES[name]
    _, words = painted(figure.panels(results, MODEL))
    _, lines = figure.table(results, MODEL)
    assert len(words) > 5
    assert set(words) <= {cell for line in lines for cell in line}


def test_the_table_of_masks_has_the_numbers_in_the_picture() -> None:
    results, figure = studied(), FIGURES["structure"]
    _, words = painted(figure.panels(results, MODEL))
    cells = [float(cell) for line in figure.table(results, MODEL)[1] for cell in line[2:]]
    assert [float(word) for word in words] == pytest.approx(cells, abs=0.551)  # no decimal there


def test_the_table_of_the_summary_has_estimates_and_differences() -> None:
    results = studied()
    head, lines = FIGURES["summary"].table(results, MODEL)
    for line, each in zip(lines, results["summary"], strict=True):
        assert len(line) == len(head)
        for cell, key in zip(line[1:4], ("alone", "added", "normalised"), strict=True):
            found = [f"{100 * each['figures'][key][end]:.1f}" for end in ("value", "low", "high")]
            assert cell == "{} ({} to {})".format(*found)
    assert lines[0][4] == ""
    gap = results["summary"][1]["against_first"]["added"]
    value, low, high = (f"{100 * gap[end]:+.1f}" for end in ("value", "low", "high"))
    assert lines[1][4] == f"{value} ({low} to {high})"


def test_the_table_of_negation_has_the_pretrained_model_and_each_row() -> None:
    results = studied()
    _, lines = FIGURES["negation"].table(results, MODEL)
    before = [n["target_zero_shot"]["value"] for n in results["runs"][0]["negation"].values()]
    assert lines[0][:2] == ("pretrained model", f"{100 * sum(before) / len(before):.1f}")
    assert len(lines) == 1 + len(results["rows"])
    target = results["summary"][0]["figures"]["target"]
    assert lines[1][1].startswith(f"{100 * target['value']:.1f} (")


def test_every_table_is_whole() -> None:
    results = studied()
    for figure in FIGURES.values():
        head, lines = figure.table(results, MODEL)
        assert lines
        assert {len(line) for line in lines} == {len(head)}, figure.name


def test_the_smallest_study_has_what_it_measured() -> None:
    results = smallest()
    here = [name for name, figure in FIGURES.items() if figure.available(results)]
    assert here == ["summary", "coefficient", "cost"]
    for name in here:
        assert FIGURES[name].draw(results, MODEL).startswith("<svg")
        assert FIGURES[name].table(results, MODEL)[1]
    assert FIGURES["drift"].pictures(results, MODEL) == []


def test_a_page_has_a_picture_for_each_row_but_no_legend_twice() -> None:
    results = studied()
    assert len(FIGURES["overlap"].pictures(results, MODEL)) == 2  # of the rows with masks
    [rates] = FIGURES["rates"].pictures(results, MODEL)
    assert rates.count("non-linear fine-tuning") == 1


def test_figures_are_of_the_models_that_have_them() -> None:
    results = made_up()
    one, two = (model["name"] for model in results["models"])
    del results["interference"][one]
    figure = FIGURES["interference"]
    assert not figure.available(results, one)
    assert figure.available(results, two)
    assert figure.available(results)


def test_a_matrix_may_lack_a_number() -> None:
    results = studied()
    results["interference"][MODEL][FIRST][0][1] = None
    _, words = painted(FIGURES["interference"].panels(results, MODEL))
    assert "·" in words
    assert FIGURES["interference"].table(results, MODEL)[1][0][3] == ""


def test_a_coefficient_that_one_seed_did_not_try_is_left_out() -> None:
    results = studied()
    run = next(each for each in results["runs"] if each["row"] == FIRST)
    run["addition"]["grid"] = run["addition"]["grid"][:16]
    _, lines = FIGURES["coefficient"].table(results, MODEL)
    found = {line[0]: line[1] for line in lines}
    assert found["0.75"] != ""
    assert found["0.8"] == ""


def test_coefficients_are_not_rounded() -> None:
    results = studied()
    for run in results["runs"]:
        run["addition"]["grid"][1]["scaling_coef"] = 0.0125
    lines = FIGURES["coefficient"].table(results, MODEL)[1]
    assert "0.0125" in [line[0] for line in lines]


def test_rows_that_differ_in_more_than_the_density_share_no_curve() -> None:
    results = studied()
    assert len(FIGURES["density"].panels(results, MODEL)) == 2
    results["rows"][1]["settings"]["merge"] = "ties"
    assert FIGURES["density"].panels(results, MODEL) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text(json.dumps(made_up()))
    return tmp_path


def test_plot_writes_a_picture_and_shows_its_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", "overlap", "study"]) == 0
    out, err = capsys.readouterr()
    text = (folder / "study" / "overlap.svg").read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "DTD" not in text
    assert "metadata" not in text
    assert "exceptions <b>" in out
    assert "100.0" in out
    assert FIGURES["overlap"].about in err
    assert "of minilm; the others: a <b> & $_$" in err
    assert "open study/overlap.svg" in err
    assert main(["plot", "overlap", "study"]) == 0  # made anew
    lines = ["plot", "overlap", "study/results.json", "--out", "overlap.png", "--model", MODEL]
    assert main(lines) == 0
    assert (folder / "overlap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plot overlap study --model minlm", "--model must be minilm or a <b> & $_$, got minlm"),
        ("plot overlap study --out overlap.svg", "pass --overwrite to replace it"),
        (
            "plot density study",
            "NAME must be a figure that DIR has, got density, for which a recipe needs a method "
            "with two densities; DIR has summary, coefficient, rates, negation",
        ),
    ],
)
def test_plot_refuses_what_the_study_does_not_have(
    line: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "overlap.svg").touch()
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert not (folder / "study" / "density.svg").exists()


def test_plot_explains_a_damaged_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = copy.deepcopy(made_up())
    results["interference"][MODEL][FIRST] = [["x"] * 3] * 3
    (folder / "study" / "results.json").write_text(json.dumps(results))
    assert main(["plot", "interference", "study"]) == 2
    _, err = capsys.readouterr()
    assert "DIR must hold results as `talos experiment` writes them" in err
    assert not (folder / "study" / "interference.svg").exists()
