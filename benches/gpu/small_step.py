"""One optimizer step, one scored layer and one threshold: what a profiler or a checker runs.

    python -m benches.gpu.small_step [SHAPE] [--chunk N]

`--chunk` sets how many entries a Triton program takes at a time, and prints the seconds of a
replayed step. Kernels read the number as they are compiled, so each has a process of its own.
"""

import argparse
import json
import sys

import torch

from benches import bench_sparse_adam, measure
from benches.gpu.context import end_with_parent
from benches.gpu.device import find_device
from benches.gpu.sizes import TINY
from benches.shapes import SHAPES
from talos_kernels import fisher_diag_, select_threshold

SAMPLES, TOKENS, WIDTH = 128, 257, 1024


def set_chunk(entries: int) -> None:
    """Set the constant in every module that has imported it."""
    import triton.language as tl

    import talos_kernels.triton

    assert talos_kernels.triton
    for name, module in list(sys.modules.items()):
        for constant, value in (("CHUNK", entries), ("ROWS", entries // 32)):
            if name.startswith("talos_kernels.triton.") and hasattr(module, constant):
                setattr(module, constant, tl.constexpr(value))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", choices=SHAPES, help="default: a tiny one")
    parser.add_argument("--chunk", type=int)
    options = parser.parse_args()
    end_with_parent()
    if options.chunk is not None:
        set_chunk(options.chunk)
    device = find_device()
    shape = SHAPES[options.shape] if options.shape else TINY.shapes[0]
    step = bench_sparse_adam.ours(shape, device.torch).step
    if options.chunk is not None:
        seconds, _ = measure.median_and_spread(device.time_replayed(step))
        print(json.dumps({"seconds": seconds}))
        return
    step()
    step()
    samples, tokens, width = (SAMPLES, TOKENS, WIDTH) if options.shape else (4, 5, 64)
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    dy, x = (
        torch.randn(1, samples, tokens, width, device=device.torch).to(dtype) for _ in range(2)
    )
    score = torch.zeros(width, width, device=device.torch)
    fisher_diag_([score], [dy], [x])
    select_threshold([score], score.numel() // 10)
    measure.synchronise()


if __name__ == "__main__":
    main()
