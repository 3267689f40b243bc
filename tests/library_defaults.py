"""Other defaults of torch for the library alone: its calls of torch run under them, no others.

A program may set `torch.set_default_dtype` or `torch.set_default_device`. The tests' own tensors
and torch's modules keep the usual defaults, so that a suite asks the same of the library.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LIBRARY = tuple(str(Path(__file__).parent.parent / name) for name in ("talos", "talos_kernels"))
# What stands between the library and torch: torch's own Python, and the tests' poisoned factories.
BETWEEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent / "conftest.py"))
DEFAULTS = ("float64", "bfloat16", "meta")


def asked_by_the_library(frame: FrameType | None) -> bool:
    """Whether the first frame outside of torch is the library's."""
    while frame is not None and frame.f_code.co_filename.startswith(BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(LIBRARY)


@contextmanager
def defaults(name: str) -> Iterator[None]:
    """A default dtype, or `meta` as the default device."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LibraryDefaults(TorchFunctionMode):
    """While active, what the library asks of torch is done under other defaults."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not asked_by_the_library(sys._getframe(1)):
            return func(*args, **kwargs)
        with defaults(self.name):
            return func(*args, **kwargs)
