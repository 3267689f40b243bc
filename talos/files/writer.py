"""Writing safetensors files: one tensor in memory at a time, equal content as equal bytes.

The safetensors library reads these files. It does not write them, because its `save_file`

- needs all tensors in memory, where a dense export makes them one by one,
- orders the metadata by a hash that differs from call to call,
- writes to a temporary file of its own, which replaces the one that is synchronised here.
"""

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files.atomic import atomic_write

__all__ = ["DTYPES", "bytes_of", "code_of", "write_tensors"]

DTYPES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
"""The dtypes that the files hold, with their names in the format."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def code_of(name: str, dtype: torch.dtype) -> str:
    """A dtype's name in the format; raises TalosTypeError where it has no place there."""
    if dtype not in DTYPES:
        raise TalosTypeError(
            f"tensors[{name!r}] must be one of {', '.join(map(str, DTYPES))}, got {dtype}"
        )
    return DTYPES[dtype]


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
    # Wide dtypes first, so that each buffer is aligned, else as given.
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + prod(shape) * dtype.itemsize
        code = code_of(name, dtype)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise TalosValueError(f"tensors and metadata must be valid Unicode, got {error}") from None
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(bytes_of(tensor(name)))

    atomic_write(path, write)
