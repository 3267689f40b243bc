"""The Triton kernels compiled for devices that this machine does not have; see `aot`.

`python -m tests.kernels.machine_code` reports what they cost there.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benches.measure import ROOT
from tests.kernels.aot import TARGETS, launches

pytestmark = pytest.mark.slow

KERNELS = tuple(launches())
INDEXED = tuple(
    name for name in KERNELS if name.startswith(("sparse_adam", "gather", "scatter", "add_delta"))
)
PRODUCTS = tuple(name for name in KERNELS if name.startswith(("fisher_diag", "sddmm")))


@dataclass(frozen=True)
class Compiled:
    target: str
    folder: Path

    @property
    def is_cuda(self) -> bool:
        return self.target.startswith("cuda")

    def text(self, name: str, language: str) -> str:
        return (self.folder / f"{name}.{language}").read_text()


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("compiled")
    cache = tmp_path_factory.mktemp("triton-cache")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.aot", request.param, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(request.param, folder)


def test_every_kernel_compiles(compiled: Compiled) -> None:
    found = {path.stem for path in compiled.folder.glob("*.ttir")}
    assert found == {*KERNELS, "adam_scalars", "add_parts", "add_slabs"}
    languages = {"ptx", "cubin"} if compiled.is_cuda else {"amdgcn"}
    for name in found:
        for language in languages:
            assert (compiled.folder / f"{name}.{language}").stat().st_size > 0, (name, language)


def test_blocks_are_placed_by_64_bit_multiplications(compiled: Compiled) -> None:
    for name in INDEXED:
        text = compiled.text(name, "ttir")
        products = re.findall(r"arith\.muli %[\w#]+, %(\w+) : (i\d+) ", text)
        mixing = f"c{0x7FEB352D}_i32"  # of noise, modulo 2^32 by intent
        kinds = [kind for by, kind in products if by != mixing]
        # a program, a tensor's row, a block's or segment's entries, its words
        assert kinds.count("i64") == len(kinds) >= 4, (name, products)
    for name in PRODUCTS:
        products = re.findall(
            r"arith\.muli %(\w+?)(?:_\d+)?, %\w+ : (?:tensor<\w+x)?(i\d+)",
            compiled.text(name, "ttir"),
        )
        in_words = {"column", "octets"} if name.startswith("sddmm") else set()  # bits of a word
        assert {kind for of, kind in products if of not in in_words} == {"i64"}, (name, products)


def test_arithmetic_is_rounded_as_torch_rounds_it(compiled: Compiled) -> None:
    scalars = compiled.text("adam_scalars", "ttir")
    assert re.search(r"math\.exp2 .* : tensor<128xf64>", scalars), "bias corrections are float64"
    for name in KERNELS:
        if name.startswith("sparse_adam"):
            ttir = compiled.text(name, "ttir")
            assert "tt.precise_sqrt" in ttir
            assert "tt.precise_divf" in ttir
            assert "arith.constant 9.9" not in ttir, "betas are arguments"
        if not compiled.is_cuda:
            continue
        ptx = compiled.text(name, "ptx")
        assert not re.findall(r"div\.full|sqrt\.approx|ex2\.approx", ptx), name
        if name in INDEXED and not name.startswith("sparse_adam"):
            assert "fma.rn.f32" not in ptx, name  # each product is rounded before the sum
        if name in INDEXED and "bf16" in name and not name.startswith("gather"):
            assert "cvt.rn.bf16" in ptx, name
        if "one-token" in name:  # 16 bits squared: rounded to TF32 and the rest, not cut off
            assert "cvt.rna.tf32" in ptx
