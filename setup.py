"""Builds csrc/ into talos_kernels/_C; everything else about the package is in pyproject.toml.

The library is optional: without a C++ compiler, or where compiling fails, the install goes on and
talos_kernels uses its references. Environment: TALOS_REQUIRE_CSRC=1 makes a failure an error,
TALOS_CUDA=0 builds the CPU part only, TORCH_CUDA_ARCH_LIST replaces the CUDA architectures.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

REQUIRED = os.environ.get("TALOS_REQUIRE_CSRC") == "1"
HINT = (
    "talos: csrc/ was not built ({}); the reference kernels will be used. Install a C++17 compiler "
    "and torch, then run `pip install --no-build-isolation` again."
)


def skip(reason):
    if REQUIRED:
        raise SystemExit(HINT.format(reason))
    print(HINT.format(reason), file=sys.stderr)
    return {}


def has_cuda(cpp_extension, torch):
    """The CUDA part needs nvcc, its headers, and a torch that was built for CUDA."""
    home = cpp_extension.CUDA_HOME
    if os.environ.get("TALOS_CUDA", "1") == "0" or torch.version.cuda is None or home is None:
        return False
    return Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists()


def extension_arguments():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return skip(f"torch cannot be imported: {error}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return skip(f"no C++ compiler {compiler!r}")

    class OptionalBuild(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                skip(str(error).splitlines()[0])
                self.extensions = []  # or the install would look for the file

    sources = sorted(map(str, Path("csrc").glob("*.cpp"))) + sorted(
        map(str, Path("csrc", "cpu").glob("*.cpp"))
    )
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-std=c++17", "-O3"]
    host = [
        *stable,
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ]
    arguments = {"py_limited_api": True, "extra_compile_args": {"cxx": host}}
    if has_cuda(cpp_extension, torch):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        sources += sorted(map(str, Path("csrc", "cuda").glob("*.c*")))
        arguments["extra_compile_args"]["nvcc"] = ["-std=c++17", "-O3", "-fmad=false"]
        # The static runtime and no libtorch_cuda: this library loads beside a CPU-only torch too.
        arguments["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        arguments["library_dirs"] = [str(Path(cpp_extension.CUDA_HOME, "lib64"))]
        arguments["include_dirs"] = [str(Path(cpp_extension.CUDA_HOME, "include"))]
    extension = cpp_extension.CppExtension("talos_kernels._C", sources, **arguments)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension_arguments())
