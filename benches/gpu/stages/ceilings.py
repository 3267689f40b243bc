"""What the machine is, the rates that every share refers to, and csrc built for its device alone.

The compiler works while the device is measured: both are done when the slower one is.
"""

import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benches import measure
from benches.gpu.context import EAGER, Context, stage_main
from benches.work import Work

BUILD_LIMIT = 28.0  # seconds
SERVES = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
sys.exit(not has_kernel("talos_C::add_delta_", "CUDA"))
"""
"""Run in a process of its own: one that has loaded an earlier build cannot load another."""
PACKAGES = ("open_clip_torch", "timm", "transformers", "peft", "torchao", "bitsandbytes")
SMI = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"


def run(context: Context) -> None:
    build = Build(context)
    context.run("device", lambda: about(context))
    context.run("copy", lambda: copy_rate(context))
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        context.run(name, lambda d=dtype, p=precision: matrix_rate(context, d, p))
    context.run("csrc", build.wait)


def about(context: Context) -> dict[str, object]:
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    facts: dict[str, object] = {"name": measure.device_name(), "packages": packages}
    facts["cores"] = os.cpu_count()
    if context.device.kind == "cuda":
        properties = torch.cuda.get_device_properties(context.device.torch)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
        facts["l2_bytes"] = properties.L2_cache_size
    return facts | {"driver": driver()}


def driver() -> dict[str, str] | None:
    """Return what nvidia-smi prints; None where it cannot run."""
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(SMI.split(","), done.stdout.strip().split(", "), strict=False))


def copy_rate(context: Context) -> dict[str, object]:
    source = torch.ones(context.sizes.copy_bytes // 4, device=context.device.torch)
    target = torch.zeros_like(source)

    def check() -> None:
        assert torch.equal(target.copy_(source), source)

    work = Work(lambda: target.copy_(source), check, bytes_moved=2 * source.nbytes)
    return context.timed(work, EAGER)


def matrix_rate(context: Context, dtype: torch.dtype, precision: str) -> dict[str, object]:
    width = context.sizes.matrix_width
    left, right = (
        torch.randn(width, width, device=context.device.torch).to(dtype) for _ in range(2)
    )
    out = torch.empty_like(left)

    def step() -> None:
        torch.mm(left, right, out=out)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return context.timed(Work(step, step, flops=2 * width**3), EAGER)
    finally:
        torch.set_float32_matmul_precision(before)


class Build:
    """csrc for this device's architecture, started at once.

    A library that is there already is built anew: it may come from other sources. A rehearsal only
    prints setup.py's version: a build would change the checkout.
    """

    def __init__(self, context: Context) -> None:
        self._on_device = context.device.kind == "cuda"
        self._start, self._process = time.monotonic(), None
        if not context.todo("csrc"):
            return
        arguments, environment = ["--version"], os.environ | {"TALOS_REQUIRE_CSRC": "1"}
        if self._on_device:
            major, minor = torch.cuda.get_device_capability()
            environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
            arguments = ["egg_info", "build_ext", "--force", "--inplace"]
        self._process = subprocess.Popen(
            [sys.executable, "setup.py", *arguments],
            cwd=measure.ROOT,
            env=environment,
        )

    def wait(self) -> dict[str, object]:
        assert self._process is not None
        try:
            code = self._process.wait(max(1.0, self._start + BUILD_LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = None
        seconds = time.monotonic() - self._start
        if code != 0:
            ended = "was killed at its limit" if code is None else f"ended with {code}"
            raise RuntimeError(f"the build of csrc {ended} after {seconds:.0f} s, see log.txt")
        paths = Path(measure.ROOT, "talos_kernels").glob("_C*.so") if self._on_device else ()
        asked = [[sys.executable, "-c", SERVES, str(path)] for path in paths]
        serves = any(subprocess.run(each, check=False).returncode == 0 for each in asked)
        return {"built": self._on_device, "seconds": round(seconds, 1), "serves": serves}


if __name__ == "__main__":
    stage_main(run)
