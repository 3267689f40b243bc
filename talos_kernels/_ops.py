"""The op namespace `talos`: schema once, one implementation a device.

`define` registers an op's schema, its reference (every device that has nothing better) and its
fake (shapes for `torch.compile`). The compiled library, where it was built, serves the CPU: it is a
library of its own, namespace `talos_C`, with the same schemas, so that C++ programs use it without
Python. On CUDA devices Triton's kernels run where Triton is and the library's where it is not;
where both are, `CUDA_BACKENDS` says which.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CUDA_BACKENDS",
    "compiled_library",
    "define",
    "increment_version",
    "op_for",
    "serve_cuda",
    "use_compiled_cuda",
]

CUDA_BACKENDS = {
    "sparse_adam_": "triton",  # unmeasured
    "add_delta_": "triton",  # unmeasured
}
"""Which of "triton" and "csrc" serves an op on CUDA devices, of those that both have; read at each
call. A result of `benches/` on a device replaces "unmeasured"."""


def _load_library() -> Path | None:
    for path in sorted(Path(__file__).parent.glob("_C.so")):
        torch.ops.load_library(path)
        return path
    return None


compiled_library = _load_library()
"""The compiled library in use, or None: the references serve the CPU then."""


_library = torch.library.Library("talos", "FRAGMENT")
_defined: list[str] = []
_references: dict[str, Callable[..., Any]] = {}
_on_cuda: dict[str, dict[str, Callable[..., Any]]] = {}


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
    _references[name] = reference
    torch.library.define(op, schema)
    # Not register_kernel, whose wrapper imports torch._dynamo (2 s) at the first call.
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake)
    if cpu is not None:
        _library.impl(name, cpu, "CPU")
    _defined.append(name)
    if (compiled := _compiled(name, "CPU")) is not None:
        _library.impl(name, compiled, "CPU")


def op_for(name: str, *dtypes: torch.dtype) -> Callable[..., Any]:
    """What runs an op on tensors of these dtypes: no kernel takes float64, the reference does.

    Args:
        name: the op's name.
        dtypes: of its tensors.

    Returns:
        Takes the op's arguments by position.
    """
    if torch.float64 in dtypes:
        return _references[name]
    op: Callable[..., Any] = getattr(torch.ops.talos, name)
    return op


def serve_cuda(name: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Serve the op `talos::name` on CUDA and HIP devices.

    Args:
        name: the op's name.
        backend: "triton" or "csrc"; where both serve the op, `CUDA_BACKENDS` chooses.
        implementation: takes the op's arguments by position.
    """
    backends = _on_cuda.setdefault(name, {})
    backends[backend] = implementation
    if len(backends) == 1:
        _library.impl(name, lambda *arguments: cuda_implementation(name)(*arguments), "CUDA")


def cuda_backends(name: str) -> tuple[str, ...]:
    """Which of "triton" and "csrc" have an op for CUDA devices."""
    return tuple(_on_cuda.get(name, ()))


def cuda_implementation(name: str) -> Callable[..., Any]:
    """What serves an op on CUDA devices at this moment."""
    backends = _on_cuda[name]
    if len(backends) == 1:
        return next(iter(backends.values()))
    return backends[CUDA_BACKENDS[name]]


def use_compiled_cuda() -> None:
    """Let the compiled library serve CUDA devices too."""
    for name in _defined:
        if (compiled := _compiled(name, "CUDA")) is not None:
            serve_cuda(name, "csrc", compiled)


def _compiled(name: str, key: str) -> Callable[..., Any] | None:
    """The compiled library's op for the devices of a dispatch key."""
    if compiled_library is None or not hasattr(torch.ops.talos_C, name):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"talos_C::{name}", key):
        return None
    op: Callable[..., Any] = getattr(torch.ops.talos_C, name).default
    return op


def increment_version(tensors: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote these tensors in place."""
    torch.autograd.graph.increment_version(tensors)
