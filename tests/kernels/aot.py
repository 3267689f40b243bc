"""Compiles every Triton kernel ahead of time, for a device that this machine need not have.

    TRITON_INTERPRET=0 python -m tests.kernels.aot cuda:90 OUT

The launchers themselves run, on CPU tensors, under a driver that names the wanted target; they
compile instead of launching. So signatures, alignment and options are a real launch's. OUT
receives each kernel's code in Triton's languages and the assembler's, and the binary for NVIDIA.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from talos_kernels import Index, TensorIndex
from talos_kernels.triton import fisher_diag as scoring
from talos_kernels.triton import sddmm as products
from talos_kernels.triton.add_delta import add_delta_
from talos_kernels.triton.gather_grad import gather_grad_, scatter_
from talos_kernels.triton.select_threshold import score_histogram
from talos_kernels.triton.sparse_adam import sparse_adam_

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
LANGUAGES = ("ttir", "ttgir", "ptx", "amdgcn")


def parse_target(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


class Driver:
    """What the JIT asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches() -> dict[str, Callable[[], object]]:
    """One launch for each way in which a kernel is compiled."""
    index = Index.pack([TensorIndex.encode(torch.arange(4096) % 3 == 0)])
    n, steps, lr = index.nnz, torch.ones(1), torch.tensor(1e-3, dtype=torch.float64)
    flag = torch.ones(())
    arrays = torch.zeros(3, n).unbind()
    moments = torch.zeros(2, n, dtype=torch.bfloat16).unbind()
    single, half = [torch.zeros(4096)], [torch.zeros(4096, dtype=torch.bfloat16)]
    numbers = (steps, lr, 0.9, 0.999, 1e-8, 0.1)
    index_ = index.buffers
    score = [torch.zeros(1024, 1024)]
    prefix = torch.zeros((), dtype=torch.int64)

    def fisher(dtype: torch.dtype, tokens: int, tf32: bool = False) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rows = [torch.zeros(1, 100, tokens, 1024, dtype=dtype)]
        scoring.fisher_diag_(score, rows, rows, 1.0)
        torch.backends.cuda.matmul.allow_tf32 = before

    def sddmm(
        dtype: torch.dtype, precision: str, size: int = 0, full: bool = False, parts: int = 1
    ) -> None:
        dy = torch.zeros(257, 64, dtype=dtype)
        words, starts = (index.words[:0], index.starts[:0]) if full else (index.words, index.starts)
        config = products.CONFIGS[precision][size]
        products.launch(arrays[0], dy, dy, words, starts, full, precision, config, parts)

    return {
        "sddmm-bf16": lambda: sddmm(torch.bfloat16, "half"),
        "sddmm-bf16-small": lambda: sddmm(torch.bfloat16, "half", 1),
        "sddmm-bf16-full-accumulate": lambda: sddmm(torch.bfloat16, "half", full=True),
        "sddmm-bf16-parts": lambda: sddmm(torch.bfloat16, "half", parts=3),
        "sddmm-tf32": lambda: sddmm(torch.float32, "tf32"),
        "sddmm-tf32-small": lambda: sddmm(torch.float32, "tf32", 1),
        "sddmm-fp32": lambda: sddmm(torch.float32, "ieee"),
        "bitmap": lambda: products.bitmap(index.positions, index.starts),
        "fisher_diag-bf16": lambda: fisher(torch.bfloat16, 257),
        "fisher_diag-bf16-shallow": lambda: fisher(torch.bfloat16, 96),
        "fisher_diag-bf16-one-step": lambda: fisher(torch.bfloat16, 50),
        "fisher_diag-tf32": lambda: fisher(torch.float32, 257, tf32=True),
        "fisher_diag-tf32-one-step": lambda: fisher(torch.float32, 30, tf32=True),
        "fisher_diag-fp32": lambda: fisher(torch.float32, 257),
        "fisher_diag-bf16-one-token": lambda: fisher(torch.bfloat16, 1),
        "sparse_adam-fp32": lambda: sparse_adam_(
            single, single, index_, *arrays[:2], None, *numbers, False, None, None, None, 0
        ),
        "sparse_adam-bf16": lambda: sparse_adam_(
            half, half, index_, *arrays, *numbers, False, None, None, None, 0
        ),
        "sparse_adam-bf16-scaled": lambda: sparse_adam_(
            half, single, index_, *arrays, *numbers, True, flag, flag, flag, 0
        ),
        "sparse_adam-bf16-moments-compact": lambda: sparse_adam_(
            half, [arrays[0][:1]], index_, *moments, arrays[2], *numbers, False, None, None, None, 1
        ),
        "gather_grad-fp32": lambda: gather_grad_(arrays[0], single, index_, False),
        "gather_grad-bf16-accumulate": lambda: gather_grad_(arrays[0], half, index_, True),
        "scatter-fp32": lambda: scatter_(single, index_, arrays[0]),
        "scatter-bf16": lambda: scatter_(half, index_, arrays[0]),
        "score_histogram-fp32": lambda: score_histogram(single, prefix, 24, 7, False),
        "score_histogram-fp32-largest": lambda: score_histogram(single, prefix, 16, 8, True),
        "score_histogram-bf16": lambda: score_histogram(half, prefix, 0, 8, False),
        "add_delta-fp32": lambda: add_delta_(single, index_, arrays[0], 0.5, arrays[1]),
        "add_delta-bf16": lambda: add_delta_(half, index_, arrays[0], 0.5, None),
    }


def main(target: str, folder: Path) -> None:
    triton.runtime.driver.set_active(Driver(parse_target(target)))
    scoring.processors = lambda device: 132  # so that samples are split
    compiled: list[Any] = []

    def compile_only(kernel: JITFunction[Any], grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

    JITFunction.__getitem__ = compile_only
    for name, launch in launches().items():
        launch()
        own = {kernel.metadata.name.removesuffix("_kernel"): kernel for kernel in compiled}
        compiled.clear()
        own[name] = own.pop(name.split("-")[0])  # beside it are the kernels that help it
        for label, kernel in own.items():
            for language in LANGUAGES:
                if language in kernel.asm:
                    (folder / f"{label}.{language}").write_text(kernel.asm[language])
            if "cubin" in kernel.asm:
                (folder / f"{label}.cubin").write_bytes(kernel.asm["cubin"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
