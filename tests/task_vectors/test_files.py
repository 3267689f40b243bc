"""Files of masks and task vectors: every fault is refused, and a write is whole or nothing."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from talos.app.cli import main
from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError
from talos.files import atomic_write, load_file, save_file
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.cases import dense_mask

SHAPES = {"full": (3,), "bits": (40,), "few": (80, 3), "none": (5,)}


def small_vector(seed: int = 0) -> TaskVector:
    """Every encoding in about two kilobytes."""
    generator = torch.Generator().manual_seed(seed)
    dense = {
        name: dense_mask(math.prod(shape), density, generator).view(shape)
        for (name, shape), density in zip(SHAPES.items(), (1.0, 0.3, 0.02, 0.0), strict=True)
    }
    mask = Mask.from_dense(dense, metadata={"density": 0.1})
    values = torch.randn(mask.nnz, generator=generator)
    return TaskVector(mask, values, {"bits": "0123456789abcdef"}, {"task": "übung", "seed": seed})


def same(one: TaskVector, other: TaskVector) -> bool:
    return (
        one == other and one.metadata == other.metadata and one.mask.metadata == other.mask.metadata
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    small_vector().save(path)
    return path


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def raw_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def canonical(about: object) -> str:
    return json.dumps(about, sort_keys=True, separators=(",", ":"))


def forge(path: Path, tensors: dict[str, np.ndarray], content: Any, /, **more: Any) -> None:
    """Write a file from docs/format.md alone: its checksums fit."""
    digests = {
        name: hashlib.sha256(f"torch.{t.dtype}|{t.shape}|".encode() + t.tobytes()).hexdigest()
        for name, t in tensors.items()
    }
    about = {"version": 2, "kind": "task_vector", "digests": digests, "content": content} | more
    about["checksum"] = hashlib.sha256(canonical(about).encode()).hexdigest()
    safetensors.numpy.save_file(tensors, path, {"talos": canonical(about)})


# Reading what was written


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype | None) -> None:
    path = tmp_path / "a.safetensors"
    vector = small_vector()
    vector.save(path, dtype)
    loaded = TaskVector.load(path)
    assert same(loaded, vector if dtype is None else vector.astype(dtype))
    assert list(loaded.mask.shapes) == list(SHAPES)


def test_equal_vectors_give_equal_bytes_and_other_tools_may_rewrite_them(saved: Path) -> None:
    before = saved.read_bytes()
    TaskVector.load(saved).save(saved)
    assert saved.read_bytes() == before
    tensors = safetensors.torch.load_file(saved)
    assert torch.equal(
        torch.cat([tensors[f"{name}.values"] for name in SHAPES]), small_vector().values
    )
    safetensors.torch.save_file(tensors, saved, parts_of(before)[0]["__metadata__"])
    assert same(TaskVector.load(saved), small_vector())


def test_the_format_is_the_one_described(tmp_path: Path) -> None:
    vector = TaskVector(Mask.from_dense({"w": torch.ones(2) > 0}), torch.tensor([1.0, 2.0]))
    content = {"tensors": [entry("full", 2, 2)], "mask": {}, "fingerprints": {}, "made": {}}
    forge(tmp_path / "a", {"w.values": np.array([1, 2], np.float32)}, content)
    assert TaskVector.load(tmp_path / "a") == vector
    vector.save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_demo_vector_is_small(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [
        f"encoder.layer.{i}.attention.self.{p}.weight" for i in range(6) for p in ("query", "key")
    ]
    dense = {name: dense_mask(384 * 384, 0.6, generator).view(384, 384) for name in names}
    mask = Mask.from_dense(dense)
    TaskVector(mask, torch.randn(mask.nnz)).save(tmp_path / "a", torch.bfloat16)
    assert (tmp_path / "a").stat().st_size / mask.nnz < 2.3


def test_export_dense_is_a_plain_delta(tmp_path: Path) -> None:
    vector = small_vector()
    vector.export_dense(tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    for name, tensor in tensors.items():
        assert torch.equal(tensor, vector.to_dense(name))


def test_tensors_of_one_memory_and_keys_that_are_numbers(tmp_path: Path) -> None:
    words = torch.arange(4)
    tensors = {"a": words, "b": words, "c": words.view(2, 2).t()}
    save_file(tmp_path / "a", "mask", tensors, {"rounds": {10: 0.1, 9: 0.2}})
    loaded, content = load_file(tmp_path / "a", "mask")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert content == {"rounds": {"10": 0.1, "9": 0.2}}


def test_save_refuses_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(
        TalosValueError, match=r"tensors\['w'\] must be finite, got nan at position 1"
    ):
        save_file(path, "mask", {"w": torch.tensor([1.0, math.nan])}, {})
    for wrong in (math.nan, {1, 2}, object(), b"x", {1: 0, "1": 0}):
        with pytest.raises(TalosTypeError, match="content must be JSON"):
            save_file(path, "mask", {}, {"made": wrong})
    for name in ("__metadata__", "a\ud800"):
        vector = TaskVector(Mask.from_dense({name: torch.ones(1) > 0}), torch.ones(1))
        with pytest.raises(TalosValueError, match="tensors must have names in valid Unicode"):
            vector.export_dense(path)
    assert not list(tmp_path.iterdir())


# Damaged and lying files


def test_truncated_at_every_byte(saved: Path) -> None:
    raw = saved.read_bytes()
    for length in reversed(range(len(raw))):
        os.truncate(saved, length)
        with pytest.raises(TalosValueError, match=r"a\.safetensors: "):
            TaskVector.load(saved)
    saved.write_bytes(raw + b"\0")
    with pytest.raises(TalosValueError, match="file not fully covered"):
        TaskVector.load(saved)


def test_a_random_bit_of_every_byte(saved: Path) -> None:
    raw, vector = bytearray(saved.read_bytes()), small_vector()
    generator, data = random.Random(0), len(parts_of(raw)[1])
    unrefused, messages = [], []
    for position, byte in enumerate(raw):
        damaged = raw.copy()
        damaged[position] = byte ^ 1 << generator.randrange(8)
        saved.write_bytes(damaged)
        try:
            assert same(TaskVector.load(saved), vector), position
            unrefused.append(position)
        except TalosValueError as error:
            messages.append(str(error))
    assert all(message.startswith(f"{saved}: ") for message in messages)
    assert sum("the checksum of its data does not fit" in each for each in messages) >= data
    assert all(position < len(raw) - data for position in unrefused)
    assert len(unrefused) < 10  # JSON has several texts of one meaning


Change = Callable[[dict[str, Any]], object]
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["bits.values"].update(data_offsets=[4, 52]), "offset for tensor"),
        (lambda h: h["bits.values"].update(data_offsets=[0, 2**63]), "offset for tensor"),
        (lambda h: h["bits.values"].update(data_offsets=[0, 2**64]), "expected usize"),
        (lambda h: h["bits.values"].update(data_offsets=[48, 0]), "offset for tensor"),
        (lambda h: h["bits.values"].update(data_offsets=[-4, 44]), "`-4`, expected usize"),
        (lambda h: h["bits.values"].update(data_offsets=[0.0, 48.0]), "expected usize"),
        (lambda h: h["bits.values"].update(data_offsets=[0]), "expected a tuple of size 2"),
        (lambda h: h["bits.values"].update(data_offsets=[False, True]), "expected usize"),
        (lambda h: h["bits.values"].update(shape=[2**62, 4]), "overflow computing buffer size"),
        (lambda h: h["bits.values"].update(shape=[2**40]), "invalid shape"),
        (lambda h: h["bits.values"].update(shape=[-12]), "`-12`, expected usize"),
        (lambda h: h["bits.values"].update(shape="12"), "expected a sequence"),
        (lambda h: h["bits.values"].update(dtype="F64"), "invalid shape, data type"),
        (lambda h: h["few.values"].update(dtype="U64"), "invalid shape, data type"),
        (lambda h: h["bits.words"].update(dtype="F8_E4M3", shape=[256]), "checksum of its data"),
        (lambda h: h["bits.words"].update(dtype="F64", shape=[32]), "checksum of its data"),
        (lambda h: h["bits.words"].update(dtype="F32"), "checksum of its data"),
        (lambda h: h["bits.words"].update(shape=[8, 8]), "checksum of its data"),
        (lambda h: h["bits.values"].update(dtype=["F32"]), "invalid JSON"),
        (lambda h: h["bits.values"].update(extra=1), "header must hold dtype.* extra for bits"),
        (lambda h: h["bits.values"].pop("shape"), "missing field `shape`"),
        (lambda h: h.update({"bits.values": 3}), "integer `3`, expected"),
        (lambda h: h.pop("bits.values"), "invalid offset"),
        (lambda h: h.update(more=EMPTY), "digests must name every tensor"),
        (lambda h: h.pop("__metadata__"), "talos did not write"),
        (lambda h: h.update(__metadata__=[]), "expected a map"),
        (lambda h: h.update(__metadata__={"talos": 3}), "expected a string"),
        (lambda h: h.update(__metadata__={"format": "pt"}), "talos did not write"),
        (
            lambda h: h.update(__metadata__={"format": '"talos"', "version": "1"}),
            "version must be 2, got 1, which an earlier build wrote; make it again",
        ),
        (lambda h: h.update(__metadata__={"talos": "pt"}), "metadata must be a JSON object"),
        (lambda h: h.update(__metadata__={"talos": "[]"}), "version must be 2, got None"),
        (lambda h: h.update(__metadata__={"talos": "[1]"}), "metadata must be a JSON object"),
        (lambda h: h.update(__metadata__={"talos": '{"a":1,"a":2}'}), "the key 'a' twice"),
        (lambda h: h.update(__metadata__={"talos": '{"a":NaN}'}), "metadata must be a JSON object"),
    ],
)
def test_a_header_that_lies(saved: Path, change: Change, message: str) -> None:
    header, data = parts_of(saved.read_bytes())
    change(header)
    saved.write_bytes(raw_of(header, data))
    with pytest.raises(TalosValueError, match=message) as caught:
        TaskVector.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.pop("version"), "version must be 2, got None"),
        (lambda about: about.update(version=True), "version must be 2, got True"),
        (lambda about: about.update(version=1), "version must be 2, got 1"),
        (lambda about: about.update(version=3), "upgrade talos-sparse"),
        (lambda about: about.pop("kind"), "must hold a task_vector"),
        (lambda about: about.update(kind="mask"), r"load it with talos\.Mask\.load"),
        (lambda about: about.update(kind=[]), "must hold a task_vector"),
        (lambda about: about.pop("digests"), "checksum of its metadata"),
        (lambda about: about["digests"].popitem(), "checksum of its metadata"),
        (lambda about: about.pop("checksum"), "checksum of its metadata"),
        (lambda about: about.update(more=1), "checksum of its metadata"),
        (lambda about: about["content"]["made"].update(task="b"), "checksum of its metadata"),
    ],
)
def test_metadata_that_lies(saved: Path, change: Change, message: str) -> None:
    header, data = parts_of(saved.read_bytes())
    about = json.loads(header["__metadata__"]["talos"])
    change(about)
    header["__metadata__"]["talos"] = json.dumps(about)
    saved.write_bytes(raw_of(header, data))
    with pytest.raises(TalosValueError, match=message) as caught:
        TaskVector.load(saved)
    assert str(saved) in str(caught.value)


RAW = json.dumps(EMPTY).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "invalid JSON"),
        (b"[]", "not a safetensors file"),
        (b'{"a"', "invalid JSON"),
        (b'{"\xff":1}', "invalid UTF-8"),
        (b'{"__metadata__":{},"__metadata__":{}}', "duplicate field `__metadata__`"),
        (b'{"w":{"dtype":"U8","dtype":"F32"}}', "duplicate field `dtype`"),
        (b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "recursion limit"),
        (b'{"w":' + b"9" * 5_000 + b"}", "number out of range"),
        (b'{"w":%b,"w":%b}' % (RAW, RAW), "the key 'w' twice"),
        (b'{"__metadata__":{"a":"1","a":"1"}}', "the key 'a' twice"),
        (b'{"__metadata__":{"talos":"' + b"[" * 50_000 + b'"}}', "metadata must be a JSON object"),
        (b'{"w":' + RAW[:-1] + b',"more":[' + b"[]," * 300_000 + b"[]]}}", "in proportion"),
        (b'{"__metadata__":{"a":"[' + b"[]," * 300_000 + b'[]]"}}', "in proportion"),
        (b"{" + b" " * (32 << 20) + b"}", "in proportion"),
    ],
)
def test_a_header_that_is_none(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(raw_of(header))
    with pytest.raises(TalosValueError, match=message):
        load_file(path, "mask")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_length_that_lies(saved: Path, length: int) -> None:
    saved.write_bytes(length.to_bytes(8, "little") + saved.read_bytes()[8:])
    with pytest.raises(TalosValueError, match=r"JSON|truncated"):
        load_file(saved, "task_vector")


def entry(encoding: str, size: int, nnz: int, name: str = "w") -> dict[str, Any]:
    return {"name": name, "shape": [size], "encoding": encoding, "nnz": nnz}


def numbers(count: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"w.values": np.ones(count, dtype)}


def u16(positions: list[int], count: int) -> dict[str, np.ndarray]:
    found = {"w.positions": np.array(positions, np.uint16), "w.counts": np.array([count], np.int32)}
    return numbers(2) | found


def nested(levels: int) -> dict[str, Any]:
    """Return content that takes so many levels, with the one around it."""
    found: dict[str, Any] = {}
    for _ in range(levels - 2):
        found = {"of": found}
    return found


FULL, FEW = [entry("full", 2, 2)], [entry("u16", 100, 2)]
BEYOND = np.array([0, 1 << 30] + [0] * 62, np.int32)


@pytest.mark.parametrize(
    ("tensors", "content", "message"),
    [
        (numbers(3), {"tensors": FULL}, r"w\.values must hold 2"),
        ({}, {"tensors": FULL}, r"w\.values"),
        (numbers(2), {"tensors": [entry("full", 2, 1)]}, "must select 1 entries, got 2"),
        (numbers(0), {"tensors": [entry("full", 10**15, 10**15)]}, "must hold 1000"),
        (numbers(0), {"tensors": [entry("u16", 2**60, 0)]}, "must be smaller"),
        (numbers(0), {"tensors": [entry("bitmap", 2**40, 3)]}, "hardly a selected entry"),
        (numbers(0), {"tensors": [entry("bitmap", 2**30, 2**20)]}, "words"),
        (numbers(0), {"tensors": [entry("full", 2**63, 2**63)]}, "sizes of 63 bits"),
        (numbers(0), {"tensors": [{**entry("u16", 0, 0), "shape": [0, 10**4000]}]}, "of 63 bits"),
        (numbers(2), {"tensors": FULL, "made": nested(301)}, "nested at most 300 times"),
        (numbers(2), {"tensors": [entry("gzip", 2, 2)]}, "encoding"),
        (numbers(2), {"tensors": [entry("full", -2, 2)]}, "tensors must list"),
        (numbers(2), {"tensors": FULL * 2}, "twice"),
        (numbers(2), {"tensors": [{"name": "w"}]}, "tensors must list"),
        (numbers(2), {"tensors": {}}, "tensors must list"),
        (numbers(2), {"tensors": FULL, "made": []}, "objects"),
        (numbers(2), {"tensors": FULL, "more": 1}, "its content must hold"),
        (numbers(2), {}, "its content must hold"),
        (numbers(2), {"tensors": FULL, "fingerprints": {"w": "XYZ"}}, "16 hex digits"),
        (numbers(2), {"tensors": FULL, "fingerprints": {"v": "0" * 16}}, "must name its tensors"),
        (numbers(2) | {"v": np.ones(2)}, {"tensors": FULL}, "only mask and values, got v"),
        (numbers(2) | {"w.words": BEYOND}, {"tensors": FULL}, r"mask and values, got w\.words"),
        ({"w.values": np.array([1, np.nan])}, {"tensors": FULL}, "finite, got nan at position 1"),
        ({"w.values": np.array([1, np.inf])}, {"tensors": FULL}, "finite, got inf at position 1"),
        (numbers(2, np.int32), {"tensors": FULL}, r"be float32, .* got torch\.int32"),
        (numbers(2, np.float64), {"tensors": FULL}, r"be float32, .* got torch\.float64"),
        (
            numbers(1) | {"v.values": np.ones(1, np.float16)},
            {"tensors": [entry("full", 1, 1), entry("full", 1, 1, "v")]},
            "share one dtype",
        ),
        (u16([7, 3], 2), {"tensors": FEW}, "w: positions must be strictly ascending, broken at 1"),
        (u16([3, 3], 2), {"tensors": FEW}, "strictly ascending"),
        (u16([3, 100], 2), {"tensors": FEW}, r"w: positions must lie in \[0, 100\), got 100"),
        (u16([3, 4], 2**31 - 1), {"tensors": FEW}, "w: counts must lie in"),
        (
            numbers(1) | {"w.words": BEYOND},
            {"tensors": [entry("bitmap", 40, 1)]},
            "w: words must select entries below 40",
        ),
    ],
)
def test_content_that_lies_behind_right_checksums(
    tmp_path: Path, tensors: dict[str, np.ndarray], content: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    forge(path, tensors, {"mask": {}, "fingerprints": {}, "made": {}, **content})
    with pytest.raises(TalosError, match=message) as caught:
        TaskVector.load(path)
    assert str(path) in str(caught.value)


def test_what_is_nested_as_deep_as_it_may_be_is_read_and_shown(tmp_path: Path) -> None:
    mask = Mask.from_dense({"w": torch.ones(2) > 0}, metadata=nested(300))
    mask.save(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    with pytest.raises(TalosTypeError, match=r"content must be JSON .*more than 300 levels"):
        Mask(mask.shapes, mask.indices, nested(301)).save(tmp_path / "a")
    assert Mask.load(tmp_path / "a") == mask


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"tensors": FULL, "made": []}, "must hold tensors and made, an object"),
        ({"tensors": FULL}, "must hold tensors and made"),
        ({"tensors": FULL, "made": {}, "more": 1}, "must hold tensors and made"),
        ({"tensors": FULL, "made": {}}, r"only a mask, got w\.values"),
        ({"tensors": [entry("full", 10**4000, 1)], "made": {}}, "sizes of 63 bits"),
        (
            {"tensors": [{**entry("full", 1, 1), "shape": [2**62] * 65}], "made": {}},
            "at most 64 dim",
        ),
    ],
)
def test_a_mask_that_lies_behind_right_checksums(
    tmp_path: Path, content: dict[str, Any], match: str
) -> None:
    forge(tmp_path / "a", numbers(2), content, kind="mask")
    with pytest.raises(TalosValueError, match=f"not a valid mask: .*{match}"):
        Mask.load(tmp_path / "a")


@pytest.mark.parametrize("more", [{"digests": []}, {"content": []}, {"digests": {"v": "0"}}])
def test_metadata_of_another_structure_behind_right_checksums(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    forge(tmp_path / "a", numbers(2), {}, **more)
    with pytest.raises(TalosValueError, match="digests"):
        TaskVector.load(tmp_path / "a")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (pytest.fail, ("it was unpickled",))


def bytes_of(write: Callable[..., object], content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    if write is torch.save:
        write(content, file, **options)
    else:
        write(file, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        *((pickle.dumps(Bomb(), protocol), "pickle") for protocol in range(2, 6)),
        (bytes_of(torch.save, {"w": Bomb()}), "zip archive, as torch"),
        (bytes_of(torch.save, Bomb(), _use_new_zipfile_serialization=False), "pickle"),
        (bytes_of(np.save, np.ones(30)), "NumPy array"),
        (bytes_of(np.savez, np.ones(30)), "zip archive"),
        (pickle.dumps(Bomb(), 0), "not a safetensors file"),
        (b"", "truncated"),
        (b"{}", "not a safetensors file"),
        (b"<!doctype html><html></html>", "not a safetensors file"),
    ],
)
def test_other_formats_are_named_and_never_unpickled(tmp_path: Path, raw: bytes, what: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    for load in (TaskVector.load, Mask.load):
        with pytest.raises(TalosValueError, match=what):
            load(path)


def test_a_mask_is_no_task_vector(tmp_path: Path) -> None:
    vector = small_vector()
    vector.mask.save(tmp_path / "mask")
    vector.save(tmp_path / "vector")
    with pytest.raises(TalosValueError, match=r"got a mask; load it with talos\.Mask\.load"):
        TaskVector.load(tmp_path / "mask")
    with pytest.raises(TalosValueError, match=r"load it with talos\.TaskVector\.load"):
        Mask.load(tmp_path / "vector")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for path in (tmp_path, tmp_path / "device", tmp_path / "pipe"):
        with pytest.raises(TalosOSError, match="must be a regular file"):
            TaskVector.load(path)
        with pytest.raises(TalosOSError, match="must be a regular file"):
            small_vector().save(path)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(TalosOSError, match="No such file"):
        TaskVector.load(tmp_path / "missing")


def test_what_was_loaded_does_not_change_with_the_file(saved: Path) -> None:
    tensors, _ = load_file(saved, "task_vector")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saved.write_bytes(b"\xff" * saved.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


# Writing


def test_an_existing_file_keeps_its_mode_and_a_link_stays(saved: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    plain.unlink()
    saved.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(saved.name)
    small_vector(1).save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640
    assert TaskVector.load(saved) == small_vector(1)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "link"}


def test_overwrite_can_be_refused(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TalosOSError, match="overwrite=True"):
        small_vector(1).save(saved, overwrite=False)
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str
) -> None:
    before = saved.read_bytes()

    def fail(*_: object) -> None:
        raise error

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif moment == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    wanted = TalosOSError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted):
        atomic_write(saved, fail if moment == "write" else lambda new: new.write_bytes(b"new"))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_folders_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "a", saved / "a"):
        with pytest.raises(TalosOSError, match=r"must be writable, .*check that its folder exists"):
            small_vector().save(path)
    long = tmp_path / ("x" * 255)
    small_vector().save(long)
    assert TaskVector.load(long) == small_vector()


def test_two_writers_and_a_reader(saved: Path) -> None:
    vectors = [small_vector(seed) for seed in (0, 1, 2)]
    stop = threading.Event()

    def write(vector: TaskVector) -> None:
        while not stop.is_set():
            vector.save(saved)

    threads = [threading.Thread(target=write, args=(vector,)) for vector in vectors[1:]]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert TaskVector.load(saved) in vectors
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert TaskVector.load(saved) in vectors[1:]
    assert list(saved.parent.iterdir()) == [saved]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED = """
