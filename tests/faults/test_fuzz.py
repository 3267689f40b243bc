"""Every loader, over damaged files: it loads what is right and refuses the rest in words.

`python -m benches.fuzz` does the same a million times.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benches import fuzz
from benches.fuzz import Found, Loader, loaders, main, run, try_one, write
from benches.results import read_results

LOADERS = loaders()


@pytest.fixture(scope="module", params=LOADERS)
def valid(request: pytest.FixtureRequest) -> Iterator[tuple[Loader, Path, object]]:
    loader = LOADERS[request.param]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(loader, folder)
        yield loader, folder, loader.load(folder)


@settings(max_examples=20)
@given(draw=st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_loads_as_it_was_or_is_refused(
    valid: tuple[Loader, Path, object], draw: random.Random
) -> None:
    loader, folder, content = valid
    found = Found()
    try_one(loader, folder, draw, found, content)
    assert found.inputs == 1
    assert not found.faults, found.faults


def crash(_: Path) -> None:
    os._exit(3)


def spin(_: Path) -> None:
    sum(range(5_000_000))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_loader_may_not_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LOADERS["Mask.load"]
    calls = iter((0, *[1] * 9))

    def later(folder: Path, wrong: object) -> object:
        return right.load(folder) if next(calls) == 0 else wrong(folder)

    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    for wrong, fault in (
        (crash, "the process ended"),
        (spin, "seconds"),
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: "another mask", "loaded as something else"),
    ):
        calls = iter((0, *[1] * 9))
        own = Loader(right.files, right.damages, lambda f, w=wrong: later(f, w), same=True)
        found = run(own, "Mask.load", range(4), seed=0)
        assert any(fault in each["fault"] for each in found["faults"]), (fault, found)
    assert run(right, "Mask.load", range(50), seed=0)["faults"] == []


def test_the_command_writes_what_it_tried(tmp_path: Path) -> None:
    assert main(["--inputs", "40", "--only", "Patch.load", "--out", str(tmp_path)]) == 0
    (record,) = read_results(tmp_path / "fuzz.json")
    assert record["shape"] == "Patch.load"
    assert record["inputs"] == 40 == record["loaded"] + sum(record["refused"].values())
    assert record["faults"] == []
