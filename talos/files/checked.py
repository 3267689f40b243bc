"""Save and load the files of masks and task vectors, with a checksum for every bit."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files.atomic import atomic_write
from talos.files.reader import opened, parse_json, read_tensor

__all__ = [
    "VERSION",
    "OtherFile",
    "check_entries",
    "check_name",
    "claimed_kind",
    "digest",
    "load_file",
    "save_file",
    "write_tensors",
]

VERSION = 2
"""Version of the format that is written; no other is read."""

_LOADERS = {
    "mask": "talos.Mask.load",
    "task_vector": "talos.TaskVector.load",
    "patch": "talos.Patch.load",
    "checkpoint": "talos.fine_tune(..., checkpoint=FOLDER, resume=True)",
}
_CHUNK = 1 << 18  # entries that are cast at a time
_MOST_NESTED = 300  # Python ends at about a thousand nested calls
_MOST_DIMENSIONS = 64
_MOST_EMPTY = 1 << 36  # dense entries; the index keeps 8 bytes for 65536 of them


class OtherFile(TalosValueError):
    """A file that holds something else, or in another version: it need not be damaged."""


def save_file(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    *,
    finite: bool = True,
) -> None:
    """Write tensors and JSON content to a file, atomically; equal content gives equal bytes.

    Args:
        path: the file, by convention `*.safetensors`; an older one is replaced.
        kind: `mask`, `task_vector`, `patch`, `heads` or `checkpoint`.
        tensors: dense, of any shape and device.
        content: JSON-able; tuples come back as lists.
        finite: refuse NaN and infinity.

    Raises:
        TalosTypeError: `content` is not JSON-able.
        TalosValueError: a value is NaN or infinite, or a name cannot be written.
        TalosOSError: the file cannot be written; an older one is left as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     save_file(path, "mask", {"w.counts": torch.ones(2).int()}, {"made": "by hand"})
        ...     load_file(path, "mask")
        ({'w.counts': tensor([1, 1], dtype=torch.int32)}, {'made': 'by hand'})
    """
    for name, tensor in tensors.items() if finite else ():
        _check_finite(f"tensors[{name!r}]", tensor)
    about = {
        "version": VERSION,
        "kind": kind,
        "digests": {name: digest(tensor) for name, tensor in tensors.items()},
        "content": dict(content),
    }
    try:
        about = parse_json(_canonical(about))  # keys that are numbers become strings
        if _is_deep(about["content"]):
            raise ValueError(f"more than {_MOST_NESTED} levels")
    except (TypeError, ValueError, RecursionError) as error:
        raise TalosTypeError(
            f"content must be JSON without NaN or infinity, got {error}; convert it to numbers, "
            "strings, lists and dicts"
        ) from None
    text = _canonical({**about, "checksum": _checksum(about)})
    write_tensors(path, tensors, {"talos": text})


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a plain safetensors file, atomically.

    Args:
        path: the file.
        tensors: by name; those on the CPU are not copied.
        metadata: one entry at most; the library writes several in an order that varies.

    Raises:
        TalosValueError: a name is `__metadata__`, which the format keeps, or no valid Unicode.
        TalosOSError: the file cannot be written; an older one is left as it was.
    """
    plain: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        check_name(name)
        own = tensor.detach().cpu().contiguous()
        # The library refuses two names of one memory.
        plain[name] = own.clone() if own.data_ptr() in addresses else own
        addresses.add(own.data_ptr())

    def write(new: Path) -> None:
        try:
            safetensors.torch.save_file(plain, new, metadata)
        except SafetensorError as error:  # the library's only error, also for a full disk
            raise OSError(str(error)) from None

    atomic_write(path, write)


def check_name(name: str) -> None:
    """Refuse a name of a tensor that a file cannot hold.

    Raises:
        TalosValueError: it is `__metadata__`, which the format keeps, or no valid Unicode.
    """
    if name == "__metadata__" or name != name.encode(errors="replace").decode():
        raise TalosValueError(
            f"tensors must have names in valid Unicode and none '__metadata__', got {name!r}; "
            "choose another"
        )


