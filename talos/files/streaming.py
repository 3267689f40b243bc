"""Safetensors files that are written one tensor at a time: plain ones, and changed checkpoints."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from shutil import copyfile

import torch
from torch import Tensor

from talos.errors import TalosOSError, TalosValueError
from talos.files.atomic import atomic_folder, atomic_write
from talos.files.checked import check_name
from talos.files.checkpoint import SINGLE, Checkpoint

__all__ = ["Beside", "OnTensor", "stream_tensors", "write_changed"]

OnTensor = Callable[[int, int], object]
"""Called after each tensor with the number done and the number of all."""

Beside = Mapping[str, Callable[[Path], object]]
"""Writes other files into a folder: by name, each called with the path to write to."""

# Weights in other forms are the unchanged ones: beside changed weights they would mislead.
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"),
    *(".onnx_data", ".pkl", ".tflite", ".mlmodel"),
}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stream_tensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor],
) -> None:
    """Write a plain safetensors file, atomically, with one tensor in memory at a time.

    Args:
        path: the file.
        shapes: shape of each tensor, in the order of the file.
        dtype: of all tensors: float32, bfloat16 or float16.
        tensor_of: returns a tensor by its name.

    Raises:
        TalosValueError: a name is `__metadata__`, which the format keeps, or no valid Unicode.
        TalosOSError: the file cannot be written; an older one is left as it was.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        check_name(name)
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight bytes
    header = len(text).to_bytes(8, "little") + text
    atomic_write(path, lambda new: _write(new, header, shapes, tensor_of))


def write_changed(
    base: Checkpoint,
    out: str | os.PathLike[str],
    change_: Callable[[str, Tensor], object],
    *,
    overwrite: bool = False,
    on_tensor: OnTensor | None = None,
    beside: Beside | None = None,
) -> list[str]:
    """Write a checkpoint again with changed tensors, atomically, one tensor in memory at a time.

    Files, headers and index are the base's, to the byte; only the data change. The other files of a
    folder are copied, subfolders too. Hidden ones are not, nor weights that are not in
    `base.files`: they are weights of the base. A link is followed inside the folder and in the
    cache of the Hugging Face hub.

    Args:
        base: what is copied.
        out: the file or folder to write, as the base is one.
        change_: called with name and tensor, which it may change in place; an error that it raises
            leaves nothing behind.
        overwrite: replace an existing file, or a folder that holds no file beside those written.
        on_tensor: called after each tensor.
        beside: writes other files into the folder, by name, in place of the base's. Then `out` is a
            folder also if the base is a file, which is its `model.safetensors`.

    Returns:
        The weights of the folder that were left out.

    Raises:
        TalosValueError: `out` lies in the base, or a link leads out of the base.
        TalosOSError: `out` exists and `overwrite` is False, holds other files, or cannot be
            written.
    """
    beside = beside or {}
    copied, left_out = _other_files(base) if base.path.is_dir() else ([], [])
    copied, left_out = (
        [name for name in each if name not in beside] for each in (copied, left_out)
    )
    names = {file: file.name for file in base.files}
    if not base.path.is_dir() and beside:
        names = {base.path: SINGLE}
    whole = base.path.is_dir() or bool(beside)  # a folder is written
    written = {*copied, *beside, *names.values()}
    _check_out(base, Path(os.path.realpath(out)), written if whole else None, overwrite=overwrite)
    done = 0

    def changed(name: str) -> Tensor:
        nonlocal done
        tensor = base[name]
        change_(name, tensor)
        done += 1
        if on_tensor is not None:
            on_tensor(done, len(base))
        return tensor

    def write_file(file: Path, new: Path) -> None:
        raw, entries, _ = base.header(file)
        names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        _write(new, raw, names, changed)

    def write(folder: Path) -> None:
        for file, name in names.items():
            write_file(file, folder / name)
        for name in (*copied, *beside):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name in beside:
                beside[name](folder / name)
            else:
                copyfile(base.path / name, folder / name)

    if whole:
        atomic_folder(out, write, overwrite=overwrite)
    else:
        atomic_write(out, lambda new: write_file(base.path, new))
    return left_out


def _write(
    path: Path, header: bytes, names: Iterable[str], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write a header and the tensors behind it; each is let go before the next is made."""
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            file.write(_bytes_of(tensor_of(name)))


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat


def _other_files(base: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the files of a folder to copy, and the weights to leave out, without hidden ones."""
    own = {file.name for file in base.files}
    index = base.index.name if base.index is not None else ""
    copied, left_out = [], []
    for root, folders, files in os.walk(base.path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(root, name) for name in folders]:
            if path.is_symlink():
                raise _leads_out(path)
        for path in [Path(root, name) for name in sorted(files) if not name.startswith(".")]:
            name = str(path.relative_to(base.path))
            if name in own:
                continue
            other_index = name.endswith(".index.json") and name != index
            if path.suffix.lower() in _WEIGHTS or other_index:
                left_out.append(name)
                continue
            _check_link(path, base.path)
            copied.append(name)
    return copied, left_out


def _check_link(path: Path, folder: Path) -> None:
    """Refuse a file whose content lies outside of its folder, but for the hub's cache."""
    real, top = path.resolve(), folder.resolve()
    cached = top.parent.name == "snapshots" and real.is_relative_to(top.parent.parent / "blobs")
    if not real.is_file() or not (real.is_relative_to(top) or cached):
        raise _leads_out(path)


def _leads_out(path: Path) -> TalosValueError:
    return TalosValueError(
        f"base must hold regular files of its own, got {path}, which is {path.resolve()}; "
        "copy it into the folder, or remove it"
    )


def _check_out(
    base: Checkpoint, target: Path, written: set[str] | None, *, overwrite: bool
) -> None:
    """Refuse a place that is the base's, or that holds what would be lost.

    Args:
        base: what is copied.
        target: the place.
        written: the files of the folder to write; None: a file is written.
        overwrite: whether an existing one is replaced.
    """
    own = base.path.resolve()
    if target.is_relative_to(own) or own.is_relative_to(target):
        raise TalosValueError(f"out must lie outside of base, got {target}; choose another")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise TalosOSError(f"out must not exist, got {target}; pass overwrite=True to replace it")
    if target.is_dir() != (written is not None):
        kind = "file" if written is None else "folder"
        raise TalosOSError(f"out must be a {kind}, got {target}; choose another")
    found = {
        str(Path(root, name).relative_to(target))
        for root, _, names in os.walk(target)
        for name in names
    }
    if written is not None and not found <= written:
        others = sorted(found - written)
        raise TalosOSError(
            f"out must hold only files that are replaced, got {target} with {len(others)} others: "
            f"{', '.join(others[:5])}; choose another folder, or remove it"
        )
