"""The one file format of masks and task vectors: safetensors with checksums, written atomically.

A safetensors file is the header's length (8 bytes, little end first), the header (JSON) and the
buffers one after another. The header's `__metadata__` holds strings; each entry of ours is JSON:

| entry      | value                                                                            |
|------------|----------------------------------------------------------------------------------|
| `format`   | `"talos"`                                                                        |
| `kind`     | `"mask"` or `"task_vector"`                                                      |
| `version`  | `1`                                                                              |
| `digests`  | the SHA-256 of each buffer, by its name                                          |
| `checksum` | the SHA-256 of every other metadata entry and of all names, dtypes and shapes    |
| others     | what the caller gave: `tensors`, `fingerprints`, `made`, ...                     |

The checksum is taken over the JSON of `[metadata without checksum, [[name, dtype, shape], ...]]`,
keys and names sorted, without spaces, as UTF-8. Any tool that reads safetensors reads these files;
one that writes them anew, metadata included, leaves them valid.

The safetensors library reads and checks what it defines; here is what it does not do: checksums,
identity, keys that come twice, and writing atomically, in equal bytes, one tensor at a time.
"""

from talos.files.atomic import atomic_write
from talos.files.checked import load_file, save_file
from talos.files.entries import check_entries
from talos.files.writer import write_tensors

__all__ = ["atomic_write", "check_entries", "load_file", "save_file", "write_tensors"]
