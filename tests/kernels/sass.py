"""Counts in NVIDIA's machine code of kernels that `tests.kernels.aot` has compiled.

    TRITON_INTERPRET=0 python -m tests.kernels.aot cuda:90 OUT
    python -m tests.kernels.sass OUT sparse_adam --label after \
      --table benches/results/compiled/step.json

A loop is what lies between a backward branch and its target. The counts are of instructions that
stand there, slow paths included: a warp that takes none issues fewer.
"""

import argparse
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from benches.measure import commit
from benches.results import write_json
from benches.shapes import QK_DENSITY, SHAPES
from benches.work import sparse_step
from talos_kernels.triton.blocks import BLOCK, CHUNK
from talos_kernels.triton.sparse_adam import NUM_WARPS as WARPS

MODELS = ("vit-b-32", "vit-l-14", "t5-large")
# Of an H200: 132 multiprocessors x 4 schedulers x 1.9 GHz, and a copy's bytes a second, estimated.
ISSUE_RATE, COPY_RATE = 132 * 4 * 1.9e9, 4.3e12

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.name.startswith("BRA") and found else None


@dataclass(frozen=True)
class Counts:
    """Of one kernel: all instructions, and those of each loop, in the order of the code."""

    registers: int
    stack: int
    instructions: int
    loops: tuple[int, ...]
    spills: tuple[int, ...]
    """Accesses to local memory in each loop."""
    slow_paths: tuple[int, ...]
    """Calls in each loop: of a division or root whose operands are not ordinary numbers."""


def disassembled(cubin: Path) -> list[Instruction]:
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [LINE.match(line) for line in text.splitlines()]
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in found if m]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What each backward branch repeats; the one at the end that only waits is none."""
    ranges = [
        (each.target, each.address)
        for each in code
        if each.target is not None and each.target < each.address
    ]
    return [
        [each for each in code if first <= each.address <= last] for first, last in sorted(ranges)
    ]


def counts(cubin: Path, registers: int, stack: int) -> Counts:
    code = [each for each in disassembled(cubin) if each.name != "NOP"]
    bodies = loops(code)

    def inside(*names: str) -> tuple[int, ...]:
        return tuple(sum(each.name.startswith(names) for each in body) for body in bodies)

    return Counts(registers, stack, len(code), inside(""), inside("LDL", "STL"), inside("CALL"))


def counts_of(folder: Path, prefix: str) -> dict[str, Counts]:
    """The counts of every kernel of a folder whose name begins so."""
    facts = json.loads((folder / "facts.json").read_text())
    return {
        name: counts(folder / f"{name}.cubin", found["registers"], found["spilled"])
        for name, found in facts.items()
        if name.startswith(prefix) and (folder / f"{name}.cubin").exists()
    }


def limits(step: Counts, model: str) -> dict[str, float]:
    """Microseconds that a float32 step on Q and K takes at least on an H200, by two limits.

    `issue`: all warps' instructions, of bitmaps, at one a cycle a scheduler; empty blocks, and
    slow paths of idle lanes, come on top where a version has them. `bytes`: the byte model's over
    the copy bandwidth. What is nearer to the other hides it less.
    """
    shape = SHAPES[model]
    entries = sum(tensor.query_key_numel for tensor in shape.touched)
    parts = [
        (tensor.query_key_numel, round(QK_DENSITY * tensor.query_key_numel))
        for tensor in shape.touched
    ]
    index_bytes = entries // 8
    loop = step.loops[-1]
    outside = step.instructions - sum(step.loops)
    issued = WARPS * (entries / CHUNK.value * loop + entries / BLOCK.value * outside)
    moved = sparse_step(parts, index_bytes, compact=False, itemsize=4, moment=4)
    return {
        "issue": round(issued / ISSUE_RATE * 1e6, 1),
        "bytes": round(moved / COPY_RATE * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.sass", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="what tests.kernels.aot has written")
    parser.add_argument("prefix", help="of the kernels' names")
    parser.add_argument("--label", required=True, help="the version's name in the table")
    parser.add_argument("--table", type=Path, required=True, help="JSON file, renewed")
    parser.add_argument("--commit", default=None, help="that was compiled; by default this one")
    options = parser.parse_args()
    table = json.loads(options.table.read_text()) if options.table.exists() else {}
    found = counts_of(options.folder, options.prefix)
    step = found.get("sparse_adam-fp32")
    table[options.label] = {
        "commit": options.commit or commit(),
        "triton": triton.__version__,
        "target": "cuda:90",
        "kernels": {name: asdict(each) for name, each in found.items()},
        **({} if step is None else {"h200": {name: limits(step, name) for name in MODELS}}),
    }
    write_json(options.table, table)


if __name__ == "__main__":
    main()
