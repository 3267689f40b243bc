"""The folder of an experiment: what is done, damaged, in use, or of something else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from talos.app.experiments.store import Key, Store, clear, kept, opened
from talos.errors import TalosOSError
from talos.masks import Mask
from talos.task_vectors import TaskVector

VECTOR = TaskVector(Mask.from_dense({"w": torch.ones(3, dtype=torch.bool)}), torch.ones(3))
KEY = Key("vector", ("a/b model", "talos", "lr-0.001"), {"lr": 1e-3, "weights": "ab"})


def stored(folder: Path) -> tuple[Store, list[str], Path]:
    """A store with one cell that has a vector; what it notes; the cell's file."""
    notes: list[str] = []
    with opened(folder, on_note=notes.append) as store:
        found = {**store.save(KEY, VECTOR), "value": 0.1}
        written = store.write(KEY, found, 1.2345678, 4096, 0.1)
        assert store.read(KEY) == written
    (path,) = folder.glob("cells/vector/*.json")
    return store, notes, path


def test_a_cell_is_named_in_words_and_by_its_key(tmp_path: Path) -> None:
    _, _, path = stored(tmp_path)
    assert path.stem == f"a_b_model-talos-lr-0.001-{KEY.digest[:8]}"
    read = json.loads(path.read_text())
    assert (read["kind"], read["key"], read["seconds"]) == ("vector", KEY.content, 1.235)
    other = Key(KEY.kind, KEY.words, {**KEY.content, "lr": 2e-3})
    assert other.name != KEY.name


def cut_off(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def of_another_key(path: Path, _: Path) -> None:
    path.write_text(path.read_text().replace('"ab"', '"cd"'))


def of_another_version(path: Path, _: Path) -> None:
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))


def without_its_vector(_: Path, vector: Path) -> None:
    vector.unlink()


def with_half_a_vector(_: Path, vector: Path) -> None:
    vector.write_bytes(b"1")


@pytest.mark.parametrize(
    "damage",
    [cut_off, of_another_key, of_another_version, without_its_vector, with_half_a_vector],
)
def test_a_damaged_cell_is_made_anew_and_said(
    tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    store, notes, path = stored(tmp_path)
    damage(path, tmp_path / "vectors" / f"{KEY.name}.safetensors")
    assert notes == []
    assert store.read(KEY) is None
    assert len(notes) == 1
    assert str(path) in notes[0]
    assert notes[0].endswith("and is made anew")


def test_a_vector_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    store, _, _ = stored(tmp_path)
    path = tmp_path / "vectors" / f"{KEY.name}.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(TalosOSError, match=r"^out must be .*vectors"):
        store.save(KEY, VECTOR)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "out"),
        pytest.raises(TalosOSError, match=r"no other run writes.*wait for it"),
        opened(tmp_path / "out"),
    ):
        pass
    with opened(tmp_path / "out"):  # the lock is gone
        pass


def test_a_folder_with_other_files_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TalosOSError, match="--overwrite"), opened(tmp_path):
        pass
    with opened(tmp_path, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(TalosOSError, match="got the file"), opened(path, overwrite=True):
        pass


def test_overwrite_removes_what_an_experiment_made_and_nothing_else(tmp_path: Path) -> None:
    stored(tmp_path)
    (tmp_path / "vectors" / "mine.txt").write_text("mine")
    clear(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["vectors", "mine.txt"]


def test_kept_counts_finished_cells(tmp_path: Path) -> None:
    assert kept(tmp_path) == "nothing was written"
    stored(tmp_path)
    assert kept(tmp_path).startswith("1 finished cell is kept in ")
