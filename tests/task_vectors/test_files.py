"""Files of masks and task vectors: every fault is refused, and a write is whole or nothing."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
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
from safetensors import safe_open

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


def raw_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def forge(path: Path, tensors: dict[str, np.ndarray], entries: dict[str, Any]) -> None:
    """Write a file by safetensors and by the format's own description: checksums that fit."""
    codes = {"float32": "F32", "int32": "I32", "uint16": "U16", "float16": "F16"}
    digests = {n: hashlib.sha256(t.tobytes()).hexdigest() for n, t in tensors.items()}
    own = {"format": "talos", "kind": "task_vector", "version": 1, "digests": digests}
    strings = {name: json.dumps(value) for name, value in {**own, **entries}.items()}
    listed = sorted([n, codes[str(t.dtype)], list(t.shape)] for n, t in tensors.items())
    canonical = json.dumps(
        [strings, listed], sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    strings["checksum"] = json.dumps(hashlib.sha256(canonical.encode()).hexdigest())
    safetensors.numpy.save_file(tensors, path, strings)


# What is read is what was written


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype | None) -> None:
    path = tmp_path / "a.safetensors"
    vector = small_vector()
    vector.save(path, dtype)
    loaded = TaskVector.load(path)
    assert same(loaded, vector if dtype is None else vector.astype(dtype))
    assert list(loaded.mask.shapes) == list(SHAPES)
    assert loaded.mask == vector.mask


def test_other_tools_read_the_files_and_may_write_them_anew(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    vector = small_vector()
    values = torch.cat([tensors[f"{name}.values"] for name in SHAPES])
    assert torch.equal(values, vector.values)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["made"]) == {"task": "übung", "seed": 0}
    safetensors.torch.save_file(tensors, saved, metadata)
    assert same(TaskVector.load(saved), vector)
    safetensors.torch.save_file(tensors, saved)
    with pytest.raises(TalosValueError, match="talos did not write"):
        TaskVector.load(saved)


def test_equal_vectors_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    TaskVector.load(saved).save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == saved.read_bytes()


def test_the_format_is_the_one_described(tmp_path: Path) -> None:
    vector = TaskVector(Mask.from_dense({"w": torch.ones(2) > 0}), torch.tensor([1.0, 2.0]))
    entries = {
        "tensors": [{"name": "w", "shape": [2], "encoding": "full", "nnz": 2}],
        "mask": {},
        "fingerprints": {},
        "made": {},
    }
    forge(tmp_path / "a", {"w.values": np.array([1, 2], np.float32)}, entries)
    assert TaskVector.load(tmp_path / "a") == vector


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


