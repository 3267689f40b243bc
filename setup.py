"""Build csrc/ into talos_kernels/_C.so if there is a compiler; the rest is in pyproject.toml.

TALOS_REQUIRE_CSRC=1 makes a failure an error, TALOS_CUDA=0 builds the CPU part only.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

HINT = (
    "talos: csrc/ was not built, or without CUDA ({}); the reference kernels take its place. "
    "Install torch and a C++17 compiler, then run `pip install --no-build-isolation` again."
)
CXX_FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11: the oldest this loads into
    *("-O3", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/="),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # see csrc/adam.h
]


class OneWheel(bdist_wheel):  # for every Python: the library uses torch's stable ABI alone
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


COMMANDS = {"bdist_wheel": OneWheel}


def skip(reason):
    if os.environ.get("TALOS_REQUIRE_CSRC") == "1":
        raise SystemExit(HINT.format(reason))
    print(HINT.format(reason), file=sys.stderr)
    return []


def holds_cuda(home):
    return home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda.h").exists()


def extensions():
    try:
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        return skip(error)

    class OptionalBuild(cpp.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                skip(str(error).splitlines()[0])
                without_cuda = [name for name in names if "cuda" not in name]
                self.extensions = [] if extension.sources == without_cuda else [extension]
                extension.sources, extension.libraries = without_cuda, ["torch_cpu"]
                self.compiler = None  # made anew: nvcc may fail where the C++ compiler works
                self.run()

    wanted = cpp.torch.version.cuda and os.environ.get("TALOS_CUDA") != "0"
    # torch's CUDA_HOME is the folder above `which nvcc`, which is wrong if that is a wrapper.
    homes = filter(holds_cuda, (cpp.CUDA_HOME, "/usr/local/cuda"))
    home = next(homes, None) if wanted else None
    names = sorted(str(p) for p in Path("csrc").rglob("*.c[pu]*") if home or "cuda" not in p.parts)
    options = {"extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": ["-O3", "-fmad=false"]}}
    if home:
        cpp.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        options |= {"include_dirs": [f"{home}/include"], "library_dirs": [f"{home}/lib64"]}
        # libtorch.so stands for both kinds of torch: this loads into a CPU-only one too.
        options |= {"libraries": ["cudart_static", "rt", "dl", "pthread"]}
        options["extra_link_args"] = ["-Wl,--no-as-needed", "-ltorch"]
    extension = cpp.CppExtension("talos_kernels._C", names, py_limited_api=True, **options)
    COMMANDS["build_ext"] = OptionalBuild.with_options(no_python_abi_suffix=True)
    return [extension]


setup(ext_modules=extensions(), cmdclass=COMMANDS)
