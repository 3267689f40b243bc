"""The compiled library's CUDA ops, built for the CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

TESTS = Path(__file__).parent
CXX = "c++"


def build(source: Path, target: Path, *flags: str) -> None:
    """Compile a source that includes cuda_on_cpu.h for the CPU."""
    for header in ("cuda_bf16.h", "cuda_fp16.h"):  # what is wanted of them is in cuda_on_cpu.h
        (target.parent / header).touch()
    command = [CXX, "-O1", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
    command += ["-U_FORTIFY_SOURCE", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{target.parent}", f"-I{TESTS}", str(source), "-o", str(target), *flags]
    command += [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA ops as a library for the CPU; its namespace is talos_cuda_on_cpu."""
    if shutil.which(CXX) is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "library.so"
    folders = [f"-L{folder}" for folder in torch.utils.cpp_extension.library_paths()]
    build(TESTS / "cuda_on_cpu.cpp", path, "-shared", "-fPIC", *folders, "-ltorch_cpu")
    torch.ops.load_library(path)
    return path
