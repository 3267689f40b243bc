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


def find_cuda(cpp_extension, torch):
    """The toolkit's folder: nvcc and its headers, for a torch that was built for CUDA, or None."""
    if os.environ.get("TALOS_CUDA", "1") == "0" or torch.version.cuda is None:
        return None
    # torch takes the folder above `which nvcc`, which is wrong where that is a wrapper.
    for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda.h").exists():
            return home
    return None


def extension_arguments():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return skip(f"torch cannot be imported: {error}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
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
    host = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11: the oldest this loads into
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ]
    arguments = {"py_limited_api": True, "extra_compile_args": {"cxx": host}}
    if home := find_cuda(cpp_extension, torch):
        cpp_extension.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        sources += sorted(map(str, Path("csrc", "cuda").glob("*.c*")))
        arguments["extra_compile_args"]["nvcc"] = ["-O3", "-fmad=false"]
        arguments["include_dirs"] = [f"{home}/include"]
        arguments["library_dirs"] = [f"{home}/lib64"]
        arguments["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        # libtorch.so stands for both kinds of torch: this library loads into a CPU-only one too.
        arguments["extra_link_args"] = ["-Wl,--no-as-needed", "-ltorch"]
    extension = cpp_extension.CppExtension("talos_kernels._C", sources, **arguments)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension_arguments())
