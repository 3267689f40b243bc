"""The header of a safetensors file: written in one order, read without trust."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError

from .atomic import atomic_write

__all__ = ["DTYPES", "Buffer", "bytes_of", "layout", "parse_json", "read_header", "write_tensors"]

DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
"""The dtypes that the files hold, by their names in the format."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
# A parsed value takes at most this many bytes in memory, counted by the brackets and commas
# around it; with the limit below, a header cannot make the reader need much more than the file.
_BYTES_PER_MARK = 128
_HEADER_MEMORY = 16 << 20
# First bytes of what is given instead: pickle protocols 2 to 5, zip (torch.save, npz), ...
_MAGICS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    *((bytes([0x80, protocol]), "a pickle") for protocol in range(2, 6)),
)


@dataclass(frozen=True)
class Buffer:
    """A tensor's place in a file: dtype code, shape, and range in the data, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Buffer]:
    """Where each tensor lies: wide dtypes first, so that each is aligned, else as given.

    Raises:
        TalosTypeError: a dtype has no place in the format.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in _CODES:
            raise TalosTypeError(
                f"tensors[{name!r}] must be one of {', '.join(map(str, _CODES))}, got {dtype}"
            )
    buffers, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + prod(shape) * dtype.itemsize
        buffers[name] = Buffer(_CODES[dtype], shape, begin, end)
    return buffers


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time.

    Args:
        path: the file.
        tensors: dtype and shape of each tensor, by name.
        metadata: the header's strings.
        tensor: gives the tensor of a name when its turn has come.

    Raises:
        TalosTypeError: a dtype has no place in the format.
        TalosValueError: a name is not valid Unicode or taken.
        TalosOSError: the file cannot be written; an older one is left as it was.
    """
    if "__metadata__" in tensors:
        raise TalosValueError("tensors must not use the name '__metadata__'; choose another")
    buffers = layout(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, buffer in buffers.items():
        offsets = [buffer.begin, buffer.end]
        header[name] = {"dtype": buffer.dtype, "shape": buffer.shape, "data_offsets": offsets}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise TalosValueError(f"tensors and metadata must be valid Unicode, got {error}") from None
    text += b" " * (-len(text) % _LENGTH_BYTES)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for name in buffers:
            file.write(bytes_of(tensor(name)))

    atomic_write(path, write)


def read_header(
    file: BufferedReader, path: Path, size: int
) -> tuple[dict[str, Buffer], dict[str, str]]:
    """Read and check a header; leaves the file at its first byte of data.

    Args:
        file: open at its start.
        path: for messages.
        size: of the whole file in bytes.

    Returns:
        The tensors in the order of their data, and the metadata.

    Raises:
        TalosValueError: the header lies about the file, is not JSON, or names something twice.
    """
    text = _header_text(file, path, size)
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise TalosValueError(
            f"{path}: its header must be JSON, got {error}; the file is damaged, fetch it again"
        ) from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TalosValueError(
            f"{path}: a safetensors file without metadata, which talos did not write; masks and "
            "task vectors come from .save()"
        )
    found = {name: _buffer(path, name, entry) for name, entry in header.items()}
    buffers = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_data(path, buffers.items(), size - file.tell())
    return buffers, metadata


def _header_text(file: BufferedReader, path: Path, size: int) -> bytes:
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    first = file.read(1)
    if len(start) < _LENGTH_BYTES or length > size - _LENGTH_BYTES or first != b"{":
        for magic, what in _MAGICS:
            if start.startswith(magic):
                raise TalosValueError(
                    f"{path}: {what}, not a safetensors file; it is never unpickled, load it with "
                    "the library that wrote it and save a mask or task vector with .save()"
                )
        if first == b"{" and length > size - _LENGTH_BYTES:
            raise TalosValueError(
                f"{path}: truncated or damaged: its header must have {length} bytes, got "
                f"{size - _LENGTH_BYTES}; fetch it again"
            )
        raise TalosValueError(
            f"{path}: not a safetensors file, or truncated at byte {size}; fetch it again"
        )
    if length > _HEADER_MEMORY + size // 8:
        raise TalosValueError(f"{path}: its header of {length} bytes is out of proportion")
    text = first + file.read(length - 1)
    marks = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if marks * _BYTES_PER_MARK > _HEADER_MEMORY + size // 8:
        raise TalosValueError(f"{path}: its header holds about {marks} values, out of proportion")
    return text


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no object names a key twice.

    Raises:
        ValueError: it is not such JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def _buffer(path: Path, name: str, entry: object) -> Buffer:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TalosValueError(f"{path}: {name}: its header entry must hold dtype, shape, offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise TalosValueError(
            f"{path}: {name}: dtype must be one of {', '.join(DTYPES)}, got {code!r}"
        )
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(map(_is_size, numbers)):
            raise TalosValueError(f"{path}: {name}: {what} must be sizes, got {numbers!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * DTYPES[code].itemsize:
        raise TalosValueError(
            f"{path}: {name}: data_offsets must span {code} of shape {shape}, got {offsets}"
        )
    return Buffer(code, tuple(shape), *offsets)


def _check_data(path: Path, buffers: Iterable[tuple[str, Buffer]], size: int) -> None:
    """Refuse buffers that overlap, leave holes, or do not end where the file ends."""
    end = 0
    for name, buffer in buffers:
        if buffer.begin != end:
            what = "a hole before" if buffer.begin > end else "an overlap at"
            raise TalosValueError(
                f"{path}: {name}: its data must begin at byte {end} of the data, got {buffer.begin}"
                f": {what} it"
            )
        end = buffer.end
    if end != size:
        what = "truncated: " if size < end else "bytes after the last tensor: "
        raise TalosValueError(
            f"{path}: {what}its data must have {end} bytes, got {size}; fetch it again"
        )
