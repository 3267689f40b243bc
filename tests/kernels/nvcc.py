"""Compiles the CUDA kernels of csrc/ and counts what their machine code holds; no device is needed.

    python -m tests.kernels.nvcc benches/results/compiled/csrc_cuda.json

The table holds for every instance and architecture: registers a thread, bytes of stack, of spill
stores and loads, and of shared memory, as ptxas tells them; all instructions; those of each loop,
in the order of the code (listed positions, then words); and the calls of slow paths there. The
counts are of instructions that stand in the code: a warp issues fewer. `before` is the step as it
was at BEFORE.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from benches.measure import ROOT, commit
from benches.results import write_json
from tests.kernels.sass import LINE, Instruction, loops

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = ("sparse_adam_kernel.cu", "add_delta_kernel.cu")
BEFORE = "bfc28296f49996bca1ac9b0a92036def437219b9"
FLAGS = ("-O3", "-fmad=false", "-std=c++17", "-cubin", "-Xptxas", "-v")  # as setup.py has them

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    code: tuple[Instruction, ...]

    def counts(self) -> dict[str, object]:
        """What the table says of it."""
        bodies = loops(list(self.code))
        facts = {name: value for name, value in asdict(self).items() if name != "code"}
        calls = [sum(each.name.startswith("CALL") for each in body) for body in bodies]
        return facts | {
            "instructions": len(self.code),
            "loops": [len(body) for body in bodies],
            "slow_paths": calls,
        }


def compiler() -> str | None:
    """nvcc itself: a wrapper on the PATH would not tell where its toolkit lies."""
    known = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    return str(known) if known.exists() else shutil.which("nvcc")


def version() -> str:
    done = subprocess.run(
        [str(compiler()), "--version"], capture_output=True, text=True, check=True
    )
    return re.findall(r"V(\d+\.\d+\.\d+)", done.stdout)[0]


def demangled(text: str) -> str:
    """Kernels' names as in the source, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return re.sub(r"(?:void )?talos::\(anonymous namespace\)::|\(talos::[^)]*\)", "", done.stdout)


def disassembled(cubin: Path) -> dict[str, tuple[Instruction, ...]]:
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {}
    for part in text.split("Function : ")[1:]:
        name, *lines = part.splitlines()
        found = [Instruction(int(m[1], 16), m[2], m[3]) for m in map(LINE.match, lines) if m]
        functions[name.strip()] = tuple(each for each in found if each.name != "NOP")
    return functions


def compile_kernels(source: Path, architecture: str) -> dict[str, Kernel]:
    """Every kernel of a source file, by its name with its template's arguments."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [str(compiler()), *FLAGS, f"-arch={architecture}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        functions = disassembled(cubin)
    kernels = {}
    for entry in ENTRY.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels[demangled(entry["name"]).strip()] = Kernel(
            registers=int(entry["registers"]),
            stack=int(entry["stack"]),
            spill_stores=int(entry["stores"]),
            spill_loads=int(entry["loads"]),
            shared=int(shared[1]) if shared else 0,
            code=functions[entry["name"]],
        )
    return kernels


def compiled(
    csrc: Path, architecture: str, sources: tuple[str, ...] = SOURCES
) -> dict[str, Kernel]:
    """The kernels of several source files."""
    found: dict[str, Kernel] = {}
    for source in sources:
        found |= compile_kernels(csrc / "cuda" / source, architecture)
    return found


def counts(csrc: Path, sources: tuple[str, ...]) -> dict[str, dict[str, object]]:
    return {
        architecture: {
            name: kernel.counts() for name, kernel in compiled(csrc, architecture, sources).items()
        }
        for architecture in ARCHITECTURES
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.nvcc", description=__doc__.split("\n")[0]
    )
    parser.add_argument("table", type=Path, help="JSON file, written anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "archive", BEFORE, "csrc"]
        packed = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=packed, check=True)
        before = counts(Path(folder, "csrc"), SOURCES[:1])
    table = {
        "before": {"commit": BEFORE, "nvcc": version(), "kernels": before},
        "after": {"commit": commit(), "nvcc": version(), "kernels": counts(ROOT / "csrc", SOURCES)},
    }
    write_json(options.table, table)


if __name__ == "__main__":
    main()
