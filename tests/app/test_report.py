"""The report: who won in words, every number on the page, well-formed, escaped, self-contained."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from talos.app import report
from talos.app.cli import main
from talos.app.report import curves
from talos.app.report.headline import winner
from talos.app.report.rows import percent
from talos.errors import TalosOSError, TalosValueError
from tests.app.report_data import FIRST, MODELS, ROWS, TASKS, made_up

VOID = {"meta", "br", "hr", "img", "input", "link"}
OPTIONAL = {"dt", "dd"}  # end tags that HTML lets a page leave out


class Page(HTMLParser):
    """Collects text, attributes and the nesting of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is drawn, which takes most of the time of a page."""
    monkeypatch.setattr("talos.app.report.figures.picture", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def page() -> tuple[Page, str]:
    """The rendered page, parsed."""
    text = report.render(made_up(MODELS[1:]))
    parser = Page()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser, text


def test_every_number_is_on_the_page(page: tuple[Page, str]) -> None:
    words = " ".join(page[0].words)
    results = made_up(MODELS[1:])
    for each in results["summary"]:
        for figure in each["figures"].values():
            assert percent(figure["value"]) in words
            assert f"{percent(figure['low'])}–{percent(figure['high'])}" in words
        assert f"{each['lr']:g}" in words
        gap = each["against_first"]
        assert gap is None or f"{100 * gap['added']['value']:+.1f}" in words
    for model in MODELS[1:]:
        for task, each in results["zero_shot"][model].items():
            assert task in words
            assert percent(each["value"]) in words
        for points in results["rates"][model].values():
            for point in points:
                assert all(percent(point[key]) in words for key in ("alone", "added"))
        for part in ("interference", "sensitivity"):
            for matrix in results[part][model].values():
                assert all(re.search(rf"\b{100 * x:.1f}?", words) for row in matrix for x in row)
    for text in ("2,001", "251", "501", "2.4 MB", "45.0 MB", "1,060,000", "0.85", "85.3 min"):
        assert text in words, text
    for text in ("25.0", "16.7", "A CPU <4>", "2.11.0", "control share", "density 0.1"):
        assert text in words, text


@pytest.mark.usefixtures("undrawn")
def test_the_first_screen_says_what_was_compared_and_who_won() -> None:
    text = report.render(made_up())
    (header,) = re.findall(r"<header>(.*?)</header>", text, re.DOTALL)
    results = made_up()
    leads = re.findall(r"<p class=lead>(.*?)</p>", header)
    assert leads[0].startswith(
        "TaLoS (density 0.1), random mask and non-linear fine-tuning: 3 ways of fine-tuning "
        "minilm and a &lt;b&gt; &amp; $_$, compared on 3 tasks with 3 seeds."
    )
    assert len(leads) == 1 + len(MODELS)
    assert header.count("<table>") == len(MODELS)
    for model, table in zip(MODELS, header.split("<table>")[1:], strict=True):
        lines = re.findall(r"<tr>(.*?)</tr>", table.split("</table>")[0])
        assert len(lines) == 2 + len(ROWS)  # the head and the pretrained model
        own = [each for each in results["summary"] if each["model"] == model]
        best = max(own, key=lambda each: each["figures"]["added"]["value"])
        (won,) = [line for line in lines if "class=best" in line]
        assert ROWS[best["row"]][0] in won


def test_nothing_is_loaded_from_elsewhere(page: tuple[Page, str]) -> None:
    parser, text = page
    assert "http://" not in text
    assert "https://" not in text
    tags = {tag for tag, _, _ in parser.attributes}
    assert not tags & {"script", "link", "img", "iframe"}
    for _, name, value in parser.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    assert all(use.startswith("url(#") for use in re.findall(r"url\([^)]*", text))


def test_ids_are_unique_and_references_resolve(page: tuple[Page, str]) -> None:
    parser, text = page
    assert len(parser.ids) == len(set(parser.ids))
    wanted = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    assert wanted <= set(parser.ids)


def test_user_strings_are_escaped(page: tuple[Page, str]) -> None:
    _, text = page
    assert "exceptions <b>" not in text
    assert "exceptions &lt;b&gt;" in text
    assert "http &amp; $mail$" in text
    assert "A CPU &lt;4&gt;" in text


def test_a_phone_and_a_dark_theme_are_served(page: tuple[Page, str]) -> None:
    parser, text = page
    contents = [
        value for tag, name, value in parser.attributes if (tag, name) == ("meta", "content")
    ]
    assert contents == ["width=device-width, initial-scale=1", "light dark"]
    roots = re.findall(r":root\{(--[^}]*)\}", text)
    assert len(roots) == 2
    light, dark = (dict(re.findall(r"--(\w+):(#\w+);", root)) for root in roots)
    assert f"@media(prefers-color-scheme:dark){{:root{{{roots[1]}}}}}" in text
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(light)
    assert light.keys() == dark.keys()
    assert not [name for name in light if light[name] == dark[name]]
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    drawn = set(light.values()) - {light["page"]}  # numbers on dark cells are white in both
    assert not [colour for colour in drawn if colour in figures]


def test_wide_tables_scroll_in_a_frame_and_say_so(page: tuple[Page, str]) -> None:
    frames = re.findall(r'<div class="(wide[^"]*)" tabindex=0><table><thead>(.*?)</thead>', page[1])
    assert len(frames) == page[1].count("<table>")
    columns = {kind: {head.count("<th") for k, head in frames if k == kind} for kind, _ in frames}
    assert max(columns["wide"]) <= 4 < min(columns["wide many"])
    assert '.many::before{content:"scroll \\2192"' in page[1]


@pytest.mark.usefixtures("undrawn")
def test_a_search_that_ends_in_no_edit_is_explained(page: tuple[Page, str]) -> None:
    results = made_up(MODELS[:1])
    run = results["runs"][0]
    run["addition"] |= {"scaling_coef": 0.0, "why_zero": "no coefficient beats it"}
    run["negation"][TASKS[1]] |= {"scaling_coef": 0.0, "why_zero": "none keeps 95 % & more"}
    text = report.render(results)
    addition, negation = (
        text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
        for title in ("Addition, task by task", "Forgetting a task")
    )
    assert f"<p>{ROWS[FIRST][0]}, seed 0: no coefficient beats it.</p>" in addition
    assert "exceptions &lt;b&gt;, seed 0: none keeps 95 % &amp; more." in negation
    assert text.count("none keeps 95 % &amp; more.") == 1
    assert "no coefficient" not in page[1]
    assert report.headline(results)[2:4] == [
        "With TaLoS (density 0.1) no sum of the vectors had a better normalised accuracy on "
        "validation data in 1 of 3 runs: the merged model is the pretrained one.",
        f"With TaLoS (density 0.1) nothing was subtracted to forget {TASKS[1]}.",
    ]
    assert "talos merge" in text  # another seed has an edit
    run["addition"]["scaling_coef"] = run["addition"]["grid"][-1]["scaling_coef"]
    assert report.headline(results)[2] == (
        "With TaLoS (density 0.1) the largest coefficient was taken in 1 of 3 runs: a larger one "
        "may be better."
    )
    for run in results["runs"]:
        run["addition"]["scaling_coef"] = 0.0
    assert "talos merge" not in report.render(results)


@pytest.mark.usefixtures("undrawn")
def test_the_next_step_fits_what_the_model_reads() -> None:
    results = made_up(MODELS[:1])
    assert "own texts: a CSV" in report.render(results)
    for task in results["tasks"]:
        task["reads"] = "images"
    assert "own images: a folder with a folder of images for each class" in report.render(results)


@pytest.mark.usefixtures("undrawn")
def test_what_failed_is_named() -> None:
    results = made_up(MODELS[:1])
    del results["rates"][MODELS[0]][FIRST][2]
    for part in ("runs", "summary"):
        results[part] = [each for each in results[part] if each["row"] != "random"]
    text = report.render(results)
    assert "<p>TaLoS, density 0.1: training failed at 0.003.</p>" in text
    said = "Not measured, because it failed or was not run: random mask."
    assert report.headline(results)[2] == said
    assert f"<p class=more>{said}</p>" in text


@pytest.mark.usefixtures("undrawn")
def test_the_page_repeats() -> None:
    assert report.render(made_up()) == report.render(made_up())


def test_rates_at_the_end_of_their_list_are_named() -> None:
    results = made_up(MODELS[:1])
    assert report.headline(results)[2:] == [
        "Random mask and non-linear fine-tuning took the largest learning rate that was tried: a "
        "larger one may be better.",
        "Not every row had as many learning rates to choose from: TaLoS, density 0.1: 3; random "
        "mask: 2; non-linear fine-tuning: 2.",
    ]
    results["summary"][0]["lr"] = 3e-4
    assert (
        "TaLoS (density 0.1) took the smallest learning rate that was tried: a smaller one may be "
        "better."
    ) in report.headline(results)
    points = results["rates"][MODELS[0]]["random"]
    points[0]["added"] = points[1]["added"]  # both are as good: no end of anything
    assert any(line.startswith("Non-linear fine-tuning took") for line in report.headline(results))
    for row in results["rows"]:
        row["lr"] = row["lr"][1:2]
    assert report.headline(results)[2:] == [
        "Each row had one learning rate: with others the order may be another one."
    ]


def said(
    *added: float, behind: tuple[float, ...] = (0.1, 0.1, 0.1), seeds: int = 3, half: float = 0.01
) -> str:
    """Who won, by the merged accuracy of each row, the pretrained model at 45.7 %.

    Args:
        added: of TaLoS, the random mask and non-linear fine-tuning.
        behind: what the best row has more than each, the value of the paired interval.
        seeds: of every row.
        half: of each interval.
    """
    results = made_up(MODELS[:1])
    for each, value, lead in zip(results["summary"], added, behind, strict=True):
        each["seeds"] = seeds
        each["figures"]["added"] |= {"value": value, "low": value - half, "high": value + half}
        gap = {"value": lead, "low": lead - half, "high": lead + half}
        each["against_best"] = None if value == max(added) else {"added": gap}
        if each["against_first"]:
            gap = {key: value - added[0] + end for key, end in (("low", -half), ("high", half))}
            each["against_first"]["added"] = gap | {"value": value - added[0]}
    return winner(results, MODELS[0])


def test_the_headline_is_honest() -> None:
    text = said(0.7, 0.6, 0.65)
    assert text.startswith(
        "TaLoS (density 0.1) wins: with all task vectors added it answers 70.0 %"
    )
    assert text.endswith("right, non-linear fine-tuning 65.0 %, the pretrained model 45.7 %.")
    text = said(0.7, 0.6, 0.65, behind=(0, 0.1, 0.005))
    assert "is ahead, but without a clear lead over non-linear fine-tuning:" in text
    text = said(0.6, 0.7, 0.65)
    assert text.startswith("Random mask wins: ")
    assert "is +10.0 points, 95 % interval +9.0 to +11.0 over test examples and seeds." in text
    assert text.endswith("The others against TaLoS (density 0.1): non-linear fine-tuning (better).")
    text = said(0.6, 0.7, 0.69, behind=(0.1, 0, 0.005))  # a rival that is not the first row
    assert "Random mask is ahead, but without a clear lead over non-linear fine-tuning:" in text
    text = said(0.7, 0.705, 0.6, behind=(0.005, 0, 0.1))
    assert "Random mask is ahead, but without a clear lead over TaLoS (density 0.1):" in text
    assert text.endswith("non-linear fine-tuning (worse).")


def test_one_or_two_seeds_decide_nothing() -> None:
    for seeds, count in ((1, "1 seed"), (2, "2 seeds")):
        text = said(0.6, 0.7, 0.65, seeds=seeds)
        assert text.startswith(
            f"Random mask is ahead, and with {count} alone another seed may turn this round: with "
        )
        assert not re.search("wins|better|worse", text)
        assert text.endswith("non-linear fine-tuning (ahead).")
    text = said(0.7, 0.6, 0.65, behind=(0, 0.1, 0.005), seeds=1)
    assert (
        "is ahead, but without a clear lead over non-linear fine-tuning, and with 1 seed alone "
        "another seed may turn this round:"
    ) in text


def test_equal_rows_are_level() -> None:
    assert said(0.7, 0.7, 0.6).startswith(
        "TaLoS (density 0.1) and random mask are level: with all task vectors added they answer "
        "70.0 % of the test examples right, non-linear fine-tuning 60.0 %, the pretrained model"
    )
    text = said(0.6, 0.7, 0.7002, behind=(0.1, 0.0002, 0))  # the same in print
    assert text.startswith("Random mask and non-linear fine-tuning are level: ")


@pytest.mark.usefixtures("undrawn")
def test_all_rows_with_the_best_figure_are_underlined() -> None:
    results = made_up(MODELS[:1])
    for each, value in zip(results["summary"], (0.6001, 0.5, 0.6), strict=True):
        each["figures"]["added"]["value"] = value
    best = re.findall(r"class=best>(?:<b>)?([\d.]+)", report.render(results))
    assert best == ["60.0", "60.0"]


def test_chosen_rates_have_a_number_before_others() -> None:
    results = made_up(MODELS[:1])
    rates = [1e-3, 1.1e-3, 1.2e-3, 1.3e-3]
    for points in results["rates"][MODELS[0]].values():
        points[:] = [points[0] | {"lr": lr, "chosen": lr == rates[1]} for lr in rates]
    axes = Figure().add_subplot()
    curves.rates(results, MODELS[0])[0].paint(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0011", "0.0013"]


def test_a_winner_beats_the_pretrained_model() -> None:
    assert said(0.3, 0.2, 0.25).startswith(
        "No row beats the pretrained model: with all task vectors added, the best, TaLoS (density "
        "0.1), answers 30.0 % of the test examples right, non-linear fine-tuning 25.0 %, the "
        "pretrained model 45.7 %."
    )
    text = said(0.46, 0.2, 0.25)
    assert "is ahead, but without a clear lead over the pretrained model:" in text


@pytest.mark.parametrize(("seeds", "over"), [(3, "and seeds;"), (1, "alone, with one seed;")])
@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_its_intervals_hold(seeds: int, over: str) -> None:
    results = made_up(MODELS[:1])
    for each in results["summary"]:
        each["seeds"] = seeds
    text = report.render(results)
    assert f"95 % intervals over test examples {over}" in text
    cells = re.findall(r"</b> (better|worse|ahead|behind|not clear) <small>", text)
    assert len(cells) == len(ROWS) - 1
    assert set(cells) <= {
        "not clear",
        *(("better", "worse") if seeds == 3 else ("ahead", "behind")),
    }
    assert set(cells) != {"not clear"}


@pytest.mark.usefixtures("undrawn")
def test_the_next_steps_take_vectors_of_the_chosen_rate() -> None:
    results = made_up(MODELS[:1])
    text = report.render(results)
    lines = re.findall(r"<code>(.*?)</code>", text, re.DOTALL)
    used = set(re.findall(r"(vectors/\S+?\.safetensors)", " ".join(lines)))
    assert used == {f"vectors/{FIRST}-{place}-0-0.001.safetensors" for place in (0, 2)}
    assert len(re.findall(r"eval --model minilm --data modules", text)) == 1
    results["recipe"]["tasks"][1]["settings"] = {"text": "review"}  # no command line can pass it
    results["recipe"]["tasks"][2]["name"] = "http"
    assert "talos eval" not in report.render(results)


@pytest.mark.usefixtures("undrawn")
def test_a_page_without_a_finished_row_renders() -> None:
    results = made_up(MODELS[:1])
    for part in ("rows", "runs", "summary", "files"):
        results[part] = []
    assert "Not measured" in report.render(results)


@pytest.mark.usefixtures("undrawn")
def test_one_row_alone_renders() -> None:
    results = made_up(MODELS[:1])
    results["rows"] = results["rows"][:1]
    results["recipe"]["rows"] = results["recipe"]["rows"][:1]
    for part in ("runs", "summary", "files"):
        results[part] = [each for each in results[part] if each["row"] == FIRST]
    text = report.render(results)
    assert "non-linear" not in text
    assert "random" not in text.split("</header>")[0]
    assert "With all task vectors added, TaLoS (density 0.1) answers" in text
    assert "1 way of fine-tuning minilm" in text


@pytest.mark.usefixtures("undrawn")
def test_what_a_recipe_did_not_ask_for_is_left_out(tmp_path: Path) -> None:
    results = made_up(MODELS[:1])
    for part in ("interference", "disentanglement", "linearity", "sensitivity", "drift"):
        results[part] = {}
    results["masks"], results["mask_iou"] = {}, {}
    for run in results["runs"]:
        run["negation"] = dict.fromkeys(TASKS)
    for each in results["summary"]:
        each["figures"] |= {"target": None, "control": None}
    report.save_results(results, tmp_path / "results.json")
    assert main(["report", str(tmp_path)]) == 0
    titles = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "report.html").read_text())
    assert {"The tasks", "Learning rates", "Addition, task by task", "Costs"} <= set(titles)
    assert not {"Interference", "Forgetting a task", "What the masks select"} & set(titles)


def test_results_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.save_results(made_up(), path)
    assert report.load_results(path) == json.loads(json.dumps(made_up()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "got no JSON"),
        ("[1]", "got another file"),
        ('{"schema": "other"}', "got another file"),
        ('{"schema": "talos-experiment", "schema_version": 99}', "schema_version 1, got 99"),
        ('{"schema": "talos-experiment", "schema_version": 1}', "must hold created, title"),
    ],
)
def test_bad_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(TalosValueError, match=re.escape(message)):
        report.load_results(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match="must be readable"):
        report.load_results(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(TalosValueError, match="got binary"):
        report.load_results(tmp_path / "binary")


def test_not_finite_results_are_not_written(tmp_path: Path) -> None:
    results = copy.deepcopy(made_up())
    results["zero_shot"][MODELS[0]] = float("nan")
    with pytest.raises(TalosValueError, match="finite"):
        report.save_results(results, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match="must be writable"):
        report.write_report(made_up(), tmp_path / "none" / "report.html")


@pytest.mark.usefixtures("undrawn")
def test_results_with_values_of_another_type_are_refused_and_no_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "results.json", tmp_path / "report.html"
    for key, value in (("zero_shot", "x"), ("tasks", 3), ("timings", {"total": "long"})):
        path.write_text(json.dumps({**made_up(MODELS[:1]), key: value}))
        assert main(["report", str(path)]) == 2
        assert "DIR must hold results as `talos experiment` writes" in capsys.readouterr().err
        assert not page.exists()


@pytest.mark.usefixtures("undrawn")
def test_a_page_is_made_again_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "DIR must hold a results.json, got" in capsys.readouterr().err
    report.save_results(made_up(MODELS[:1]), tmp_path / "results.json")
    page = tmp_path / "report.html"
    page.write_text("old")
    assert main(["report", str(tmp_path / "results.json"), "--out", str(page)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    out = capsys.readouterr().out
    assert winner(made_up(MODELS[:1]), MODELS[0]) in out
    added = made_up(MODELS[:1])["summary"][0]["figures"]["added"]
    assert f"{percent(added['value'])} {percent(added['low'])}–{percent(added['high'])}" in out
