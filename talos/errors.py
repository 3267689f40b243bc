"""The errors that `talos` raises; see `talos_kernels.errors`."""

from talos_kernels.errors import (
    TalosError,
    TalosOSError,
    TalosRuntimeError,
    TalosTypeError,
    TalosValueError,
)

__all__ = [
    "TalosError",
    "TalosOSError",
    "TalosRuntimeError",
    "TalosTypeError",
    "TalosValueError",
]
