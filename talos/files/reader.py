"""Open safetensors files that are not trusted."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from talos.errors import TalosOSError, TalosValueError

__all__ = ["Header", "explained", "open_file", "opened", "parse_json", "read_tensor"]

# Parsing JSON takes at most this many bytes per bracket or comma. With the limit below, no header
# makes the reader need much more memory than the file's size.
_BYTES_PER_MARK = 128
_HEADER_MEMORY = 16 << 20
# First bytes of files that are given by mistake.
_MAGICS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    *((bytes([0x80, protocol]), "a pickle") for protocol in range(2, 6)),
)


class Header(NamedTuple):
    """The header of a file.

    Attributes:
        raw: its bytes, with the eight of its length: what stands before the data.
        entries: `dtype`, `shape` and `data_offsets` of each tensor, by name.
        metadata: the texts under `__metadata__`.
    """

    raw: bytes
    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file with the safetensors library and check its header.

    Yields:
        The library's `safe_open`, whose methods have no types.

    Raises:
        TalosValueError: the file is not safetensors, or its header is wrong or too large.
        TalosOSError: it cannot be read, or is not a regular file.
    """
    with explained(path):
        yield open_file(path)[0]


def open_file(path: Path) -> tuple[Any, Header]:
    """Return the library's `safe_open` of a file, and its checked header; see `explained`.

    The file stays open as long as the first lives. Tensors are read, not mapped into memory: if the
    file is overwritten, what was checked must not change.
    """
    if path.exists() and not path.is_file():
        raise TalosOSError(
            f"path must be a regular file, got {path}, a folder or device; name the file"
        )
    file = safe_open(path, framework="pt", backend="pread")
    return file, _header(path)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise the errors of the library and of the system as those of this package."""
    try:
        yield
    except SafetensorError as error:
        raise TalosValueError(f"{path}: {_explanation(path, error)}") from None
    except TalosOSError:
        raise
    except OSError as error:
        raise TalosOSError(
            f"path must be a readable file, got {path} ({error.strerror or error}); "
            "check its name and permissions"
        ) from error


def read_tensor(file: Any, name: str) -> Tensor:
    """Return a tensor of an opened file, on the CPU whatever the default device is."""
    with torch.device("cpu"):
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _explanation(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    for magic, what in _MAGICS:
        if start.startswith(magic) and not start.endswith(b"{"):
            return (
                f"{what}, not a safetensors file; it is never unpickled, load it with the library "
                "that wrote it and save a mask or task vector with .save()"
            )
    return f"truncated, damaged or not a safetensors file ({error}); fetch it again"


def _header(path: Path) -> Header:
    """Return the header; refuse what the library accepts: a bloated one, keys twice, unknown keys.

    Another file may have taken the name since the library opened it. The checksums hold all the
    same, because they are computed over what the library read.
    """
    limit = _HEADER_MEMORY + path.stat().st_size // 8
    with path.open("rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        text = file.read(min(length, limit))
    marks = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if length > limit or marks * _BYTES_PER_MARK > limit:
        raise TalosValueError(
            f"{path}: its header must be in proportion to the file, got {length} bytes and about "
            f"{marks} values; fetch it again"
        )
    try:
        entries = parse_json(text)
        metadata = entries.pop("__metadata__", {})
        for name, entry in entries.items():
            if set(entry) != {"dtype", "shape", "data_offsets"}:
                raise ValueError(f"the keys {', '.join(entry)} for {name}")
    except (ValueError, AttributeError, TypeError) as error:
        raise TalosValueError(
            f"{path}: its header must hold dtype, shape and data_offsets of each tensor once, got "
            f"{error}; fetch it again"
        ) from None
    return Header(size + text, entries, metadata)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, or an object names a key twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} twice")
    return found
