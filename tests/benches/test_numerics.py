"""The table of errors: it finds what is wrong, and the page shows what was measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benches import numerics
from benches.measure import ROOT

PAGE = (ROOT / "docs/numerics.md").read_text()
COMMITTED = sorted((ROOT / "benches/results").glob("*/numerics.json"))
REFERENCE, *OTHERS = numerics.backends()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_page_shows_the_committed_table(path: Path) -> None:
    assert "\n".join(numerics.table(json.loads(path.read_text())["records"])) in PAGE


def test_every_op_is_measured() -> None:
    assert {op for op, _ in numerics.WORKS.values()} == {*REFERENCE.ops}


def test_every_bar_is_met_by_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "numerics.json"
    assert numerics.main(["--out", str(path), "--runs", "1", "--steps", "1"]) == 0
    content = json.loads(path.read_text())
    assert content["about"] | {"runs": 1, "steps": 1} == content["about"]
    found = {(row["op"], row["backend"], row["dtype"]) for row in content["records"]}
    for backend in (REFERENCE, *OTHERS):
        assert {op for op, name, _ in found if name == backend.name} >= {*numerics.WORKS} - {
            "sparse_adam_"  # its results have rows of their own
        }
    assert all(f"| {op} | {dtype} |" in capsys.readouterr().out for op, _, dtype in [*found][:1])


def test_a_unit_is_the_distance_of_neighbouring_numbers() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 3e-5, 0.0, 1e30], dtype=torch.float64)
    spacing = np.spacing(values.numpy().astype(np.float32))
    spacing[4] = np.finfo(np.float32).smallest_subnormal
    assert np.array_equal(numerics.ulp(values, torch.float32).numpy(), spacing.astype(np.float64))
    assert numerics.ulp(torch.ones(1).double(), torch.bfloat16).item() == 2.0**-7


def altered(name: str, change: Callable[..., Any]) -> numerics.Backend:
    """The references with one op that does something else in addition."""
    right = REFERENCE.ops[name]

    def wrong(*args: Any) -> Any:
        result = right(*args)
        change(*args)
        return result

    return replace(REFERENCE, ops={**REFERENCE.ops, name: wrong})


def test_one_bit_too_many_is_missed() -> None:
    def bit(params: list[torch.Tensor], *_: Any) -> None:
        params[0].view(torch.int32)[:1] += 2

    step, *_ = numerics.one_call("sparse_adam_", altered("sparse_adam_", bit), torch.float32, 1)
    assert step.largest > 1.5
    assert not step.met
    (row,) = numerics.one_call("scatter_", altered("scatter_", bit), torch.float32, 1)
    assert not row.met
    assert "MISSED" in numerics.table([row.__dict__])[2]


def test_runs_that_differ_are_missed() -> None:
    calls = []

    def drift(out: torch.Tensor, *_: Any) -> None:
        calls.append(1)
        out[0] *= 1 + 1e-6 * len(calls)

    (row,) = numerics.one_call("sddmm_", altered("sddmm_", drift), torch.float32, 3)
    assert (row.hashes, row.met) == (3, False)
    assert "| 3 of 3 |" in numerics.table([row.__dict__])[2]


def test_an_unselected_entry_that_changes_is_counted() -> None:
    def everything(params: list[torch.Tensor], *_: Any) -> None:
        params[0].mul_(1 - 1e-3)

    (row,) = numerics.unselected(altered("sparse_adam_", everything), torch.float32, 2)
    assert row.largest == row.entries > 900
    assert not row.met
