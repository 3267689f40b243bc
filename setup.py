"""Builds csrc/ into talos_kernels/_C; everything else about the package is in pyproject.toml.

The library is optional: where there is no compiler, or it fails, the install goes on without.
TALOS_REQUIRE_CSRC=1 makes that an error, TALOS_CUDA=0 builds the CPU part only.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

HINT = (
    "talos: csrc/ was not built, or without CUDA ({}); the reference kernels take its place. "
    "Install torch and a C++17 compiler, then run `pip install --no-build-isolation` again."
)
CXX_FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11: the oldest this loads into
    *("-O3", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/="),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # see csrc/adam.h
]


def skip(reason):
    if os.environ.get("TALOS_REQUIRE_CSRC") == "1":
        raise SystemExit(HINT.format(reason))
    print(HINT.format(reason), file=sys.stderr)
    return {}


def find_cuda(cpp_extension, torch):
    """The toolkit's folder: nvcc and its headers, for a torch that was built for CUDA, or None."""
    # torch takes the folder above `which nvcc`, which is wrong where that is a wrapper.
    for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda.h").exists():
            return home if torch.version.cuda and os.environ.get("TALOS_CUDA") != "0" else None
    return None


def extension_arguments():
    try:
        import torch
        import torch.utils.cpp_extension as cpp_extension
    except ImportError as error:
        return skip(error)
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return skip("no C++ compiler")

    class OptionalBuild(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                skip(str(error).splitlines()[0])
                sources = [name for name in names if "cuda" not in name]
                if extension.sources == sources:
                    self.extensions = []  # or the install would look for the file
                    return
                extension.sources, extension.libraries = sources, ["torch_cpu"]
                self.compiler = None  # made anew: nvcc may fail where the C++ compiler works
                self.run()

    home = find_cuda(cpp_extension, torch)
    names = sorted(str(p) for p in Path("csrc").rglob("*.c[pu]*") if home or "cuda" not in p.parts)
    options = {"py_limited_api": True, "extra_compile_args": {"cxx": CXX_FLAGS}}
    if home:
        cpp_extension.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        options["extra_compile_args"]["nvcc"] = ["-O3", "-fmad=false"]
        options |= {"include_dirs": [f"{home}/include"], "library_dirs": [f"{home}/lib64"]}
        # libtorch.so stands for both kinds of torch: this loads into a CPU-only one too.
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        options["extra_link_args"] = ["-Wl,--no-as-needed", "-ltorch"]
    extension = cpp_extension.CppExtension("talos_kernels._C", names, **options)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension_arguments())
