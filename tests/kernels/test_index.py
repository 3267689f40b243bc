"""The compressed index: encode, decode, rank, set algebra, packing; the oracle is dense bools."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from talos_kernels import Index, TalosTypeError, TalosValueError, TensorIndex
from talos_kernels._bits import pack_bits, popcount, unpack_bits
from talos_kernels.index import Column
from tests.cases import BLOCK_SIZE, CASES, SEGMENT_SIZE, Case, dense_mask


@pytest.mark.parametrize("case", CASES, ids=str)
def test_encoding_and_decoding_are_inverse(case: Case) -> None:
    for mask in case.masks():
        index = TensorIndex.encode(mask)
        positions = mask.nonzero()[:, 0]
        assert torch.equal(index.decode(), mask)
        assert torch.equal(index.positions_int64(), positions)
        assert TensorIndex.from_positions(positions, mask.numel()) == index
        assert index.nnz == positions.numel()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rank_counts_the_selected_entries_before(case: Case) -> None:
    for mask in case.masks():
        expected = torch.where(mask, mask.cumsum(0) - 1, -1)
        index = TensorIndex.encode(mask)
        assert torch.equal(index.rank(torch.arange(mask.numel())), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_finds_the_positions_of_ranks(case: Case) -> None:
    for mask in case.masks():
        index, positions = TensorIndex.encode(mask), mask.nonzero()[:, 0]
        for step in (1, 2, 37, 10_000):  # few ranks are looked up, many are decoded
            ranks = torch.arange(0, index.nnz, step)
            assert torch.equal(index.select(ranks), positions[ranks])


def test_the_encoding_follows_the_density() -> None:
    generator = torch.Generator().manual_seed(0)

    def encoding(density: float) -> str:
        return TensorIndex.encode(dense_mask(160_000, density, generator)).encoding

    assert [encoding(d) for d in (0.0, 0.01, 0.0624, 0.0625, 0.5, 1.0)] == [
        "u16", "u16", "u16", "bitmap", "bitmap", "full",
    ]  # fmt: skip


@pytest.mark.parametrize(("density", "most"), [(0.6, 0.22), (0.1, 1.3), (0.05, 2.01), (1.0, 0.0)])
def test_bytes_a_selected_entry(density: float, most: float) -> None:
    mask = dense_mask(2048 * 512, density, torch.Generator().manual_seed(0))
    index = TensorIndex.encode(mask)
    assert index.nbytes / index.nnz <= most


@given(st.lists(st.booleans(), max_size=200))
def test_bits_round_trip(bits: list[bool]) -> None:
    dense = torch.tensor(bits, dtype=torch.bool)
    words = pack_bits(dense, 64)
    assert words.numel() % 2 == 0
    assert torch.equal(unpack_bits(words)[: len(bits)], dense)
    assert int(popcount(words).sum()) == sum(bits)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_popcount_of_any_word(values: list[int]) -> None:
    expected = [(value & 0xFFFFFFFF).bit_count() for value in values]
    assert popcount(torch.tensor(values, dtype=torch.int32)).tolist() == expected


@pytest.mark.parametrize("case", [c for c in CASES if len(c.sizes) > 1], ids=str)
def test_packing_keeps_every_part(case: Case) -> None:
    parts = [TensorIndex.encode(mask) for mask in case.masks()]
    index = Index.pack(parts)
    assert index.unpack() == parts
    assert index.nnz == sum(part.nnz for part in parts)
    again = Index.from_buffers(index.buffers)
    assert (again.numels, again.nnzs) == (index.numels, index.nnzs)
    for part, entries in zip(parts, index.slices, strict=True):
        assert entries.stop - entries.start == part.nnz


def test_programs_cover_every_block_once() -> None:
    sizes = ((2 * BLOCK_SIZE + 1, 0.5), (97, 0.0), (SEGMENT_SIZE + 1, 0.01), (BLOCK_SIZE, 1.0))
    generator = torch.Generator().manual_seed(0)
    masks = [dense_mask(n, d, generator) for n, d in sizes]
    masks[0][BLOCK_SIZE : 2 * BLOCK_SIZE] = False  # empty blocks have no program
    masks[0][-1] = masks[2][-1] = True
    index = Index.pack([TensorIndex.encode(mask) for mask in masks])
    assert index.programs.tolist() == [[0, 0], [0, 2], [2, 0], [2, 1], [3, 0]]
    alone = [part.programs.tolist() for part in index.split()]
    assert alone == [[[0, 0], [0, 2]], [], [[0, 0], [0, 1]], [[0, 0]]]


def test_copies_and_pickles_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [TensorIndex.encode(dense_mask(70_000, d, generator)) for d in (0.01, 0.3, 1.0)]
    index = Index.pack(parts)
    for clone in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert clone.unpack() == parts
    assert pickle.loads(pickle.dumps(parts)) == parts


def test_positions_beyond_two_to_the_31() -> None:
    numel = 2**31 + 2 * SEGMENT_SIZE + 5
    positions = torch.tensor([0, 2**31 - 1, 2**31, numel - 1])
    index = TensorIndex.from_positions(positions, numel)
    assert index.encoding == "u16"
    assert torch.equal(index.positions_int64(), positions)
    assert index.rank(positions).tolist() == [0, 1, 2, 3]
    assert index.rank(positions[:3] + 1).tolist() == [-1, 2, -1]
    packed = Index.pack([index, index])
    assert packed.nnz == 8
    assert int(packed.table[1, Column.RANK]) == 4
    assert packed.unpack() == [index, index]


def test_bad_input() -> None:
    with pytest.raises(TalosTypeError, match="dense must be a bool tensor, got"):
        TensorIndex.encode(torch.ones(3))
    with pytest.raises(TalosTypeError, match="positions must be an integer tensor"):
        TensorIndex.from_positions(torch.tensor([0.5]), 3)
    with pytest.raises(TalosValueError, match=r"positions must lie in \[0, 3\), got 1 .. 3"):
        TensorIndex.from_positions(torch.tensor([1, 3]), 3)
    with pytest.raises(TalosValueError, match="got 1 after 2 at 1"):
        TensorIndex.from_positions(torch.tensor([2, 1]), 3)
    with pytest.raises(TalosValueError, match="tensors of one size, got 3 and 4"):
        TensorIndex.encode(torch.ones(3) > 0) & TensorIndex.encode(torch.ones(4) > 0)


def test_buffers_of_a_damaged_file_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    bitmap = TensorIndex.encode(dense_mask(97, 0.5, generator))
    words = bitmap.words.clone()
    words[60] = 1  # entry 1920 of 97
    with pytest.raises(TalosValueError, match="select entries below 97"):
        TensorIndex.from_buffers("bitmap", 97, words=words)
    with pytest.raises(TalosValueError, match=r"words must be torch\.int32 of 64"):
        TensorIndex.from_buffers("bitmap", 97, words=words[:3])
    with pytest.raises(TalosValueError, match="words must be given"):
        TensorIndex.from_buffers("bitmap", 97)
    with pytest.raises(TalosValueError, match="encoding must be one of"):
        TensorIndex.from_buffers("csr", 97)
    u16 = TensorIndex.encode(dense_mask(70_000, 0.01, generator))

    def rebuilt(positions: torch.Tensor, counts: torch.Tensor = u16.counts) -> TensorIndex:
        return TensorIndex.from_buffers("u16", 70_000, positions=positions, counts=counts)

    assert rebuilt(u16.positions) == u16
    swapped = u16.positions.to(torch.int32)
    swapped[[0, 1]] = swapped[[1, 0]]
    with pytest.raises(TalosValueError, match="strictly ascending, broken at 1"):
        rebuilt(swapped.to(torch.uint16))
    beyond = u16.positions.to(torch.int32)
    beyond[-1] = 65_535
    with pytest.raises(TalosValueError, match=r"lie in \[0, 70000\), got 131071"):
        rebuilt(beyond.to(torch.uint16))
    with pytest.raises(TalosValueError, match="counts must lie in"):
        rebuilt(u16.positions, u16.counts - 10**6)
