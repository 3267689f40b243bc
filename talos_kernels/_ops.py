"""The op namespace `talos`: schema once, one implementation a device.

`define` registers an op's schema, its reference (every device that has nothing better) and its
fake (shapes for `torch.compile`). The compiled library, where it was built, serves the CPU: it is a
library of its own, namespace `talos_C`, with the same schemas, so that C++ programs use it without
Python. On CUDA devices Triton's kernels run where Triton is and the library's where it is not; both
there, the choice waits for a measurement on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled_library", "define", "increment_version", "use_compiled_cuda"]


def _load_library() -> Path | None:
    for path in sorted(Path(__file__).parent.glob("_C*.so")):
        torch.ops.load_library(path)
        return path
    return None


compiled_library = _load_library()
"""The compiled library in use, or None: the references serve the CPU then."""


_library = torch.library.Library("talos", "FRAGMENT")
_defined: list[str] = []


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
) -> None:
    """Register the op `talos::name`.

    Args:
        name: the op's name.
        schema: its arguments and results, as in native_functions.yaml, without the name.
        reference: the definition; runs on every device without an implementation of its own.
        fake: its shapes and dtypes, for tracing.
        cpu: serves the CPU where other ops make it faster than the definition is.
    """
    op = f"talos::{name}"
    torch.library.define(op, schema)
    torch.library.register_kernel(op, None, reference)
    torch.library.register_fake(op, fake)
    if cpu is not None:
        _library.impl(name, cpu, "CPU")
    _defined.append(name)
    _register_compiled(name, "CPU")


def use_compiled_cuda() -> None:
    """Let the compiled library serve CUDA devices, where there is no Triton."""
    for name in _defined:
        _register_compiled(name, "CUDA")


def _register_compiled(name: str, key: str) -> None:
    if compiled_library is None or not hasattr(torch.ops.talos_C, name):
        return
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"talos_C::{name}", key):
        compiled = getattr(torch.ops.talos_C, name).default
        # Not register_kernel, whose wrapper imports torch._dynamo (2 s) at the first call.
        _library.impl(name, compiled, key)


def increment_version(tensors: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote these tensors in place."""
    torch.autograd.graph.increment_version(tensors)
