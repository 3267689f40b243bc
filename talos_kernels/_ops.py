"""The op namespace `talos`: schema once, one implementation a device.

`define` registers an op's schema, its reference (every device that has nothing better) and its
fake (shapes for `torch.compile`). The compiled library, where it was built, serves the CPU: it is a
library of its own, namespace `talos_C`, with the same schemas, so that C++ programs use it without
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled_library", "define", "increment_version"]


def _load_library() -> Path | None:
    for path in sorted(Path(__file__).parent.glob("_C*.so")):
        torch.ops.load_library(path)
        return path
    return None


compiled_library = _load_library()
"""The compiled library in use, or None: the references serve the CPU then."""


def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the op `talos::name`.

    Args:
        name: the op's name.
        schema: its arguments and results, as in native_functions.yaml, without the name.
        reference: the definition; runs on every device without an implementation of its own.
        fake: its shapes and dtypes, for tracing.
    """
    op = f"talos::{name}"
    torch.library.define(op, schema)
    torch.library.register_kernel(op, None, reference)
    torch.library.register_fake(op, fake)
    if compiled_library is not None and hasattr(torch.ops.talos_C, name):
        torch.library.register_kernel(op, "cpu", getattr(torch.ops.talos_C, name).default)


def increment_version(tensors: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote these tensors in place."""
    torch.autograd.graph.increment_version(tensors)
