"""Opening safetensors files that are not trusted."""

import contextlib
import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from talos.errors import TalosOSError, TalosValueError

__all__ = ["opened", "parse_json"]

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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file with the safetensors library; its errors, then and later, name the file.

    Yields:
        The library's `safe_open`, whose methods have no types.

    Raises:
        TalosValueError: it is no safetensors file, or its header lies, names something twice, or
            would take much memory.
        TalosOSError: it cannot be read, or is not a regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TalosOSError(
                f"path must be a regular file, got {path}, a folder or device; name the file"
            )
        # Not mapped into memory: who overwrites the file must not change what was checked.
        with safe_open(path, framework="pt", backend="pread") as file:
            _check_header(path)
            yield file
    except SafetensorError as error:
        raise TalosValueError(f"{path}: {_explain(path, error)}") from None
    except TalosOSError:
        raise
    except OSError as error:
        raise TalosOSError(
            f"path must be a readable file, got {path} ({error.strerror or error}); "
            "check its name and permissions"
        ) from error


def _explain(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    for magic, what in _MAGICS:
        if start.startswith(magic) and not start.endswith(b"{"):
            return (
                f"{what}, not a safetensors file; it is never unpickled, load it with the library "
                "that wrote it and save a mask or task vector with .save()"
            )
    return f"truncated, damaged or not a safetensors file ({error}); fetch it again"


def _check_header(path: Path) -> None:
    """Refuse what the library lets pass: keys that come twice, unknown ones, a bloated header.

    Another file may have taken the name since the library opened it; what is loaded then is whole
    all the same, as the checksums are taken over what the library read.
    """
    limit = _HEADER_MEMORY + path.stat().st_size // 8
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, limit))
    marks = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if length > limit or marks * _BYTES_PER_MARK > limit:
        raise TalosValueError(
            f"{path}: its header of {length} bytes and about {marks} values is out of proportion"
        )
    try:
        header = parse_json(text)
        strangers = [name for name, entry in header.items() if not _is_entry(name, entry)]
    except (ValueError, AttributeError) as error:
        raise TalosValueError(
            f"{path}: its header must be JSON, got {error}; the file is damaged, fetch it again"
        ) from None
    if strangers:
        raise TalosValueError(
            f"{path}: {strangers[0]}: its header entry must hold dtype, shape and offsets alone"
        )


def _is_entry(name: str, entry: dict[str, Any]) -> bool:
    return name == "__metadata__" or entry.keys() == {"dtype", "shape", "data_offsets"}


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
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} twice")
    return found
