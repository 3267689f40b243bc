"""What the kernels that multiply matrices compile to, kept in a table.

    TRITON_INTERPRET=0 python -m tests.kernels.aot cuda:90 OUT
    python -m tests.kernels.products OUT --label after \
      --table benches/results/compiled/products.json

Of each: its tile (rows, tokens and columns of a step), registers a thread, bytes of its stack,
instructions in all and in the loop that multiplies, accesses to spilled registers inside loops, and
how many groups of loads may still be under way where that loop waits for one.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import triton

from benches.measure import commit
from benches.results import write_json
from tests.kernels.sass import counts_of

TARGET = "cuda:90"
PREFIXES = ("fisher_diag", "sddmm")


def pending_loads(ttgir: str) -> list[int]:
    """What each wait inside a loop of a kernel leaves under way."""
    found = []
    for loop in re.finditer(r"^( +)(?:%\S+ = )?scf\.(?:for|while) ", ttgir, re.MULTILINE):
        end = ttgir.index(f"\n{loop[1]}}} loc", loop.end())  # what is inside is indented
        waits = re.findall(r"ttg\.async_wait .*\{num = (\d+)", ttgir[loop.start() : end])
        found += [int(pending) for pending in waits]
    return found


def products(folder: Path) -> dict[str, dict[str, Any]]:
    """The facts of every product that `tests.kernels.aot` has compiled."""
    product = r"tt\.dot .*tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>"
    found = {}
    for prefix in PREFIXES:
        for name, counts in counts_of(folder, prefix).items():
            (tile,) = re.findall(product, (folder / f"{name}.ttir").read_text())
            found[name] = {
                "tile": [int(size) for size in tile],
                "registers": counts.registers,
                "stack": counts.stack,
                "instructions": counts.instructions,
                "loop": max(counts.loops),
                "loop_spills": sum(counts.spills),
                "pending_loads": pending_loads((folder / f"{name}.ttgir").read_text()),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.products", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="what tests.kernels.aot has written for cuda:90")
    parser.add_argument("--label", required=True, help="the version's name in the table")
    parser.add_argument("--table", type=Path, required=True, help="JSON file, renewed")
    parser.add_argument("--commit", default=None, help="that was compiled; by default this one")
    options = parser.parse_args()
    table = json.loads(options.table.read_text()) if options.table.exists() else {}
    table[options.label] = {
        "commit": options.commit or commit(),
        "triton": triton.__version__,
        "target": TARGET,
        "kernels": products(options.folder),
    }
    write_json(options.table, table)


if __name__ == "__main__":
    main()