import os, pathlib, random, signal, sys, time
from tests.task_vectors.test_files import TaskVector, small_vector
path = pathlib.Path(sys.argv[1])
vectors = [small_vector(0), small_vector(1)]
vectors[0].save(path)
random.seed(0)
for _ in range(40):
    child = os.fork()
    if child == 0:
        while True:
            for vector in vectors:
                vector.save(path)
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert TaskVector.load(path) in vectors
    assert all(p == path or p.name.startswith(".talos-") for p in path.parent.iterdir())
print("ok")
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    assert run_python(KILLED, tmp_path / "a.safetensors") == "ok\n"


LIMITED = """
import pathlib, resource, sys
import torch
from tests.task_vectors.test_files import Mask, TalosOSError, TaskVector, small_vector
path = pathlib.Path(sys.argv[1])
small_vector().save(path)
before = path.read_bytes()
mask = Mask.from_dense({"w": torch.ones(50_000) > 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, 64_000))
for target in (path, path.with_name("b")):
    try:
        TaskVector(mask, torch.ones(50_000)).save(target)
    except TalosOSError as error:
        assert "File too large" in str(error) and "has room" in str(error), error
    else:
        raise AssertionError("the write went through")
assert path.read_bytes() == before
assert list(path.parent.iterdir()) == [path]
print("ok")
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    assert run_python(LIMITED, tmp_path / "a.safetensors") == "ok\n"


MEMORY = """
import pathlib, sys
import torch
from safetensors import safe_open
from tests.task_vectors.test_files import Mask, TaskVector, dense_mask
from talos.task_vectors import Patch
folder = pathlib.Path(sys.argv[1])

