"""Machine code of a cubin as text, its loops, and what they hold."""

import re
import subprocess
from pathlib import Path

import triton


def disassemble(cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[list[str]]:
    """The instructions of every loop: from the target of a branch backwards to the branch."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
    code = [(int(address, 16), words) for address, words in line.findall(sass)]
    found = []
    for end, words in code:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", words)
        if target and int(target[1], 16) < end:  # a branch to itself follows each kernel's end
            begin = int(target[1], 16)
            found.append([words for address, words in code if begin <= address <= end])
    return found


def count(loop: list[str], operation: str) -> int:
    """How many instructions of a loop begin with `operation`, after their predicate."""
    begins = re.compile(rf"(?:@!?U?P\w+\s+)?(?:{operation})\b")
    return sum(begins.match(words) is not None for words in loop)


def spills(loop: list[str]) -> int:
    """Loads and stores of registers that did not fit."""
    return count(loop, "LDL|STL")
