"""The library's CUDA kernels compiled for a device that this machine does not have; see `nvcc`."""

import json

import pytest

from benches.measure import ROOT
from tests.kernels.nvcc import ARCHITECTURES, SOURCES, Kernel, compiled, compiler, version
from tests.kernels.sass import loops

ARCHITECTURE = "sm_90"
STEP, DELTA = "sparse_adam_kernel<", "add_delta_kernel<"
TABLE = json.loads((ROOT / "benches/results/compiled/csrc_cuda.json").read_text())

needs_nvcc = pytest.mark.skipif(compiler() is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    return compiled(ROOT / "csrc", ARCHITECTURE, SOURCES)


@needs_nvcc
def test_every_instance_fits_without_spilling(kernels: dict[str, Kernel]) -> None:
    names = [name.split("<")[0] for name in kernels]
    # params and gradients of five kinds, moments of two, with and without masters
    assert names.count("sparse_adam_kernel") == 5 * 2 * 2
    assert names.count("add_delta_kernel") == 3 * 3
    assert names.count("adam_scalars_kernel") == 1
    for name, kernel in kernels.items():
        # 65536 registers of a multiprocessor hold four blocks of 256 threads
        assert kernel.registers <= 64, name
        assert kernel.stack == kernel.spill_stores == kernel.spill_loads == 0, name
        assert kernel.shared == 0, name
        assert not [each for each in kernel.code if each.name.startswith(("LDL", "STL", "BAR"))]


@needs_nvcc
def test_a_step_holds_no_float64(kernels: dict[str, Kernel]) -> None:
    for name, kernel in kernels.items():
        doubles = [each for each in kernel.code if each.name.startswith(("DADD", "DMUL", "DFMA"))]
        assert bool(doubles) == (name == "adam_scalars_kernel"), name


@needs_nvcc
def test_loads_are_issued_before_the_arithmetic(kernels: dict[str, Kernel]) -> None:
    """In each loop: the roots' and the quotients' first instruction comes after the last load."""
    for name, kernel in kernels.items():
        if not name.startswith(STEP):
            continue
        listed, words = loops(list(kernel.code))
        masters = name.endswith("true>")
        for body, positions in ((listed, 4), (words, 0)):
            loads = [each.address for each in body if each.name.startswith("LDG")]
            units = [each.address for each in body if each.name.startswith("MUFU")]
            # of four entries each: positions, weight, two moments, master, gradient of two kinds
            assert len(loads) == positions + 4 * (6 if masters else 5), name
            assert max(loads) < min(units), name


@needs_nvcc
def test_the_table_is_what_is_compiled(kernels: dict[str, Kernel]) -> None:
    after = TABLE["after"]
    if version() != after["nvcc"]:
        pytest.skip(f"the table is of nvcc {after['nvcc']}, this is {version()}")
    found = {name: kernel.counts() for name, kernel in kernels.items()}
    assert found == after["kernels"][ARCHITECTURE], "renew it: see tests/kernels/nvcc.py"


def test_the_table_shows_fewer_registers_and_shorter_loops_than_before() -> None:
    for architecture in ARCHITECTURES:
        before, after = (TABLE[each]["kernels"][architecture] for each in ("before", "after"))
        steps = [name for name in after if name.startswith(STEP)]
        assert len(steps) == 2 * len(before)
        for name in steps:
            earlier = before[name.rpartition(", ")[0] + ">"]
            assert after[name]["registers"] <= 64 < earlier["registers"]
            assert max(after[name]["loops"]) < max(earlier["loops"])
        assert all(each["spill_stores"] == 0 for each in after.values())
