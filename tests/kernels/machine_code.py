"""A report of the machine code that compilers make of the kernels; it needs no device.

    python -m tests.kernels.machine_code benches/results/compiled

This writes `triton.json`, every Triton kernel at sm_90, and `csrc_cuda.json`, the library's CUDA
kernels at sm_80, sm_90 and sm_100, for which it needs nvcc. No test compares them: commit them with
a change of a kernel, so that its cost is seen.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

from benches.measure import ROOT, commit
from benches.results import write_json

TARGET = "cuda:90"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = ("sparse_adam_kernel.cu", "add_delta_kernel.cu")
FLAGS = ("-O3", "-fmad=false", "-std=c++17", "-cubin", "-Xptxas", "-v")  # as setup.py has them

INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE
)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def functions(cubin: Path) -> dict[str, str]:
    """Return the disassembly of each function in a binary."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = (part.partition("\n") for part in text.split("Function : ")[1:])
    return {name.strip(): code for name, _, code in parts}


def resources(cubin: Path) -> dict[str, int]:
    """Return registers a thread, bytes of stack (spilled registers) and of shared memory."""
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {"registers": "REG", "stack": "STACK", "shared": "SHARED"}
    return {name: int(re.findall(rf"\b{word}:(\d+)", usage)[0]) for name, word in names.items()}


def counts(code: str) -> dict[str, Any]:
    """Count the instructions of a function and of each of its loops.

    A loop lies between a backward branch and its target. The counts are of instructions that stand
    in the code, slow paths of divisions and roots (`CALL`) included.
    """
    found = [(int(at, 16), name, to) for at, name, to in INSTRUCTION.findall(code) if name != "NOP"]
    loops = []
    for at, name, to in found:
        target = re.search(r"0x([0-9a-f]+)$", to) if name.startswith("BRA") else None
        if target and (first := int(target[1], 16)) < at:
            loops.append([each for each in found if first <= each[0] <= at])
    loops.sort(key=lambda body: body[0])

    def inside(*names: str) -> list[int]:
        return [sum(name.startswith(names) for _, name, _ in body) for body in loops]

    return {
        "instructions": len(found),
        "loops": inside(""),
        "spills": inside("LDL", "STL"),
        "slow_paths": inside("CALL"),
    }


def pending_loads(ttgir: str) -> list[int]:
    """Return how many groups of loads stay under way at each wait inside a loop."""
    found = []
    for loop in re.finditer(r"^( +)(?:%\S+ = )?scf\.(?:for|while) ", ttgir, re.MULTILINE):
        end = ttgir.index(f"\n{loop[1]}}} loc", loop.end())  # the body is indented
        found += re.findall(r"ttg\.async_wait .*\{num = (\d+)", ttgir[loop.start() : end])
    return [int(pending) for pending in found]


def triton_kernels() -> dict[str, Any]:
    """Compile every Triton kernel and return its facts."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "tests.kernels.aot", TARGET, name]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)
        kernels = {}
        for cubin in sorted(Path(name).glob("*.cubin")):
            (code,) = functions(cubin).values()
            facts = resources(cubin) | counts(code)
            tile = re.findall(
                r"tt\.dot .*tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>",
                cubin.with_suffix(".ttir").read_text(),
            )
            if tile:  # rows, tokens and columns of one step of a matrix product
                facts["tile"] = [int(size) for size in tile[0]]
                facts["pending_loads"] = pending_loads(cubin.with_suffix(".ttgir").read_text())
            kernels[cubin.stem] = facts
    return kernels


def compiler() -> str:
    """Return nvcc itself: a wrapper on the PATH does not show where its toolkit lies."""
    known = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    return str(known) if known.exists() else "nvcc"


def cuda_kernels(source: Path, architecture: str) -> dict[str, Any]:
    """Compile a CUDA source and return the facts of each kernel, by its template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [compiler(), *FLAGS, f"-arch={architecture}", str(source), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        codes = functions(cubin)
    kernels = {}
    for entry in ENTRY.finditer(log):
        facts = {key: int(value) for key, value in entry.groupdict().items() if key != "name"}
        kernels[demangled(entry["name"])] = facts | counts(codes[entry["name"]])
    return kernels


def demangled(text: str) -> str:
    """Return a kernel's name as in the source, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    name = re.sub(r"(?:void )?talos::\(anonymous namespace\)::|\(talos::[^)]*\)", "", done.stdout)
    return name.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the two reports are written")
    folder = parser.parse_args().folder
    head = {"commit": commit(), "triton": triton.__version__, "target": TARGET}
    write_json(folder / "triton.json", {**head, "kernels": triton_kernels()})
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    (release,) = re.findall(r"V(\d+\.\d+\.\d+)", version.stdout)
    kernels: dict[str, dict[str, Any]] = {each: {} for each in ARCHITECTURES}
    for architecture, found in kernels.items():
        for source in SOURCES:
            found |= cuda_kernels(ROOT / "csrc/cuda" / source, architecture)
    write_json(folder / "csrc_cuda.json", {"commit": commit(), "nvcc": release, "kernels": kernels})


if __name__ == "__main__":
    main()
