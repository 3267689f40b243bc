"""Result files, tables and figures."""

import json
from pathlib import Path

import pytest

from benches.figures import draw_costs
from benches.measure import ROOT
from benches.results import (
    OURS,
    Record,
    add_result,
    costs_lines,
    paper_ratios,
    read_results,
    table_lines,
    write_json,
)

COSTS = ROOT / "benches/results/intel-xeon-processor-2-cores/methods.json"


def record(form: str, seconds: float, **others: object) -> Record:
    values = {"op": "sparse_adam_", "shape": "tiny", "spread": 0.0, "bandwidth": 1e10}
    return Record(form=form, seconds=seconds, **values | {"bytes_moved": 2 * 10**9} | others)


def cells(lines: list[str]) -> list[dict[str, str]]:
    """Return the rows of a table by the titles of their columns."""
    titles, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines if "|" in line)
    return [dict(zip(titles, row, strict=True)) for row in rows]


def test_table_holds_ratios_to_ours() -> None:
    ours, dense, other = cells(
        table_lines(
            [
                record(OURS, 0.5, peak_bytes=10**6),
                record("dense", 1.0, peak_bytes=4 * 10**6),
                record("x", 1.0, comparable=False),
            ]
        )
    )
    assert [row["x ours"] for row in (ours, dense, other)] == ["1.00", "2.00", ""]
    assert [row["peak x ours"] for row in (ours, dense, other)] == ["1.00", "4.00", ""]
    assert ours["GB/s"] == "4.0"  # 2 GB in half a second
    assert ours["of copy"] == "0.40"  # of 10 GB/s
    assert "GFLOP" not in ours
    assert "state MB" not in ours


def test_table_holds_operations_and_overlaps() -> None:
    flops = {"bytes_moved": None, "flops": 10**12, "matrix_rate": 4e12}
    (row,) = cells(table_lines([record(OURS, 0.5, **flops, overlaps={"16 samples": 0.75})]))
    assert row["GFLOP/s"] == "2000"
    assert row["of matrix"] == "0.50"
    assert row["16 samples"] == "0.7500"
    assert "GB/s" not in row


def test_results_replace_their_like_and_keep_the_rest(tmp_path: Path) -> None:
    add_result(tmp_path, record(OURS, 1.0).as_dict())
    add_result(tmp_path, record("dense", 2.0).as_dict())
    path = add_result(tmp_path, record(OURS, 3.0).as_dict())
    other = add_result(tmp_path, record(OURS, 4.0, op="add_delta_").as_dict())
    assert (path.name, other.name) == ("sparse_adam.json", "add_delta.json")
    found = [(each["form"], each["seconds"]) for each in read_results(path)]
    assert found == [("dense", 2.0), (OURS, 3.0)]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"records": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"records": object()})
    assert json.loads(path.read_text()) == {"records": [1]}


def test_costs_stand_beside_the_papers_ratios_and_are_drawn(tmp_path: Path) -> None:
    records = read_results(COSTS)
    model, label = records[0]["model"], records[0]["shape"]
    forms = [each["cost"] for each in records if each["shape"] == label]
    by_title = {row["method"]: row for row in cells(costs_lines(forms, model))}
    assert by_title["non-linear"]["total x"] == "1.00"
    # The paper: 0.1256 of 0.3608 s forward and backward, 4.7 of 6.5 GiB.
    assert paper_ratios(model, "talos") == pytest.approx((0.348, 0.442, 0.723), abs=1e-3)
    assert paper_ratios("minilm", "talos") is None
    draw_costs(tmp_path, model, label, [form for form in forms if form["form"] != "nonlinear"])
    assert not list(tmp_path.iterdir())
    draw_costs(tmp_path, model, label, forms)
    drawn = {path.stem.rpartition("-")[2]: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(drawn) == ["memory", "time"]
    assert all("TaLoS" in each and "paper" in each for each in drawn.values())
