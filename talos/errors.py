"""The errors that `talos` raises; see `talos_kernels.errors`."""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

# The package `talos_kernels` imports torch, which takes seconds; its file of errors does not. It is
# loaded alone, so that the command line can refuse an option at once.
if "talos_kernels" not in sys.modules:
    _package = find_spec("talos_kernels")
    _folders = None if _package is None else _package.submodule_search_locations
    _spec = PathFinder.find_spec("talos_kernels.errors", _folders)
    if _spec is not None and _spec.loader is not None:
        _spec.loader.exec_module(sys.modules.setdefault(_spec.name, module_from_spec(_spec)))

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