def load_file(
    path: str | os.PathLike[str], kind: str, *, finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_file` wrote and check every bit of it; nothing is ever unpickled.

    Args:
        path: the file.
        kind: what it must hold, as `save_file` names it.
        finite: refuse NaN and infinity.

    Returns:
        The tensors, on the CPU, and the content.

    Raises:
        OtherFile: the file is of another version, kind or format.
        TalosValueError: it is damaged.
        TalosOSError: it cannot be read.
    """
    path = Path(path)
    with opened(path) as file:
        about = _about(path, kind, file.metadata() or {})
        if set(about["digests"]) != set(file.keys()):
            raise TalosValueError(f"{path}: digests must name every tensor; fetch it again")
        tensors = {}
        for name, wanted in about["digests"].items():
            tensors[name] = read_tensor(file, name)
            if digest(tensors[name]) != wanted:
                raise TalosValueError(
                    f"{path}: {name}: the checksum of its data does not fit, the file is damaged; "
                    "fetch it again"
                )
            if finite:
                _check_finite(f"{path}: {name}", tensors[name])
    return tensors, about["content"]


def claimed_kind(path: str | os.PathLike[str]) -> str | None:
    """Return the kind that a file claims, as `load_file` names it, which also checks the claim.

    Raises:
        TalosValueError: it is no safetensors file.
        TalosOSError: it cannot be read.
    """
    with opened(Path(path)) as file:
        text = (file.metadata() or {}).get("talos", "{}")
    try:
        about = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return str(about.get("kind")) if isinstance(about, dict) else None


def _about(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the parsed metadata of a file, checked."""
    text = metadata.get("talos")
    if text is None and metadata.get("format") == '"talos"':
        raise OtherFile(
            f"{path}: version must be {VERSION}, got {metadata.get('version')}, which an earlier "
            "build wrote; make it again"
        )
    if text is None:
        raise OtherFile(
            f"{path}: must hold a {kind}, got a safetensors file that talos did not write; "
            "save one with .save()"
        )
    try:
        about = dict(parse_json(text))
        intact = about.pop("checksum", None) == _checksum(about)
    except (ValueError, TypeError, RecursionError) as error:
        raise TalosValueError(
            f"{path}: its metadata must be a JSON object, got {error}; fetch it again"
        ) from None
    version, found = about.get("version"), about.get("kind")
    if type(version) is not int or version < VERSION:
        raise OtherFile(f"{path}: version must be {VERSION}, got {version!r}; make it again")
    if version > VERSION:
        raise OtherFile(
            f"{path}: version must be at most {VERSION}, got {version}; upgrade talos-sparse"
        )
    if found != kind:
        loader = _LOADERS.get(found) if isinstance(found, str) else None
        remedy = f"load it with {loader}" if loader else "fetch it again"
        wanted, got = (each if each == "heads" else f"a {each}" for each in (kind, found))
        raise OtherFile(f"{path}: must hold {wanted}, got {got}; {remedy}")
    if not intact:
        raise TalosValueError(
            f"{path}: the checksum of its metadata does not fit, it is damaged or was edited; "
            "fetch or save it again"
        )
    if any(not isinstance(about.get(part), dict) for part in ("digests", "content")):
        raise TalosValueError(f"{path}: digests and content must be objects; fetch it again")
    if _is_deep(about["content"]):
        raise TalosValueError(
            f"{path}: its content must be nested at most {_MOST_NESTED} times, got more; make it "
            "again from fewer vectors of vectors"
        )
    return about


def check_entries(entries: Any) -> None:
    """Refuse a list that does not hold `name`, `shape`, `encoding` and `nnz` of each tensor.

    Args:
        entries: the parsed `tensors` of a file, which is not trusted.

    Raises:
        TalosValueError: its structure differs; a size is negative or no integer; a name comes
            twice; a size has more than 63 bits; there are too many dimensions; indices with hardly
            a selected entry, for which the file holds next to nothing, are larger than any model.

    Example:
        >>> check_entries([{"name": "w", "shape": [2], "encoding": "full", "nnz": 2}])
    """
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and set(entry) == {"name", "shape", "encoding", "nnz"}
        and isinstance(entry["name"], str)
        and isinstance(entry["shape"], list)
        and all(type(size) is int and size >= 0 for size in [*entry["shape"], entry["nnz"]])
        for entry in entries
    ):
        raise TalosValueError("tensors must list name, shape, encoding and nnz of each")
    names = Counter(entry["name"] for entry in entries)
    if len(names) < len(entries):
        raise TalosValueError(f"tensors must name {names.most_common(1)[0][0]!r} once, not twice")
    shapes = [entry["shape"] for entry in entries]
    # A product of many large numbers would take minutes.
    if any(len(each) > _MOST_DIMENSIONS or max(each, default=0) >> 63 for each in shapes) or any(
        prod(each) >> 63 for each in shapes
    ):
        raise TalosValueError(
            f"tensors must have sizes of 63 bits in at most {_MOST_DIMENSIONS} dimensions, got more"
        )
    sizes = [prod(each) for each in shapes]
    # The memory of such an index is one of segments, not of selected entries; a patch has none.
    empty = sum(
        size
        for size, entry in zip(sizes, entries, strict=True)
        if entry["encoding"] in ("bitmap", "u16") and entry["nnz"] << 16 < size
    )
    if empty > _MOST_EMPTY:
        raise TalosValueError(
            f"tensors with hardly a selected entry must be smaller, got {empty} entries"
        )


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a dense tensor's dtype, shape and row-major bytes: 64 hex digits."""
    found = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _checksum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(about).encode()).hexdigest()


def _canonical(about: Mapping[str, Any]) -> str:
    return json.dumps(about, allow_nan=False, sort_keys=True, separators=(",", ":"))


def _is_deep(content: Any) -> bool:
    """Return whether JSON is nested more than `_MOST_NESTED` times."""
    level = [content]
    for _ in range(_MOST_NESTED):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [part for e in level for part in (e.values() if isinstance(e, dict) else e)]
    return bool(level)


def _check_finite(what: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    for number, part in enumerate(tensor.detach().reshape(-1).split(_CHUNK)):
        if part.element_size() == 1:  # torch finds no extremes among floats of eight bits
            part = part.float()
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(part)):
            where = int((~torch.isfinite(part)).to(torch.uint8).argmax())
            raise TalosValueError(
                f"{what} must be finite, got {float(part[where])} at position "
                f"{number * _CHUNK + where}; it comes from a run that diverged, leave it out"
            )
