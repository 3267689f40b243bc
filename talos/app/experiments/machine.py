"""The machine and the versions of a run."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

import talos

__all__ = ["default_device", "forget_peak", "machine", "made_by", "peak_bytes", "versions"]

_DECIDE: tuple[str, ...] = ("talos", "torch", "numpy", "transformers")
_PACKAGES = ("numpy", "safetensors", "transformers", "tokenizers", "matplotlib")


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, str | int]:
    """Return the processor's name, the cores of this process, torch's threads and the system."""
    available = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _processor(),
        "cores": len(available(0)) if available else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def forget_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int | None:
    """Return the most memory that the GPU, or else this process, took; None: not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, LookupError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of talos, Python, torch and the installed packages of a demo."""
    found = {"talos": talos.__version__, "python": platform.python_version()}
    found["torch"] = torch.__version__
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def made_by() -> dict[str, str]:
    """Return what decides the last bits of a number: versions, and the GPU or processor."""
    known = versions()
    found = {name: known[name] for name in _DECIDE if name in known}
    gpu = default_device().type == "cuda"
    return {**found, "device": torch.cuda.get_device_name() if gpu else _processor()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()
