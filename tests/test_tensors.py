"""Which tensors are one memory: identity and overlaps, against sets of addresses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import talos
from talos.errors import TalosValueError
from talos.tensors import check_separate, place, sums_of_bits


def addresses(tensor: Tensor) -> list[int]:
    """Of every entry, one after the other."""
    flat = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, by in enumerate(tensor.stride()):
        steps = torch.arange(tensor.shape[dim]) * by
        flat = flat + steps.view([-1 if each == dim else 1 for each in range(tensor.dim())])
    return (flat.flatten() + tensor.storage_offset()).tolist()


@st.composite
def views(draw: st.DrawFn) -> list[Tensor]:
    """Tensors in one buffer of 48 entries: slices, transposes, expansions; and others."""
    buffer = torch.zeros(48)
    found = []
    for _ in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["rows", "columns", "transposed", "expanded", "own", "empty"]))
        table = buffer.view(draw(st.sampled_from([(6, 8), (8, 6), (4, 12)])))
        first = draw(st.integers(0, 3))
        last = draw(st.integers(first + 1, 4))
        found.append(
            {
                "rows": table[first:last],
                "columns": table[:, first:last],
                "transposed": table[first:last].t(),
                "expanded": table[first, :1].expand(3),
                "own": torch.zeros(3),
                "empty": table[:0],
            }[kind]
        )
    return found


@given(views())
@settings(max_examples=200, deadline=None)
def test_what_shares_a_part_of_its_memory_is_refused(tensors: list[Tensor]) -> None:
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    entries = [
        [(storage, each) for each in addresses(tensor)]
        for storage, tensor in zip(storages, tensors, strict=True)
    ]
    pairs = [(i, j) for i in range(len(tensors)) for j in range(i)]
    one = {(i, j) for i, j in pairs if place(tensors[i]) == place(tensors[j])}
    for i, j in one:
        assert entries[i] == entries[j]
    overlaps = any(set(entries[i]) & set(entries[j]) for i, j in pairs if (i, j) not in one)
    overlaps = overlaps or any(len(set(each)) < len(each) for each in entries)
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    if overlaps:
        with pytest.raises(TalosValueError, match="must not share a part of their memory"):
            check_separate(named, "weights")
    else:
        check_separate(named, "weights")


def test_overlaps_of_others_do_not_count() -> None:
    buffer = torch.zeros(9)
    named = {"a": buffer[:4], "b": buffer[3:6], "c": buffer[6:]}
    check_separate(named, "weights", ["c"])
    with pytest.raises(TalosValueError, match="got a and b"):
        check_separate(named, "weights", ["a"])


@pytest.mark.parametrize(
    "other",
    [torch.zeros(2, device="meta"), torch.zeros(0), torch.zeros(2).to_sparse()],
)
def test_what_has_no_memory_is_only_itself(other: Tensor) -> None:
    assert place(other) == place(other)
    assert place(other) != place(other.clone())


class Tied(nn.Module):
    """A head that is the table's memory, as another parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = (
            nn.Embedding(9, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 9, bias=False),
        )
        self.head.weight.data = self.table.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.head(torch.tanh(self.body(self.table(ids).mean(1))))
        return hidden


def test_two_parameters_of_one_memory_are_edited_once() -> None:
    base, tuned = Tied(), Tied()
    with torch.no_grad():
        tuned.table.weight += 0.5
    vector = talos.TaskVector.from_models(base, tuned)
    assert vector.mask.names == ("table.weight", "body.weight", "body.bias")
    before = base.table.weight.detach().clone()
    with vector.applied(base):
        torch.testing.assert_close(base.head.weight, tuned.head.weight)
    assert torch.equal(base.head.weight, before)
    with talos.ResidentVectors(base, {"a": vector}) as resident:
        resident.swap("a")
        torch.testing.assert_close(base.head.weight, tuned.head.weight)
    assert torch.equal(base.table.weight, before)


def test_two_parameters_of_one_memory_are_not_scored_apart() -> None:
    with pytest.raises(TalosValueError, match=r"one parameter, got table.weight and head.weight"):
        talos.fisher_diag(Tied(), [torch.zeros(2, 3, dtype=torch.int64)], params="weight")
    found = talos.fisher_diag(Tied(), [torch.zeros(2, 3, dtype=torch.int64)])
    assert set(found) == {"body.weight", "body.bias"}


@pytest.mark.parametrize("method", ["nonlinear", "linearized", "lota"])
def test_no_method_trains_two_parameters_of_one_memory_apart(method: str) -> None:
    batches = [(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(TalosValueError, match=r"one parameter, got table.weight and head.weight"):
        talos.fine_tune(Tied(), batches, method=method, steps=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_equal_values_have_equal_sums_of_bits_wherever_they_lie(dtype: torch.dtype) -> None:
    values = torch.randn(4, 4).to(dtype)
    shifted = torch.zeros(17, dtype=dtype)[1:].view(4, 4).copy_(values)
    across = values.t().contiguous().t()
    other = values.clone()
    other[0, 0] = not other[0, 0]
    held = {"plain": values, "shifted": shifted, "across": across, "other": other}
    sums = sums_of_bits(held | {"meta": values.to("meta")})
    assert sums["plain"] == sums["shifted"] == sums["across"] != sums["other"]
    assert "meta" not in sums
