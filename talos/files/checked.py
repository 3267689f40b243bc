"""Files of masks and task vectors: identity, version and checksums around the buffers."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files.reader import opened, parse_json
from talos.files.writer import DTYPES, bytes_of, code_of, write_tensors

__all__ = ["VERSION", "load_file", "save_file"]

VERSION = 1
"""Of the format; a reader refuses newer ones."""

_LOADERS = {"mask": "talos.Mask.load", "task_vector": "talos.TaskVector.load"}
_OWN = ("format", "kind", "version", "digests", "checksum")


def save_file(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write buffers and metadata to a file, atomically; equal content gives equal bytes.

    Args:
        path: the file, conventionally `*.safetensors`; an older one is replaced.
        kind: `mask` or `task_vector`.
        tensors: of any shape and device; int64, int32, uint16, uint8, float32, bfloat16, float16.
            Floating-point ones must be finite.
        metadata: JSON-able entries; tuples come back as lists.

    Raises:
        TalosTypeError: a dtype has no place in the format, or an entry is not JSON-able.
        TalosValueError: a value is NaN or infinite; a name is taken.
        TalosOSError: the file cannot be written; an older one is left as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     save_file(path, "mask", {"w.counts": torch.ones(2).int()}, {"made": "by hand"})
        ...     load_file(path, "mask")
        ({'w.counts': tensor([1, 1], dtype=torch.int32)}, {'made': 'by hand'})
    """
    if kind not in _LOADERS:
        raise TalosValueError(f"kind must be one of {', '.join(_LOADERS)}, got {kind!r}")
    taken = [name for name in metadata if name in _OWN]
    if taken:
        raise TalosValueError(f"metadata must not use the names {taken}; choose others")
    for name, tensor in tensors.items():
        _check_finite(f"tensors[{name!r}]", tensor)
    entries = {
        "format": "talos",
        "kind": kind,
        "version": VERSION,
        "digests": {name: _digest(bytes_of(tensor)) for name, tensor in tensors.items()},
        **metadata,
    }
    strings = {name: _as_json(name, entry) for name, entry in entries.items()}
    listed = [[name, code_of(name, t.dtype), list(t.shape)] for name, t in tensors.items()]
    strings["checksum"] = json.dumps(_checksum(strings, listed))
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, shapes, strings, lambda name: tensors[name])


def load_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_file` wrote, checking every bit of it; nothing is ever unpickled.

    Args:
        path: the file.
        kind: what it must hold, `mask` or `task_vector`.

    Returns:
        The buffers, on the CPU, and the caller's metadata entries.

    Raises:
        TalosValueError: the file is damaged, from a newer version, of another kind or format.
        TalosOSError: it cannot be read.
    """
    path = Path(path)
    with opened(path) as file:
        strings = file.metadata() or {}
        entries = {name: _from_json(path, name, text) for name, text in strings.items()}
        _check_identity(path, kind, entries)
        listed = [_describe(path, file, name) for name in file.offset_keys()]
        digests = entries.get("digests")
        if not isinstance(digests, dict) or set(digests) != {name for name, _, _ in listed}:
            raise TalosValueError(f"{path}: digests must name every tensor; fetch it again")
        if entries.get("checksum") != _checksum(strings, listed):
            raise TalosValueError(
                f"{path}: the checksum of its metadata does not fit: it is damaged or was edited; "
                "fetch or save it again"
            )
        tensors = {name: _tensor(path, file, name, digests[name]) for name, _, _ in listed}
    return tensors, {name: entry for name, entry in entries.items() if name not in _OWN}


def _describe(path: Path, file: Any, name: str) -> list[Any]:
    stored = file.get_slice(name)
    code = stored.get_dtype()
    if code not in DTYPES.values():
        raise TalosValueError(
            f"{path}: {name}: dtype must be one of {', '.join(DTYPES.values())}, got {code}"
        )
    return [name, code, stored.get_shape()]


def _tensor(path: Path, file: Any, name: str, digest: object) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if _digest(bytes_of(tensor)) != digest:
        raise TalosValueError(
            f"{path}: {name}: the checksum of its data does not fit: the file is damaged; "
            "fetch it again"
        )
    _check_finite(f"{path}: {name}", tensor)
    return tensor


def _check_identity(path: Path, kind: str, entries: Mapping[str, Any]) -> None:
    if entries.get("format") != "talos":
        raise TalosValueError(
            f"{path}: a safetensors file that talos did not write; masks and task vectors come "
            "from .save()"
        )
    version = entries.get("version")
    if type(version) is not int or version < 1:
        raise TalosValueError(f"{path}: version must be a number from 1 on, got {version!r}")
    if version > VERSION:
        raise TalosValueError(
            f"{path}: version must be at most {VERSION}, got {version}; upgrade talos-sparse"
        )
    found = entries.get("kind")
    if found != kind:
        loader = _LOADERS.get(found) if isinstance(found, str) else None
        remedy = f"load it with {loader}" if loader else "fetch it again"
        raise TalosValueError(f"{path}: must hold a {kind}, this is a {found}; {remedy}")


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(strings: Mapping[str, str], listed: list[list[Any]]) -> str:
    """Of everything but the buffers, which have their digests among the strings."""
    others = {name: text for name, text in strings.items() if name != "checksum"}
    return _digest(_dumps([others, sorted(listed)]).encode(errors="surrogatepass"))


def _dumps(entry: object) -> str:
    return json.dumps(
        entry, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )


def _as_json(name: str, entry: object) -> str:
    try:
        return _dumps(entry)
    except (TypeError, ValueError, RecursionError) as error:
        raise TalosTypeError(
            f"metadata[{name!r}] must be JSON without NaN or infinity, got {error}; "
            "convert it to numbers, strings, lists and dicts"
        ) from None


def _from_json(path: Path, name: str, text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise TalosValueError(
            f"{path}: the metadata entry {name!r} must be JSON, got {error}; "
            "the file is damaged or talos did not write it"
        ) from None


def _check_finite(what: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    flat = tensor.detach().reshape(-1)
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(flat)):
        where = int((~torch.isfinite(flat)).nonzero()[0, 0])
        raise TalosValueError(
            f"{what} must be finite, got {float(flat[where])} at position {where}; "
            "it comes from a run that diverged, leave it out"
        )
