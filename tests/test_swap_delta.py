"""One delta off and another on: `swap_delta_` against indexing by masks, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from talos_kernels import (
    Index,
    TalosTypeError,
    TalosValueError,
    TensorIndex,
    _ops,
    add_delta_,
    revert_delta_,
    swap_delta_,
)
from talos_kernels.swap_delta import swap_delta_reference
from tests.cases import CASES, DENSITIES, DTYPES, MANY, Case, assert_bit_equal

SCALE = 0.3

needs_library = pytest.mark.skipif(
    _ops.compiled_library is None, reason="talos_kernels/_C was not built"
)


def old_cases(case: Case) -> list[Case]:
    """The case's tensors under every other density, one shift of the table after another."""
    cases = []
    for shift in range(len(DENSITIES)):
        densities = [DENSITIES[(i + shift) % len(DENSITIES)] for i in range(len(case.sizes))]
        cases.append(Case(f"{case}-old{shift}", case.sizes, tuple(densities)))
    return cases


def old_masks(case: Case) -> list[Tensor]:
    """The case's masks, turned round: other entries than those of the new delta's."""
    return [mask.flip(0) for mask in case.masks()]


class Swap:
    """A base, one delta on it, another to put on, and what must come of it."""

    def __init__(
        self, masks: list[Tensor], others: list[Tensor], base: list[Tensor], device: torch.device
    ) -> None:
        self.old_index, self.index = (
            Index.pack([TensorIndex.encode(mask) for mask in each], device)
            for each in (others, masks)
        )
        generator = torch.Generator().manual_seed(4)
        self.base = [tensor.to(device) for tensor in base]
        self.params = [tensor.clone() for tensor in self.base]
        self.old_saved = torch.cat(
            [tensor[mask] for tensor, mask in zip(base, others, strict=True)]
        ).to(device)
        for param, mask in zip(self.params, others, strict=True):
            param[mask.to(device)] = 7.0
        self.values = torch.randn(self.index.nnz, generator=generator).to(device)
        self.saved = torch.empty(self.index.nnz, dtype=base[0].dtype, device=device)
        self.expected = [tensor.clone() for tensor in self.base]
        for wanted, mask, part in zip(self.expected, masks, self.index.slices, strict=True):
            added = wanted[mask].float() + torch.tensor(SCALE) * self.values[part]
            wanted[mask] = added.to(wanted.dtype)
        self.expected_saved = torch.cat(
            [tensor[mask] for tensor, mask in zip(base, masks, strict=True)]
        )

    @classmethod
    def of(cls, case: Case, old: Case, dtype: torch.dtype, device: torch.device) -> "Swap":
        return cls(case.masks(), old_masks(old), case.tensors(dtype), device)

    def arguments(self) -> tuple[Any, ...]:
        index, old = self.index.buffers, self.old_index.buffers
        return self.params, old, self.old_saved, index, self.values, SCALE, self.saved

    def check(self) -> None:
        for param, wanted in zip(self.params, self.expected, strict=True):
            assert_bit_equal(param, wanted)
        assert_bit_equal(self.saved, self.expected_saved.to(self.saved.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair_of_encodings(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    for old in old_cases(case) if dtype == torch.bfloat16 else old_cases(case)[1::3]:
        swap = Swap.of(case, old, dtype, device)
        swap_delta_(
            swap.params, swap.old_index, swap.old_saved, swap.index, swap.values,
            scale=SCALE, saved=swap.saved,
        )  # fmt: skip
        swap.check()


@pytest.mark.parametrize("case", MANY, ids=str)
def test_the_reference(case: Case, device: torch.device) -> None:
    for old in old_cases(case):
        swap = Swap.of(case, old, torch.bfloat16, device)
        swap_delta_reference(*swap.arguments())
        swap.check()


@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(dtype: torch.dtype, value_dtype: torch.dtype, device: torch.device) -> None:
    for old in old_cases(MANY[0]):
        parts = MANY[0].masks(), old_masks(old)
        a, b = (Index.pack([TensorIndex.encode(m) for m in each], device) for each in parts)
        base = [tensor.to(device) for tensor in MANY[0].tensors(dtype)]
        params = [tensor.clone() for tensor in base]
        deltas = [torch.randn(i.nnz, device=device).to(value_dtype) for i in (a, b)]
        saved = [torch.empty(i.nnz, dtype=dtype, device=device) for i in (a, b)]
        add_delta_(params, a, deltas[0], scale=SCALE, saved=saved[0])
        with_a = [param.clone() for param in params]
        for scale in (1.0, -2.0):
            swap_delta_(params, a, saved[0], b, deltas[1], scale=scale, saved=saved[1])
            swap_delta_(params, b, saved[1], a, deltas[0], scale=SCALE, saved=saved[0])
            for param, wanted in zip(params, with_a, strict=True):
                assert_bit_equal(param, wanted)
        revert_delta_(params, a, saved[0])
        for param, wanted in zip(params, base, strict=True):
            assert_bit_equal(param, wanted)


@pytest.mark.parametrize("shared", [True, False], ids=["one buffer", "two buffers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_one_index_twice_scales_anew(
    case: Case, dtype: torch.dtype, shared: bool, device: torch.device
) -> None:
    index = Index.pack([TensorIndex.encode(mask) for mask in case.masks()], device)
    base = [tensor.to(device) for tensor in case.tensors(dtype)]
    params = [tensor.clone() for tensor in base]
    values = torch.randn(index.nnz, device=device)
    saved = torch.empty(index.nnz, dtype=dtype, device=device)
    add_delta_(params, index, values, scale=5.0, saved=saved)
    bits = saved.clone()
    for scale in (0.1, 0.2):
        after = saved if shared else torch.empty_like(saved)
        swap_delta_(params, index, saved, index, values, scale=scale, saved=after)
        wanted = [tensor.clone() for tensor in base]
        add_delta_(wanted, index, values, scale=scale)
        for param, expected in zip(params, wanted, strict=True):
            assert_bit_equal(param, expected)
        assert_bit_equal(after, bits)
        saved = after


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_comes_back(dtype: torch.dtype, device: torch.device) -> None:
    """NaN payloads, infinities, zeros with signs: of float32 its upper halves, with lower bits."""
    halves = torch.arange(1 << 16, dtype=torch.int32)
    patterns = (halves.to(torch.int16) if dtype != torch.float32 else halves << 16 | 1).view(dtype)
    for density in (0.01, 0.3, 1.0):
        for old_density in (0.01, 0.3, 1.0):
            old = Case("patterns", (1 << 16,), (old_density,))
            case = Case("patterns", (1 << 16,), (density,))
            swap = Swap(case.masks(), old_masks(old), [patterns], device)
            swap_delta_(
                swap.params, swap.old_index, swap.old_saved, swap.index, swap.values,
                scale=SCALE, saved=swap.saved,
            )  # fmt: skip
            assert_bit_equal(swap.saved, swap.expected_saved.to(device))
            revert_delta_(swap.params, swap.index, swap.saved)
            assert_bit_equal(swap.params[0], swap.base[0])


def test_strided_weights_and_autograd(device: torch.device) -> None:
    mask = torch.tensor([[True, False], [True, True]])
    index = Index.pack([TensorIndex.encode(mask)], device)
    weight = torch.ones(2, 2, device=device).t()
    leaf = weight.requires_grad_()
    loss = leaf.square().sum()
    saved = torch.tensor([3.0, 4.0, 5.0], device=device)
    swap_delta_([leaf], index, saved, index, torch.ones(3, device=device), saved=saved)
    assert leaf.tolist() == [[4.0, 1.0], [5.0, 6.0]]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_library
@pytest.mark.parametrize("which", ["old", "new"])
@pytest.mark.parametrize(
    ("buffer", "where", "value"),
    [
        pytest.param(0, 0, -1, id="a bitmap with more bits than its ranks"),
        pytest.param(1, -1, 65535, id="a position past the end"),
        pytest.param(2, 0, -5, id="a negative rank"),
        pytest.param(2, 1, 10**12, id="a rank past the end"),
        pytest.param(3, 1, 7, id="an unknown encoding"),
        pytest.param(3, 3, 10**12, id="words elsewhere"),
        pytest.param(3, 4, -(10**12), id="starts elsewhere"),
        pytest.param(3, 5, 5, id="programs elsewhere"),
        pytest.param(3, 5, 10**12, id="programs far away"),
        pytest.param(4, 0, 9, id="a tensor that does not exist"),
        pytest.param(4, 1, -1, id="a negative tensor"),
    ],
)
def test_a_damaged_index_reaches_no_other_memory(
    buffer: int, where: int, value: int, which: str
) -> None:
    sizes = (3000, 70000)
    masks = Case("new", sizes, (0.5, 0.01)).masks()
    index = Index.pack([TensorIndex.encode(mask) for mask in masks])
    whole = Index.pack([TensorIndex.encode(mask) for mask in old_masks(Case("old", sizes, (1, 1)))])
    damaged = [part.clone() for part in index.buffers]
    damaged[buffer].view(-1)[where] = value
    memory = torch.full((80000,), 7.0)
    params = [memory[1000:4000], memory[5000:75000]]
    saved = [torch.zeros(nnz + 32) for nnz in (index.nnz, whole.nnz)]
    ours, others = saved[0][: index.nnz], saved[1][: whole.nnz]
    arguments = (
        (damaged, ours, whole.buffers, others.clone(), 1.0, others)
        if which == "old"
        else (whole.buffers, others, damaged, ours.clone(), 1.0, ours)
    )
    with pytest.raises(RuntimeError, match=r"index must be one that Index\.pack made"):
        torch.ops.talos_C.swap_delta_(params, *arguments)
    outside = torch.cat([memory[:1000], memory[4000:5000], memory[75000:]])
    assert bool((outside == 7.0).all())
    assert not any(bool(each[-32:].any()) for each in saved)


@needs_library
def test_old_bits_of_another_length_are_refused() -> None:
    index = Index.pack([TensorIndex.encode(mask) for mask in MANY[0].masks()])
    params, values = MANY[0].tensors(), torch.zeros(index.nnz)
    for old_saved in (torch.zeros(index.nnz - 1), torch.zeros(0)):
        with pytest.raises(RuntimeError, match=r"index must be one that Index\.pack made"):
            torch.ops.talos_C.swap_delta_(
                params, index.buffers, old_saved, index.buffers, values, 1.0, values.clone()
            )


def swap_with(**changes: Any) -> None:
    index, old_index = (Index.pack([TensorIndex.encode(torch.ones(2, 3) > 0)]) for _ in range(2))
    values: dict[str, Any] = {
        "params": [torch.zeros(2, 3)],
        "old_index": old_index,
        "old_saved": torch.zeros(6),
        "index": index,
        "values": torch.zeros(6),
        "saved": torch.zeros(6),
    }
    swap_delta_(**{**values, **changes})


SAME = torch.zeros(9)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"params": []}, TalosValueError, "params must hold 1 tensors"),
        ({"params": [torch.zeros(7)]}, TalosValueError, r"params\[0\] must have 6 entries"),
        ({"old_index": Index.pack([])}, TalosValueError, "params must hold 0 tensors"),
        ({"old_saved": torch.zeros(5)}, TalosValueError, r"old_saved must be .* shape \(6,\)"),
        ({"old_saved": torch.zeros(6).half()}, TalosTypeError, "old_saved must be torch.float32"),
        ({"values": torch.zeros(6).int()}, TalosTypeError, "values must be"),
        ({"saved": torch.zeros(12)[::2]}, TalosValueError, r"strides \(2,\)"),
        ({"saved": SAME[:6], "old_saved": SAME[3:]}, TalosValueError, "memory of its own"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        swap_with(**changes)
