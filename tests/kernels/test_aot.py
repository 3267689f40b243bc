"""The Triton kernels compiled for devices that are not here; see `tests.kernels.aot`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import triton

from talos_kernels.triton import sddmm
from tests.kernels.aot import TARGETS, launches
from tests.kernels.products import pending_loads, products
from tests.kernels.sass import counts_of

ROOT = Path(__file__).resolve().parents[2]
KERNELS = tuple(launches())
INDEXED = tuple(
    name for name in KERNELS if name.startswith(("sparse_adam", "gather", "scatter", "add_delta"))
)
STEPS = tuple(name for name in KERNELS if name.startswith("sparse_adam"))
PRODUCTS = tuple(name for name in KERNELS if name.startswith(("fisher_diag", "sddmm")))
SAMPLED = tuple(name for name in PRODUCTS if name.startswith("sddmm"))


@dataclass(frozen=True)
class Compiled:
    target: str
    folder: Path

    @property
    def is_cuda(self) -> bool:
        return self.target.startswith("cuda")

    @property
    def facts(self) -> dict[str, dict[str, int]]:
        return json.loads((self.folder / "facts.json").read_text())

    def text(self, name: str, language: str) -> str:
        return (self.folder / f"{name}.{language}").read_text()

    def assembly(self, name: str) -> str:
        return self.text(name, "ptx" if self.is_cuda else "amdgcn")


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("compiled")
    cache = tmp_path_factory.mktemp("triton-cache")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.aot", request.param, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(request.param, folder)


def test_every_kernel_fits_without_spilling(compiled: Compiled) -> None:
    assert set(compiled.facts) == {*KERNELS, "adam_scalars", "add_parts", "add_slabs"}
    for name, facts in compiled.facts.items():
        assert facts["local"] == 0, (name, facts)
        # Of a score's tile a few words for after the loop may lie in memory; see the next test.
        most = 48 if compiled.is_cuda and name.startswith("fisher_diag") else 0
        assert facts["spilled"] <= most, (name, facts)
        if name not in INDEXED:
            continue
        # Six programs of 128 threads a multiprocessor, of 65536 registers, hide the loads' latency;
        # five where noise is made for bf16 moments.
        assert facts["registers"] <= (96 if "moments" in name else 80), (name, facts)
        assert facts["shared"] <= 1024, (name, facts)


def test_no_loop_touches_spilled_registers(compiled: Compiled) -> None:
    if not compiled.is_cuda:
        return
    found = counts_of(compiled.folder, "fisher_diag") | counts_of(compiled.folder, "sddmm")
    assert set(found) == set(PRODUCTS)
    for name, counts in found.items():
        assert max(counts.loops) > 100, (name, counts)  # the product's
        assert not any(counts.spills), (name, counts)


def test_blocks_are_placed_by_64_bit_multiplications(compiled: Compiled) -> None:
    for name in INDEXED:
        text = compiled.text(name, "ttir")
        products = re.findall(r"arith\.muli %[\w#]+, %(\w+) : (i\d+) ", text)
        mixing = f"c{0x7FEB352D}_i32"  # of noise, modulo 2^32 by intent
        kinds = [kind for by, kind in products if by != mixing]
        # a program, a tensor's row, a block's or segment's entries, its words
        assert kinds.count("i64") == len(kinds) >= 4, (name, products)
        assert re.search(r"arith\.select %\w+, %c65536_i32, %c2048_i32 : i32", text), name


def test_what_is_not_selected_takes_no_slow_path(compiled: Compiled) -> None:
    """Of 0 the divisions and the root are subroutines: an unselected lane holds 1."""
    for name in STEPS:
        text = compiled.text(name, "ttir")
        constants = dict(re.findall(r"(%\w+) = arith\.constant dense<(\S+)> : tensor<512x", text))
        floats = r"tt\.load %\S+, %\S+, (%\w+) .*: tensor<512x!tt\.ptr<(?:f32|bf16)>>"
        others = [constants[other] for other in re.findall(floats, text)]
        # gradient, two moments, and a master, in the loop over listed entries and the one over bits
        assert len(others) == (8 if "bf16" in name else 6), (name, others)
        assert set(others) == {"1.000000e+00"}, (name, others)


def test_a_step_holds_no_float64(compiled: Compiled) -> None:
    for name in STEPS:
        assert "f64" not in compiled.text(name, "ttir"), name
    assert "f64" in compiled.text("adam_scalars", "ttir")


def test_a_step_loads_the_next_words_before_it_stores(compiled: Compiled) -> None:
    for name in STEPS:
        text = compiled.text(name, "ttir")
        words = r"tt\.load .*: tensor<(?:16x!tt\.ptr<i32>|512x!tt\.ptr<i16>)>"
        loads = [found.start() for found in re.finditer(words, text)]
        assert len(loads) == 4, name  # before each loop and in it
        for before, inside in zip(loads[::2], loads[1::2], strict=True):
            loop = text.rindex("scf.while", 0, inside)
            assert before < loop, name
            assert "tt.store" not in text[loop:inside], name


def test_the_table_of_the_step_is_what_compiles(compiled: Compiled) -> None:
    """The instructions of the hot loops are committed, so that a change shows what it costs."""
    table = json.loads((ROOT / "benches/results/compiled/step.json").read_text())["after"]
    if (compiled.target, triton.__version__) != (table["target"], table["triton"]):
        pytest.skip("the table is of another target or compiler")
    found = counts_of(compiled.folder, "sparse_adam")
    assert {name: json.loads(json.dumps(asdict(each))) for name, each in found.items()} == table[
        "kernels"
    ], "python -m tests.kernels.sass renews the table"
    assert not any(sum(each.spills) for each in found.values())


def test_the_table_of_products_is_what_compiles(compiled: Compiled) -> None:
    table = json.loads((ROOT / "benches/results/compiled/products.json").read_text())["after"]
    if (compiled.target, triton.__version__) != (table["target"], table["triton"]):
        pytest.skip("the table is of another target or compiler")
    assert products(compiled.folder) == table["kernels"], (
        "python -m tests.kernels.products renews it"
    )


def test_a_multiprocessor_holds_the_programs_that_are_reckoned_with(compiled: Compiled) -> None:
    """By the registers, which go out by eights to each of a program's threads."""
    if compiled.target != "cuda:90":
        return
    names = {"half": ("bf16", "bf16-small"), "tf32": ("tf32", "tf32-small"), "ieee": ("fp32",)}
    for precision, configs in sddmm.CONFIGS.items():
        for name, config in zip(names[precision], configs, strict=True):
            registers = -(-compiled.facts[f"sddmm-{name}"]["registers"] // 8) * 8
            assert config.resident == 65536 // (registers * 32 * config.num_warps), name


def test_a_warp_reads_neighbours(compiled: Compiled) -> None:
    lanes = 32 if compiled.is_cuda else 64
    side_by_side = f"sizePerThread = [1], threadsPerWarp = [{lanes}], warpsPerCTA = [4]"
    for name in INDEXED:
        text = compiled.text(name, "ttgir")
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", text, re.MULTILINE))
        accesses = re.findall(r"(?:tt\.load|tt\.store|amdg?\w*\.buffer_\w+) .*: (.*) loc", text)
        wide = [
            layout
            for access in accesses
            for layout in re.findall(r"tensor<512x.*?, (#\w+)>", access)
        ]
        assert len(wide) >= 4, (name, accesses)
        assert all(side_by_side in layouts[layout] for layout in wide), (name, layouts)
        # between layouts goes what a word needs, never what an entry needs
        assert not re.findall(r"convert_layout .*tensor<512x", text), name


def test_ranks_are_counted_by_one_instruction(compiled: Compiled) -> None:
    count = "popc.b32" if compiled.is_cuda else "v_bcnt_u32"
    for name in INDEXED:
        assert count in compiled.assembly(name), name


def test_arithmetic_is_rounded_as_torch_rounds_it(compiled: Compiled) -> None:
    scalars = compiled.text("adam_scalars", "ttir")
    assert re.search(r"math\.exp2 .* : tensor<128xf64>", scalars), "bias corrections are float64"
    for name in KERNELS:
        ttir = compiled.text(name, "ttir")
        if name.startswith("sparse_adam"):
            assert "tt.precise_sqrt" in ttir
            assert "tt.precise_divf" in ttir
            assert "arith.constant 9.9" not in ttir, "betas are arguments"
        if not compiled.is_cuda:
            continue
        ptx = compiled.assembly(name)
        assert not re.findall(r"div\.full|sqrt\.approx|ex2\.approx", ptx), name
        if name in INDEXED and not name.startswith(("gather", "scatter")):
            # one fused multiply-add an entry, torch's lerp; every other product is rounded first
            fused = sum(2 if pair else 1 for pair in re.findall(r"fma\.rn\.f32(x2)?", ptx))
            assert fused == (8 if name.startswith("sparse_adam") else 0), name
        if name in INDEXED and "bf16" in name and "gather" not in name:
            assert "cvt.rn.bf16" in ptx, name


def test_gradients_are_matrix_products_of_wide_loads(compiled: Compiled) -> None:
    """Tensor cores for all but float32 proper; on NVIDIA 16 bytes a load, past the registers."""
    for name in PRODUCTS:
        products = re.findall(
            r"arith\.muli %(\w+?)(?:_\d+)?, %\w+ : (?:tensor<\w+x)?(i\d+)",
            compiled.text(name, "ttir"),
        )
        in_words = {"column", "octets"} if name in SAMPLED else set()  # bits of a word are few
        assert {kind for of, kind in products if of not in in_words} == {"i64"}, (name, products)
        units = re.findall(
            r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", compiled.assembly(name)
        )
        # the matrix cores of gfx942 multiply float32 too; those of NVIDIA do not
        assert bool(units) == (not compiled.is_cuda or "fp32" not in name), name
        if compiled.is_cuda and "one-token" in name:  # rounded and the rest, not cut off
            assert "cvt.rna.tf32" in compiled.assembly(name)
        if compiled.is_cuda and "bf16" in name and "one-token" not in name:
            assert "cp.async.cg.shared.global" in compiled.assembly(name), name


def test_a_histogram_leaves_room_for_other_programs(compiled: Compiled) -> None:
    for name in KERNELS:
        if name.startswith("score_histogram"):  # four of 256 threads a multiprocessor
            assert compiled.facts[name]["registers"] <= 64, (name, compiled.facts[name])


def test_a_product_loads_ahead(compiled: Compiled) -> None:
    """Loads of later steps are under way while one is multiplied."""
    if not compiled.is_cuda:
        return
    for name in PRODUCTS:
        pending = pending_loads(compiled.text(name, "ttgir"))
        assert pending, name
        assert min(pending) > 0, (name, pending)


def test_sampled_entries_are_written_side_by_side(compiled: Compiled) -> None:
    """A warp stores neighbours, which lie together in the order of ranks; no other store is."""
    lanes = 32 if compiled.is_cuda else 64
    for name in SAMPLED:
        text = compiled.text(name, "ttgir")
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", text, re.MULTILINE))
        stores = re.findall(
            r"(?:tt\.store|amdg?\w*\.buffer_store) .*tensor<(\d+)x.*?, (#\w+)>", text
        )
        large = "bf16" in name and "small" not in name  # stored in two halves
        assert len(stores) == (2 if large else 1), (name, stores)
        for entries, layout in stores:
            assert int(entries) <= 8192, name
            assert f"sizePerThread = [1], threadsPerWarp = [{lanes}]" in layouts[layout], name
        assert ("popc.b32" if compiled.is_cuda else "v_bcnt_u32") in compiled.assembly(name), name