def peak_kib():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

def peak_of(call):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_kib()
    call()
    return peak_kib() - before

def largest_kib(path):
    with safe_open(path, framework="pt") as file:
        return max(file.get_tensor(name).nbytes for name in file.keys()) // 1024

generator = torch.Generator().manual_seed(0)
dense = {str(i): dense_mask(4_000_000, 0.6, generator) for i in range(2)}
dense["few"] = dense_mask(32_000_000, 0.05, generator)
mask, size = Mask.from_dense(dense), 2_000_000
where, values = torch.arange(size) * 9, torch.randn(size)
bits = Mask.from_dense({"bits": dense_mask(32_000_000, 0.3, generator)})
vector = TaskVector(mask, torch.randn(mask.nnz))
patches = [
    Patch({"w": (9 * size,)}, {"w": where}, {"w": values.to(dtype)})
    for dtype in (torch.bfloat16, torch.float8_e4m3fn)
]
for number, each in enumerate((vector, mask, bits, *patches)):
    each.save(folder / str(number))
    saving = peak_of(lambda: each.save(folder / str(number)))
    type(each).load(folder / str(number))
    loading = peak_of(lambda: type(each).load(folder / str(number)))
    size = (folder / str(number)).stat().st_size // 1024
    print(saving, loading, size, largest_kib(folder / str(number)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_the_memory_of_the_file_and_its_largest_tensor(tmp_path: Path) -> None:
    # What is freed goes back to the system at once, so that a peak is what a load needs.
    lines = run_python(MEMORY, tmp_path, MALLOC_MMAP_THRESHOLD_="65536").splitlines()
    assert len(lines) == 5
    for saving, loading, size, largest in (map(int, line.split()) for line in lines):
        assert size > 3 * 1024
        assert loading < size + largest + 4 * 1024  # and what is checked at a time
        assert saving < 4 * 1024
