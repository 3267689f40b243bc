"""The one file format of masks and task vectors; docs/format.md specifies it. And checkpoints.

The safetensors library reads and writes the files. This package adds what the library lacks:
checksums, a kind and a version, limits on memory, and atomic writing.
"""

from talos.files.atomic import atomic_write
from talos.files.checked import (
    OtherFile,
    check_entries,
    claimed_kind,
    digest,
    load_file,
    save_file,
    write_tensors,
)
from talos.files.checkpoint import Checkpoint
from talos.files.streaming import Beside, OnTensor, stream_tensors, write_changed

__all__ = [
    "Beside",
    "Checkpoint",
    "OnTensor",
    "OtherFile",
    "atomic_write",
    "check_entries",
    "claimed_kind",
    "digest",
    "load_file",
    "save_file",
    "stream_tensors",
    "write_changed",
    "write_tensors",
]
