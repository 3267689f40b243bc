"""One optimizer step, one scored layer and one threshold: what a profiler or a checker runs.

    python -m benches.gpu.small_step [SHAPE] [--chunk N]

`--chunk` sets how many entries a Triton program takes at a time; kernels read it as they are
compiled, so each size has a process of its own. It prints the seconds of a replayed step.
"""

import argparse
import importlib
import json
import threading

import torch

from benches import forms, measure
from benches.gpu.context import end_with_parent
from benches.gpu.device import find_device
from benches.gpu.sizes import TINY
from benches.shapes import SHAPES
from talos_kernels import fisher_diag_, select_threshold

SAMPLES, TOKENS, WIDTH = 128, 257, 1024
MODULES = ("blocks", "add_delta", "gather_grad", "sddmm", "sparse_adam")


def set_chunk(entries: int) -> None:
    """In every module that took the constant from `blocks` as it was imported."""
    import triton.language as tl

    for name in MODULES:
        module = importlib.import_module(f"talos_kernels.triton.{name}")
        for constant, value in (("CHUNK", entries), ("ROWS", entries // 32)):
            if hasattr(module, constant):
                setattr(module, constant, tl.constexpr(value))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", choices=SHAPES, help="default: a tiny one")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--end-with-parent", action="store_true")
    options = parser.parse_args()
    if options.end_with_parent:
        threading.Thread(target=end_with_parent, daemon=True).start()
    if options.chunk is not None:
        set_chunk(options.chunk)
    device = find_device()
    shape = SHAPES[options.shape] if options.shape else TINY.shapes[0]
    form = forms.ours(shape, device.torch)
    if options.chunk is not None:
        seconds, _ = measure.median_and_spread(device.time_replayed(form.step))
        print(json.dumps({"seconds": seconds}))
        return
    form.step()
    form.step()
    samples, tokens, width = (SAMPLES, TOKENS, WIDTH) if options.shape else (4, 5, 64)
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    dy, x = (
        torch.randn(1, samples, tokens, width, device=device.torch).to(dtype) for _ in range(2)
    )
    score = torch.zeros(width, width, device=device.torch)
    fisher_diag_([score], [dy], [x])
    select_threshold([score], score.numel() // 10)
    device.synchronise()


if __name__ == "__main__":
    main()