def test_save_refuses_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(TalosTypeError, match=r"must be one of .* got torch\.float64"):
        save_file(path, "mask", {"w": torch.ones(1).double()}, {})
    with pytest.raises(
        TalosValueError, match=r"tensors\['w'\] must be finite, got nan at position 1"
    ):
        save_file(path, "mask", {"w": torch.tensor([1.0, math.nan])}, {})
    with pytest.raises(TalosValueError, match="kind must be one of"):
        save_file(path, "model", {}, {})
    with pytest.raises(TalosValueError, match="must not use the names"):
        save_file(path, "mask", {}, {"version": 2})
    for wrong in (math.nan, {1, 2}, object(), b"x"):
        with pytest.raises(TalosTypeError, match=r"metadata\['made'\] must be JSON"):
            save_file(path, "mask", {}, {"made": wrong})
    with pytest.raises(TalosValueError, match="'__metadata__'"):
        save_file(path, "mask", {"__metadata__": torch.ones(1)}, {})
    with pytest.raises(TalosValueError, match="valid Unicode"):
        save_file(path, "mask", {"\ud800": torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())
    save_file(path, "mask", {}, {})
    assert load_file(path, "mask") == ({}, {})


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


def test_every_flipped_bit(saved: Path) -> None:
    raw, vector = bytearray(saved.read_bytes()), small_vector()
    messages: set[str] = set()
    with saved.open("r+b", buffering=0) as file:
        for position, byte in enumerate(raw):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                try:
                    loaded = TaskVector.load(saved)
                except TalosValueError as error:
                    messages.add(str(error).partition(": ")[0])
                else:
                    assert same(loaded, vector), (position, bit)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert messages == {str(saved)}
    assert same(TaskVector.load(saved), vector)


def test_a_flipped_bit_in_the_data_names_the_tensor(saved: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[-1] ^= 1
    saved.write_bytes(raw)
    with pytest.raises(
        TalosValueError, match=r"a\.safetensors: .*: the checksum of its data does not"
    ):
        TaskVector.load(saved)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["bits.values"].update(data_offsets=[0, 48]), "offset for tensor `bits.words`"),
        (lambda h: h["bits.values"].update(data_offsets=[0, 2**63]), "offset for .*`bits.values`"),
        (lambda h: h["bits.values"].update(data_offsets=[0, 2**64]), "expected usize"),
        (lambda h: h["bits.values"].update(data_offsets=[48, 0]), "offset for .*`bits.values`"),
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
        (lambda h: h["bits.words"].update(dtype="F8_E4M3", shape=[256]), "dtype must be one of"),
        (lambda h: h["bits.words"].update(dtype="F64", shape=[32]), "dtype must be one of"),
        (lambda h: h["bits.words"].update(dtype="F32"), "checksum of its metadata"),
        (lambda h: h["bits.words"].update(shape=[8, 8]), "checksum of its metadata"),
        (lambda h: h["bits.values"].update(dtype=["F32"]), "invalid JSON"),
        (lambda h: h["bits.values"].update(extra=1), "must hold dtype"),
        (lambda h: h["bits.values"].pop("shape"), "missing field `shape`"),
        (lambda h: h.update({"bits.values": 3}), "integer `3`, expected"),
        (lambda h: h.pop("bits.values"), "invalid offset"),
        (lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "digests"),
        (lambda h: h.pop("__metadata__"), "talos did not write"),
        (lambda h: h.update(__metadata__=[]), "expected a map"),
        (lambda h: h["__metadata__"].update(made=3), "expected a string"),
        (lambda h: h["__metadata__"].pop("format"), "talos did not write"),
        (lambda h: h["__metadata__"].update(format='"pt"'), "talos did not write"),
        (lambda h: h["__metadata__"].update(format="pt"), "'format' must be JSON"),
        (lambda h: h["__metadata__"].update(made='{"a":1,"a":2}'), "the key 'a' twice"),
        (lambda h: h["__metadata__"].pop("version"), "version must be a number"),
        (lambda h: h["__metadata__"].update(version="true"), "version must be a number"),
        (lambda h: h["__metadata__"].update(version="2"), "upgrade talos-sparse"),
        (lambda h: h["__metadata__"].pop("kind"), "must hold a task_vector"),
        (lambda h: h["__metadata__"].update(kind='"mask"'), r"load it with talos\.Mask\.load"),
        (lambda h: h["__metadata__"].update(kind="[]"), "must hold a task_vector"),
        (lambda h: h["__metadata__"].pop("digests"), "digests must name every tensor"),
        (lambda h: h["__metadata__"].update(digests='{"a":1}'), "digests must name every tensor"),
        (lambda h: h["__metadata__"].pop("checksum"), "checksum of its metadata"),
        (lambda h: h["__metadata__"].update(more="1"), "checksum of its metadata"),
        (lambda h: h["__metadata__"].update(made='{"task":"other"}'), "checksum of its metadata"),
    ],
)
def test_a_header_that_lies(saved: Path, change: Change, message: str) -> None:
    header, data = parts_of(saved.read_bytes())
    change(header)
    saved.write_bytes(raw_of(header, data))
    with pytest.raises(TalosValueError, match=message) as caught:
        TaskVector.load(saved)
    assert str(saved) in str(caught.value)


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


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
        (b'{"w":%b,"w":%b}' % (EMPTY, EMPTY), "the key 'w' twice"),
        (b'{"__metadata__":{"a":"1","a":"1"}}', "the key 'a' twice"),
        (b'{"__metadata__":{"format":"' + b"[" * 50_000 + b'"}}', "'format' must be JSON"),
        (b'{"w":' + EMPTY[:-1] + b',"more":[' + b"[]," * 300_000 + b"[]]}}", "out of proportion"),
        (b'{"__metadata__":{"a":"[' + b"[]," * 300_000 + b'[]]"}}', "out of proportion"),
        (b"{" + b" " * (32 << 20) + b"}", "out of proportion"),
    ],
)
def test_a_header_that_is_none(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(raw_of(header, b""))
    with pytest.raises(TalosValueError, match=message):
        load_file(path, "mask")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_length_that_lies(saved: Path, length: int) -> None:
    saved.write_bytes(length.to_bytes(8, "little") + saved.read_bytes()[8:])
    with pytest.raises(TalosValueError, match=r"JSON|truncated"):
        load_file(saved, "task_vector")


def entry(encoding: str, size: int, nnz: int, name: str = "w") -> dict[str, Any]:
    return {"name": name, "shape": [size], "encoding": encoding, "nnz": nnz}


def values(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


@pytest.mark.parametrize(
    ("tensors", "entries", "message"),
    [
        ({"w.values": values(3)}, {"tensors": [entry("full", 2, 2)]}, r"w\.values must hold 2"),
        ({}, {"tensors": [entry("full", 2, 2)]}, r"w\.values"),
        (
            {"w.values": values(2)},
            {"tensors": [entry("full", 2, 1)]},
            "must select 1 entries, got 2",
        ),
        ({"w.values": values(0)}, {"tensors": [entry("full", 10**15, 10**15)]}, "must hold 1000"),
        ({"w.values": values(0)}, {"tensors": [entry("u16", 2**60, 0)]}, "must be smaller"),
        ({"w.values": values(0)}, {"tensors": [entry("bitmap", 2**40, 3)]}, "words"),
        ({"w.values": values(2)}, {"tensors": [entry("gzip", 2, 2)]}, "encoding"),
        ({"w.values": values(2)}, {"tensors": [entry("full", -2, 2)]}, "tensors must list"),
        ({"w.values": values(2)}, {"tensors": [entry("full", 2, 2), entry("full", 2, 2)]}, "twice"),
        ({"w.values": values(2)}, {"tensors": [{"name": "w"}]}, "tensors must list"),
        ({"w.values": values(2)}, {"tensors": {}}, "tensors must list"),
        ({"w.values": values(2)}, {"tensors": [entry("full", 2, 2)], "made": []}, "objects"),
        ({"w.values": values(2)}, {"tensors": [entry("full", 2, 2)], "more": 1}, "metadata must"),
        (
            {"w.values": values(2)},
            {"tensors": [entry("full", 2, 2)], "fingerprints": {"w": "XYZ"}},
            "16 hex digits",
        ),
        (
            {"w.values": values(2)},
            {"tensors": [entry("full", 2, 2)], "fingerprints": {"v": "0" * 16}},
            "fingerprints must name its tensors",
        ),
        (
            {"w.values": values(2), "v.values": values(2)},
            {"tensors": [entry("full", 2, 2)]},
            r"only mask and values, got v\.values",
        ),
        (
            {"w.values": values(2), "w.words": np.zeros(64, np.int32)},
            {"tensors": [entry("full", 2, 2)]},
            r"only mask and values, got w\.words",
        ),
        (
            {"w.values": np.array([1, np.nan], np.float32)},
            {"tensors": [entry("full", 2, 2)]},
            r"w\.values must be finite, got nan at position 1",
        ),
        (
            {"w.values": np.array([1, np.inf], np.float16)},
            {"tensors": [entry("full", 2, 2)]},
            r"w\.values must be finite, got inf at position 1",
        ),
        (
            {"w.values": np.ones(2, np.int32)},
            {"tensors": [entry("full", 2, 2)]},
            r"w\.values must be floating point, got torch\.int32",
        ),
        (
            {"w.values": values(1), "v.values": np.ones(1, np.float16)},
            {"tensors": [entry("full", 1, 1), entry("full", 1, 1, "v")]},
            "share one dtype",
        ),
        (
            {
                "w.values": values(2),
                "w.positions": np.array([7, 3], np.uint16),
                "w.counts": np.array([2], np.int32),
            },
            {"tensors": [entry("u16", 100, 2)]},
            "w: positions must be strictly ascending, broken at 1",
        ),
        (
            {
                "w.values": values(2),
                "w.positions": np.array([3, 3], np.uint16),
                "w.counts": np.array([2], np.int32),
            },
            {"tensors": [entry("u16", 100, 2)]},
            "strictly ascending",
        ),
        (
            {
                "w.values": values(2),
                "w.positions": np.array([3, 100], np.uint16),
                "w.counts": np.array([2], np.int32),
            },
            {"tensors": [entry("u16", 100, 2)]},
            r"w: positions must lie in \[0, 100\), got 100",
        ),
        (
            {
                "w.values": values(2),
                "w.positions": np.array([3, 4], np.uint16),
                "w.counts": np.array([2**31 - 1], np.int32),
            },
            {"tensors": [entry("u16", 100, 2)]},
            "w: counts must lie in",
        ),
        (
            {"w.values": values(1), "w.words": np.array([0, 1 << 30] + [0] * 62, np.int32)},
            {"tensors": [entry("bitmap", 40, 1)]},
            "w: words must select entries below 40",
        ),
    ],
)
def test_content_that_lies_behind_right_checksums(
    tmp_path: Path, tensors: dict[str, np.ndarray], entries: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    forge(path, tensors, {"mask": {}, "fingerprints": {}, "made": {}, **entries})
    with pytest.raises(TalosError, match=message) as caught:
        TaskVector.load(path)
    assert str(path) in str(caught.value)


def test_missing_entries_of_metadata(tmp_path: Path) -> None:
    for missing in ("tensors", "mask", "fingerprints", "made"):
        entries = {"tensors": [], "mask": {}, "fingerprints": {}, "made": {}}
        del entries[missing]
        forge(tmp_path / "a", {}, entries)
        with pytest.raises(TalosValueError, match="its metadata must hold"):
            TaskVector.load(tmp_path / "a")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (pytest.fail, ("it was unpickled",))


def torch_bytes(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"w": Bomb()}, file, **options)
    return file.getvalue()


def numpy_bytes(write: Callable[..., object], content: object) -> bytes:
    file = io.BytesIO()
    write(file, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        *((pickle.dumps(Bomb(), protocol), "pickle") for protocol in range(2, 6)),
        (torch_bytes(), "zip archive, as torch"),
        (torch_bytes(_use_new_zipfile_serialization=False), "pickle"),
        (numpy_bytes(np.save, np.ones(30)), "NumPy array"),
        (numpy_bytes(np.savez, np.ones(30)), "zip archive"),
        (pickle.dumps(Bomb(), 0), "not a safetensors file"),
        (b"", "truncated"),
        (b"{}", "not a safetensors file"),
        (b"<!doctype html><html></html>", "not a safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_other_formats_are_named_and_never_unpickled(
    tmp_path: Path, raw: bytes, what: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    for load in (TaskVector.load, Mask.load):
        with pytest.raises(TalosValueError, match=what):
            load(path)


def test_a_mask_is_no_task_vector(tmp_path: Path) -> None:
    vector = small_vector()
    vector.mask.save(tmp_path / "mask")
    vector.save(tmp_path / "vector")
    with pytest.raises(TalosValueError, match=r"this is a mask; load it with talos\.Mask\.load"):
        TaskVector.load(tmp_path / "mask")
    with pytest.raises(TalosValueError, match=r"load it with talos\.TaskVector\.load"):
        Mask.load(tmp_path / "vector")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(TalosOSError, match="must be a regular file"):
            TaskVector.load(path)
        with pytest.raises(TalosOSError, match="must be a regular file"):
            small_vector().save(path)
    assert stat.S_ISCHR(Path("/dev/zero").stat().st_mode)
    with pytest.raises(TalosOSError, match="No such file"):
        TaskVector.load(tmp_path / "missing")


def test_what_was_loaded_does_not_change_with_the_file(saved: Path) -> None:
    tensors, _ = load_file(saved, "task_vector")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saved.write_bytes(b"\xff" * saved.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


# Writing


def test_an_existing_file_keeps_its_mode_and_a_link_stays(saved: Path, tmp_path: Path) -> None:
    saved.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(saved.name)
    small_vector(1).save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640
    assert TaskVector.load(saved) == small_vector(1)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "link"}
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(TalosOSError, match="must be a regular file"):
        small_vector().save(tmp_path / "device")


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
        atomic_write(saved, fail if moment == "write" else lambda file: file.write(b"new"))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "choose another folder"), (errno.ENOSPC, "free some space")],
)
def test_errors_of_the_system_come_with_a_remedy(
    saved: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(TalosOSError, match=f"a.safetensors .{os.strerror(number)}.; {remedy}"):
        small_vector().save(saved)


def test_folders_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match="create its folder first"):
        small_vector().save(tmp_path / "no" / "a")
    with pytest.raises(TalosOSError, match="must be writable"):
        small_vector().save(saved / "a")
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


def run_python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
        assert "File too large" in str(error) and "raise the limit" in str(error), error
    else:
        raise AssertionError("the write went through")
assert path.read_bytes() == before
assert list(path.parent.iterdir()) == [path]
print("ok")
"""


def test_a_full_disk(tmp_path: Path) -> None:
    assert run_python(LIMITED, tmp_path / "a.safetensors") == "ok\n"


MEMORY = """
import pathlib, sys
import torch
from tests.task_vectors.test_files import Mask, TaskVector, dense_mask
path = pathlib.Path(sys.argv[1])

def peak_kib():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

def save():
    generator = torch.Generator().manual_seed(0)
    dense = {str(i): dense_mask(4_000_000, 0.6, generator) for i in range(2)}
    dense["few"] = dense_mask(8_000_000, 0.03, generator)
    mask = Mask.from_dense(dense)
    TaskVector(mask, torch.randn(mask.nnz)).save(path)

save()
size = path.stat().st_size // 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = peak_kib()
vector = TaskVector.load(path)
print(peak_kib() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    used, size = map(int, run_python(MEMORY, tmp_path / "a.safetensors").split())
    assert size > 18 * 1024
    assert used < size + 16 * 1024
