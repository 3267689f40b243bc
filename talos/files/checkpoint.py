"""Checkpoints of other libraries, read one tensor at a time.

A checkpoint is one `.safetensors` file, or a folder as transformers and open_clip save it.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files.reader import Header, explained, open_file, parse_json, read_tensor

__all__ = ["SINGLE", "Checkpoint"]

SINGLE = "model.safetensors"
"""The file of a checkpoint that has no shards, as transformers and open_clip look for it."""
_NAMES = (SINGLE, "open_clip_model.safetensors")
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for.

    Only headers are read at first. A tensor is read anew at each access and nothing is kept, so the
    memory in use is that of the tensors that the caller holds. Files are not mapped into memory.
    They stay open, so a checkpoint that is replaced meanwhile is read as it was. Nothing is ever
    unpickled.

    Args:
        path: a `.safetensors` file, or a folder with `model.safetensors`, with shards and their
            `model.safetensors.index.json`, or with `open_clip_model.safetensors`; the first of
            these that the folder holds.

    Attributes:
        path: the file or folder.
        files: the files that hold the tensors.
        shapes: shape of each tensor, from the headers.
        dtypes: dtype of each tensor, from the headers.

    Raises:
        TalosValueError: a file is damaged or not safetensors, two files hold one name, the index
            names a tensor that its file lacks or a file outside of the folder, a file names a dtype
            that torch lacks.
        TalosOSError: a file or folder cannot be read.

    Example:
        >>> import safetensors.torch, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     safetensors.torch.save_file({"w": torch.ones(2, 3).bfloat16()}, path)
        ...     checkpoint = Checkpoint(folder)
        ...     checkpoint.shapes, checkpoint.dtypes, checkpoint["w"].sum().item()
        ({'w': (2, 3)}, {'w': torch.bfloat16}, 6.0)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TalosTypeError(f"path must be a path, got {type(path).__name__}")
        self.path = Path(path)
        self.index: Path | None = None
        placed: dict[str, str] = {}
        if not self.path.is_dir():
            self.files = [self.path]
        elif (single := _single(self.path)) is not None:
            self.files = [single]
        else:
            self.index = self.path / _INDEX
            placed = _weight_map(self.index)
            self.files = [self.path / name for name in sorted(set(placed.values()))]
        self._opened: dict[Path, tuple[Any, Header]] = {}
        self._homes: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            self._open(file)
        for name, own in placed.items():
            if self._homes.get(name) != self.path / own:
                raise TalosValueError(
                    f"{self.index} must name the file of each tensor, got {own} for {name}, which "
                    "it does not hold; fetch the files again"
                )

    def _open(self, path: Path) -> None:
        """Read the header of a file."""
        with explained(path):
            before = path.stat()
            self._opened[path] = open_file(path)
            after = path.stat()
        if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
            raise TalosValueError(f"{path}: must not change while it is opened; try again")
        for name, entry in self._opened[path][1].entries.items():
            other = self._homes.setdefault(name, path)
            if other != path:
                raise TalosValueError(
                    f"{path}: must hold other tensors than {other.name}, got {name} in both; "
                    "fetch the files again"
                )
            if entry["dtype"] not in _DTYPES:
                raise TalosValueError(
                    f"{path}: {name}: must have a dtype of torch, got {entry['dtype']}; convert it"
                )
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = _DTYPES[entry["dtype"]]

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, newly read: on the CPU, in its own dtype.

        Raises:
            KeyError: there is none of this name.
            TalosValueError: the file was cut or overwritten since it was opened.
            TalosOSError: the file cannot be read.
        """
        path = self._homes[name]
        with explained(path):
            return read_tensor(self._opened[path][0], name)

    def first_row(self, name: str) -> Tensor:
        """Return the first slice of a tensor along its first dimension; no more is read."""
        path = self._homes[name]
        with explained(path), torch.device("cpu"):
            row: Tensor = self._opened[path][0].get_slice(name)[:1]
        return row

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of this name; nothing is read."""
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        """Return the names, file by file in the order of the headers."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.shapes)

    def __eq__(self, other: object) -> bool:
        """Return whether it is the same object: tensors are not compared."""
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}: {len(self)} tensors in {len(self.files)} files)"

    def header(self, path: Path) -> Header:
        """Return the header of one of `files`."""
        return self._opened[path][1]


def _single(folder: Path) -> Path | None:
    """Return the one file of weights of a folder; None: they come in shards.

    Raises:
        TalosValueError: there are neither.
    """
    own, other = (folder / name for name in _NAMES)
    if own.is_file():
        return own
    if (folder / _INDEX).is_file():
        return None
    if other.is_file():
        return other
    raise TalosValueError(
        f"path must hold {_NAMES[0]}, got {folder} without it; other forms of weights are not "
        "read: save the model with save_pretrained(..., safe_serialization=True)"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, all of them in the folder of the index."""
    try:
        with explained(index):
            found = parse_json(index.read_bytes())["weight_map"]
        names = dict(found.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TalosValueError(
            f"path must hold a readable index of its weights, got {index} ({error!r}); save the "
            "model again with save_pretrained"
        ) from error
    for name in names.values():
        if not isinstance(name, str) or name in ("", "..") or not _is_file_name(name):
            raise TalosValueError(
                f"path must hold its weights in its own folder, got {name!r} in {index}"
            )
    return names


def _is_file_name(name: str) -> bool:
    valid = "\0" not in name and name == name.encode(errors="replace").decode()
    return valid and Path(name).name == name
