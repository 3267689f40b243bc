"""The report: every number on the page, well-formed, escaped, and nothing loaded from elsewhere."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from talos.app import report
from talos.app.cli import main
from talos.app.cli.commands.demo import _next
from talos.errors import TalosOSError, TalosValueError

KINDS = ("query", "key", "value", "attention out", "mlp in", "mlp out", "norm", "bias")
TASKS = ("modules", "exceptions <b>", "http & mail")
VOID = {"meta", "br", "hr", "img", "input", "link"}


def estimate(value: float, n: int = 400) -> dict[str, float]:
    """An estimate with a recognisable interval."""
    return {"value": value, "low": value - 0.0211, "high": value + 0.0187, "n": n}


def synthetic() -> dict[str, Any]:
    """Small results whose every number is different."""
    methods = ("talos", "nonlinear")
    titles = ("TaLoS (sparse)", "non-linear fine-tuning")
    grid = [i / 20 for i in range(21)]
    structure = [
        {"layer": str(layer), "kind": kind, "nnz": 10 + layer * 7 + place, "numel": 100 + place}
        for layer in range(3)
        for place, kind in enumerate(KINDS)
    ]
    files = [
        {
            "path": f"vectors/{method}-t{place}.safetensors",
            "kind": "vector",
            "method": method,
            "task": task,
            "bytes": 4_600_000 if method == "talos" else 42_000_000,
            "entries": 1_060_000 if method == "talos" else 10_600_000,
        }
        for method in methods
        for place, task in enumerate(TASKS)
    ] + [
        {
            "path": f"masks/t{place}.safetensors",
            "kind": "mask",
            "method": None,
            "task": task,
            "bytes": 230_000,
            "entries": 1_060_000,
        }
        for place, task in enumerate(TASKS)
    ]
    return {
        "schema": report.SCHEMA,
        "schema_version": report.SCHEMA_VERSION,
        "created": "2025-01-02T03:04:05+00:00",
        "machine": {"cpu": "A CPU <4>", "cores": 2},
        "versions": {"talos": "0.1.0", "torch": "2.11.0"},
        "settings": {"seed": 0, "density": 0.1, "rounds": 4, "control_share": 0.95},
        "model": {
            "source": "minilm",
            "parameters": 22_713_216,
            "maskable": 10_646_784,
            "dense_bytes": 90_852_864,
        },
        "tasks": [
            {
                "name": task,
                "description": f"which of {place + 4} it is",
                "classes": place + 4,
                "examples": {"train": 2001 + place, "validation": 251 + place, "test": 501 + place},
            }
            for place, task in enumerate(TASKS)
        ],
        "methods": [
            {"name": name, "title": title, "trainable": 1_060_000, "settings": {"lr": 0.00123}}
            for name, title in zip(methods, titles, strict=True)
        ],
        "zero_shot": {task: estimate(0.412 + 0.0131 * i) for i, task in enumerate(TASKS)},
        "single": {
            m: {task: estimate(0.811 + 0.0131 * i + 0.0032 * j) for i, task in enumerate(TASKS)}
            for j, m in enumerate(methods)
        },
        "training": {
            m: {task: {"steps": 80, "first_loss": 1.234, "last_loss": 0.567} for task in TASKS}
            for m in methods
        },
        "addition": {
            m: {
                "grid": [
                    {"scaling_coef": x, "absolute": 0.4 + 0.3 * x, "normalised": 0.5 + 0.4 * x}
                    for x in grid
                ],
                "scaling_coef": 0.65 + 0.1 * j,
                "absolute": estimate(0.7341 - 0.013 * j),
                "normalised": estimate(0.9542 - 0.017 * j),
                "tasks": {task: estimate(0.701 + 0.0131 * i) for i, task in enumerate(TASKS)},
            }
            for j, m in enumerate(methods)
        },
        "addition_difference": {"value": 0.017, "low": -0.004, "high": 0.038, "n": 1200},
        "negation": {
            m: {
                task: {
                    "grid": [
                        {"scaling_coef": x, "target": 0.5 - 0.3 * x, "control": 0.5 - 0.05 * x}
                        for x in grid
                    ],
                    "scaling_coef": 0.85,
                    "target": estimate(0.231 + 0.01 * i),
                    "control": estimate(0.433),
                    "target_zero_shot": estimate(0.412),
                    "control_zero_shot": estimate(0.444),
                }
                for i, task in enumerate(TASKS)
            }
            for m in methods
        },
        "interference": {
            m: [[1.31 if i == j else 0.97 for j in range(3)] for i in range(3)] for m in methods
        },
        "masks": {
            task: {
                "nnz": sum(entry["nnz"] for entry in structure),
                "numel": sum(entry["numel"] for entry in structure),
                "tensors": 96,
                "tensors_touched": 31,
                "structure": structure,
            }
            for task in TASKS
        },
        "mask_iou": [[1.0 if i == j else 0.71 for j in range(3)] for i in range(3)],
        "files": files,
        "timings": {
            "total": 512.0,
            "phases": [
                {"phase": "calibrate", "method": "talos", "task": task, "seconds": 13.0}
                for task in TASKS
            ]
            + [
                {"phase": "train", "method": m, "task": task, "seconds": 20.0}
                for m in methods
                for task in TASKS
            ]
            + [{"phase": "zero-shot", "method": None, "task": None, "seconds": 9.0}],
        },
    }


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
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page() -> tuple[Page, str]:
    """The rendered page, parsed."""
    text = report.render(synthetic())
    parser = Page()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser, text


@pytest.mark.slow
def test_every_number_is_on_the_page(page: tuple[Page, str]) -> None:
    words = " ".join(page[0].words)
    results = synthetic()
    for method in ("talos", "nonlinear"):
        added = results["addition"][method]
        assert f"{added['scaling_coef']:.2f}" in words
        for key in ("absolute", "normalised"):
            assert f"{100 * added[key]['value']:.1f}" in words
            assert f"{100 * added[key]['low']:.1f}–{100 * added[key]['high']:.1f}" in words
        for task in TASKS:
            assert f"{100 * results['single'][method][task]['value']:.1f}" in words
            assert f"{100 * results['negation'][method][task]['target']['value']:.1f}" in words
    for task in TASKS:
        assert task in words
        assert f"{100 * results['zero_shot'][task]['value']:.1f}" in words
    for text in ("2,001", "251", "501", "4.6 MB", "90.9 MB", "1,060,000", "31 of 96", "0.00123"):
        assert text in words, text
    for text in ("0.71", "1.31", "0.97", "8.5 min", "1.234", "0.567", "4.34", "2.11.0"):
        assert text in words, text


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
    assert "http &amp; mail" in text
    assert "A CPU &lt;4&gt;" in text


def test_names_may_hold_dollar_signs() -> None:
    results = synthetic()
    text = json.dumps(results).replace(results["tasks"][0]["name"], "a$_$")
    assert "a$_$" in report.render(json.loads(text))


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


def test_tiles_show_absolute_beside_normalised(page: tuple[Page, str]) -> None:
    (tiles,) = re.findall(r"<div class=tiles>(.*?)</header>", page[1], re.DOTALL)
    for method in synthetic()["addition"].values():
        for key in ("absolute", "normalised"):
            assert f"{100 * method[key]['value']:.1f} %" in tiles


def test_charts_that_are_compared_share_their_axes() -> None:
    results = synthetic()
    short = results["negation"]["talos"][TASKS[0]]
    short["grid"], short["scaling_coef"] = short["grid"][:6], 0.2  # a search that ended early
    results["negation"]["nonlinear"][TASKS[0]] |= short
    text = report.render(results)
    charts = [
        re.search(rf'aria-label="{label} .*?<svg(.*?)</svg>', text, re.DOTALL)
        for label in ("negation of modules", "negation of http", "accuracy of the merged")
    ]
    found = [re.findall(r">(-?[\d.]+)</text>", chart[1]) for chart in charts if chart]
    assert found[0] == found[1]  # the numbers at both axes
    decimals = [[number for number in each if "." in number] for each in found]
    assert decimals[0] == [number for number in decimals[2] if float(number) <= 1]
    sizes = {re.search(r'viewBox="([^"]*)"', chart[1])[1] for chart in charts[:2] if chart}
    assert len(sizes) == 1


@pytest.mark.slow
def test_a_search_that_ends_in_no_edit_is_explained() -> None:
    results = synthetic()
    method = results["methods"][0]["name"]
    results["addition"][method]["why_zero"] = "no coefficient beats it"
    results["negation"][method][TASKS[1]]["why_zero"] = "no coefficient keeps 95 % & more"
    text = report.render(results)
    assert f"<p>{results['methods'][0]['title']}: no coefficient beats it.</p>" in text
    assert text.count("no coefficient keeps 95 % &amp; more.") == 1
    assert "no coefficient" not in report.render(synthetic())


def test_the_page_repeats(page: tuple[Page, str]) -> None:
    assert report.render(synthetic()) == page[1]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.004, 0.038, "not distinguishable from zero"),
        (0.003, 0.03, "in favour of TaLoS (sparse)"),
        (-0.03, -0.003, "in favour of non-linear fine-tuning"),
    ],
)
def test_headline_is_honest(low: float, high: float, said: str) -> None:
    results = synthetic()
    results["addition_difference"] = {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
    text = " ".join(report.headline(results))
    assert said in text
    forgot = [
        [each[which]["value"] - each[f"{which}_zero_shot"]["value"] for each in own.values()]
        for which in ("target", "control")
        for own in results["negation"].values()
    ]
    changes = [f"by {100 * sum(each) / len(each):+.1f} " for each in forgot[:3]]
    assert all(each in text for each in changes), changes
    assert "95.4 %" in text
    assert "93.7 %" in text


def test_a_demo_that_ends_in_no_edit_says_so_and_proposes_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path("out")
    _next(out, synthetic(), "minilm", None)
    assert "talos merge" in capsys.readouterr().err
    assert "talos merge" in report.render(synthetic())
    results = synthetic()
    results["addition"]["talos"]["scaling_coef"] = 0.0
    results["negation"]["nonlinear"][TASKS[1]]["scaling_coef"] = 0.0
    said = report.headline(results)[1:3]
    assert said == [
        "With TaLoS (sparse) no sum of the vectors was better on validation data: its merged "
        "model is the pretrained one.",
        f"With non-linear fine-tuning nothing was subtracted to forget {TASKS[1]}.",
    ]
    _next(out, results, "minilm", None)
    err = capsys.readouterr().err
    assert "talos inspect" in err
    assert "talos merge" not in err
    assert "talos merge" not in report.render(results)


def test_one_method_alone_renders() -> None:
    results = synthetic()
    results["methods"] = results["methods"][:1]
    results["files"] = [f for f in results["files"] if f["method"] != "nonlinear"]
    results["addition_difference"] = None
    for key in ("single", "training", "addition", "negation", "interference"):
        del results[key]["nonlinear"]
    results["timings"]["phases"] = [
        p for p in results["timings"]["phases"] if p["method"] != "nonlinear"
    ]
    assert "non-linear" not in report.render(results)


def test_results_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.save_results(synthetic(), path)
    assert report.load_results(path) == json.loads(json.dumps(synthetic()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "got no JSON"),
        ("[1]", "got another file"),
        ('{"schema": "other"}', "got another file"),
        ('{"schema": "talos-demo", "schema_version": 99}', "schema_version 1, got 99"),
        ('{"schema": "talos-demo", "schema_version": 1}', "must hold created, machine"),
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
    results = copy.deepcopy(synthetic())
    results["mask_iou"][0][1] = float("nan")
    with pytest.raises(TalosValueError, match="finite"):
        report.save_results(results, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match="must be writable"):
        report.write_report(synthetic(), tmp_path / "none" / "report.html")


def test_results_with_values_of_another_type_are_refused_and_no_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "results.json", tmp_path / "page.html"
    for key, value in (("zero_shot", "x"), ("tasks", 3), ("timings", {"total": "long"})):
        path.write_text(json.dumps({**synthetic(), key: value}))
        assert main(["report", str(path), "--out", str(page)]) == 2
        assert "RESULTS must be as `talos demo` wrote it" in capsys.readouterr().err
        assert not page.exists()
