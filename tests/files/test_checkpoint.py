"""Checkpoints: what their headers say, tensors one at a time, damage refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError
from talos.files import Checkpoint
from tests.cases import assert_bit_equal

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "a.weight": torch.arange(4.0).reshape(4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "none": torch.zeros(0, 5),
    "flags": torch.tensor([True, False, True]),
    "small": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    "half": torch.tensor([0.5, -2.0]).half(),
}
INDEX = "model.safetensors.index.json"


def save_shards(folder: Path) -> Path:
    """Writes the tensors in two shards and their index, as transformers names them."""
    names = list(TENSORS)
    parts = {
        "model-00001-of-00002.safetensors": names[:3],
        "model-00002-of-00002.safetensors": names[3:],
    }
    folder.mkdir()
    for file, own in parts.items():
        save_file({name: TENSORS[name] for name in own}, folder / file, {"format": "pt"})
    placed = {name: file for file, own in parts.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize("form", ["file", "folder", "open_clip", "shards"])
def test_every_form_reads_the_same(tmp_path: Path, form: str) -> None:
    names = {"file": "any.safetensors", "folder": "model.safetensors"}
    if form == "shards":
        path = save_shards(tmp_path / "shards")
    else:
        file = tmp_path / names.get(form, "open_clip_model.safetensors")
        save_file(TENSORS, file)
        path = file if form == "file" else tmp_path
    checkpoint = Checkpoint(path)
    assert set(checkpoint) == set(TENSORS)
    assert len(checkpoint) == len(TENSORS)
    assert checkpoint.shapes == {name: tuple(each.shape) for name, each in TENSORS.items()}
    assert checkpoint.dtypes == {name: each.dtype for name, each in TENSORS.items()}
    for name, tensor in TENSORS.items():
        read = checkpoint[name]
        assert read.shape == tensor.shape
        assert_bit_equal(read, tensor)
    assert "a.weight" in checkpoint
    with pytest.raises(KeyError):
        checkpoint["c"]


def test_transformers_file_goes_before_the_shards_and_open_clips(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "shards")
    save_file({"clip": torch.ones(1)}, folder / "open_clip_model.safetensors")
    assert set(Checkpoint(folder)) == set(TENSORS)
    save_file({"one": torch.ones(1)}, folder / "model.safetensors")
    assert set(Checkpoint(folder)) == {"one"}
    assert set(Checkpoint(folder / "open_clip_model.safetensors")) == {"clip"}


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(3)}, path)
    checkpoint = Checkpoint(path)
    save_file({"w": torch.ones(3)}, tmp_path / "b")
    (tmp_path / "b").replace(path)
    assert not checkpoint["w"].any()
    checkpoint["w"].add_(1)  # each read is a tensor of its own
    assert not checkpoint["w"].any()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: cut(f / SECOND), f"{SECOND}: truncated"),
        (lambda f: (f / SECOND).write_bytes(b"PK\x03\x04" * 9), f"{SECOND}: a zip archive"),
        (lambda f: (f / SECOND).unlink(), f"{SECOND}"),
        (lambda f: (f / INDEX).unlink(), "must hold model.safetensors, got .*save_pretrained"),
        (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "readable index"),
        (lambda f: (f / INDEX).write_text("{"), "readable index"),
        (lambda f: rewrite(f, lambda m: m.update(c=f"../{FIRST}")), "its own folder, got '../"),
        (lambda f: rewrite(f, lambda m: m.update(c=f"/a/{FIRST}")), "its own folder, got '/a/"),
        (lambda f: rewrite(f, lambda m: m.update(c="")), "its own folder, got ''"),
        (lambda f: rewrite(f, lambda m: m.update(c="a\0")), r"its own folder, got 'a\\x00'"),
        (lambda f: rewrite(f, lambda m: m.update(c="\ud800")), r"its own folder, got '\\ud800'"),
        (lambda f: rewrite(f, lambda m: m.update(c=FIRST)), f"got {FIRST} for c"),
        (lambda f: shutil.copy(f / FIRST, f / SECOND), f"{SECOND}: must hold other tensors"),
    ],
)
def test_damage_is_refused(tmp_path: Path, spoil: Callable[[Path], object], match: str) -> None:
    folder = save_shards(tmp_path / "shards")
    spoil(folder)
    with pytest.raises(TalosError, match=match):
        Checkpoint(folder)


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(3), "v": torch.ones(2)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TalosValueError, match=r"a\.safetensors: truncated"):
            Checkpoint(path)
    path.write_bytes(whole)
    checkpoint = Checkpoint(path)
    path.write_bytes(whole[:-4])  # in place, while it is open
    names = [name for name in checkpoint if checkpoint.header(path).entries[name]]
    last = max(names, key=lambda name: checkpoint.header(path).entries[name]["data_offsets"])
    with pytest.raises(TalosError, match=r"a\.safetensors"):
        checkpoint[last]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match=r"a readable file, got .*nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(TalosTypeError, match="must be a path, got int"):
        Checkpoint(3)
    raw = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "a").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0")
    with pytest.raises(TalosValueError, match=r"w: must have a dtype of torch, got F4"):
        Checkpoint(tmp_path / "a")


def test_tensors_are_those_of_safetensors_own_reader(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "shards")
    checkpoint = Checkpoint(folder)
    for file in (FIRST, SECOND):
        for name, tensor in load_file(folder / file).items():
            assert_bit_equal(checkpoint[name], tensor)
