"""Registration of the ops: one schema, one implementation per device.

`define` registers an op `talos::<name>` with its schema and its reference, which runs on every
device that has nothing better. The compiled library is a separate library, namespace `talos_C`,
with the same schemas: C++ programs use it without Python, and here it serves the CPU. On CUDA
devices Triton's kernels run, or the library's where Triton is missing; `CUDA_BACKENDS` chooses
where both exist.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CUDA_BACKENDS",
    "compiled_library",
    "define",
    "op_for",
    "serve_cuda",
    "use_compiled_cuda",
]

CUDA_BACKENDS = {
    "sparse_adam_": "triton",  # unmeasured
    "add_delta_": "triton",  # unmeasured
}
"""Which backend, "triton" or "csrc", serves an op on CUDA devices where both have it.

Read at each call. A result of `benches/` on a device replaces "unmeasured".
"""


def _load_library() -> Path | None:
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        return None
    torch.ops.load_library(path)
    return path


compiled_library = _load_library()
"""Path of the compiled library in use; None: the references serve the CPU."""


_library = torch.library.Library("talos", "FRAGMENT")
_defined: list[str] = []
_references: dict[str, Callable[..., Any]] = {}
_on_cuda: dict[str, dict[str, Callable[..., Any]]] = {}


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any] = lambda *_: None,
    cpu: Callable[..., Any] | None = None,
) -> None:
    """Register the op `talos::<name>`.

    Args:
        name: the op's name.
        schema: its arguments and results, as in native_functions.yaml, without the name.
        reference: the definition; runs on every device without an implementation of its own.
        fake: returns outputs of the right shapes and dtypes, for tracing; by default none.
        cpu: a faster CPU implementation made of other ops.
    """
    op = f"talos::{name}"
    _references[name] = reference
    torch.library.define(op, schema)
    # Not register_kernel: its wrapper imports torch._dynamo (2 s) at the first call.
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake)
    if cpu is not None:
        _library.impl(name, cpu, "CPU")
    _defined.append(name)
    if (compiled := _compiled(name, "CPU")) is not None:
        _library.impl(name, compiled, "CPU")


def op_for(name: str, *dtypes: torch.dtype) -> Callable[..., Any]:
    """Return the op for tensors of these dtypes: the reference for float64, which no kernel takes.

    The result takes the schema's arguments by position.
    """
    if torch.float64 in dtypes:
        return _references[name]
    op: Callable[..., Any] = getattr(torch.ops.talos, name)
    return op


def serve_cuda(name: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Register an implementation of `talos::<name>` for CUDA and HIP devices.

    Args:
        name: the op's name.
        backend: "triton" or "csrc".
        implementation: takes the schema's arguments by position.
    """
    backends = _on_cuda.setdefault(name, {})
    backends[backend] = implementation
    if len(backends) == 1:
        _library.impl(name, lambda *arguments: cuda_implementation(name)(*arguments), "CUDA")


def cuda_backends(name: str) -> tuple[str, ...]:
    """Return which of "triton" and "csrc" have the op for CUDA devices."""
    return tuple(_on_cuda.get(name, ()))


def cuda_implementation(name: str) -> Callable[..., Any]:
    """Return what serves the op on CUDA devices at this moment."""
    backends = _on_cuda[name]
    if len(backends) == 1:
        return next(iter(backends.values()))
    return backends[CUDA_BACKENDS[name]]


def use_compiled_cuda() -> None:
    """Let the compiled library serve CUDA devices, too."""
    for name in _defined:
        if (compiled := _compiled(name, "CUDA")) is not None:
            serve_cuda(name, "csrc", compiled)


def _compiled(name: str, key: str) -> Callable[..., Any] | None:
    """Return the compiled library's op for a dispatch key; None without one that fits."""
    if compiled_library is None or not hasattr(torch.ops.talos_C, name):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"talos_C::{name}", key):
        return None
    op: Any = getattr(torch.ops.talos_C, name).default
    own: Any = getattr(torch.ops.talos, name).default
    built, ours = (str(each._schema).partition("::")[2] for each in (op, own))
    if built != ours:
        warnings.warn(
            f"{compiled_library} must be built from this version's sources, got {built} for "
            f"{ours}; a slower reference runs until you build it again: "
            "`python setup.py build_ext --inplace` or `pip install --no-build-isolation .`",
            stacklevel=2,
        )
        return None
    implementation: Callable[..., Any] = op
    return implementation
