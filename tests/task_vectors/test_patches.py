"""Patches against plain indexing: what they replace, their two codings, their file, refusals."""

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from talos import Mask, Patch, TaskVector
from talos.errors import TalosTypeError, TalosValueError
from talos.files import Checkpoint
from talos.task_vectors.ranks import decode_gaps, encode_gaps
from tests.cases import assert_bit_equal, dense_mask

SHAPES = {"a": (40, 30), "b": (7,), "c": (300, 250), "d": ()}
GAP = st.one_of(st.integers(0, 300), st.integers(0, 2**31))


class Net(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def masks(density: float = 0.1, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return Mask.from_dense(
        {
            name: dense_mask(math.prod(shape), density, generator).view(shape)
            for name, shape in SHAPES.items()
        }
    )


def some_patch(mask: Mask, every: int, dtype: torch.dtype = torch.float32) -> Patch:
    """A patch of each `every`-th selected entry."""
    chosen = {name: mask.indices[name].positions_int64()[::every] for name in mask.names}
    positions = {name: where for name, where in chosen.items() if len(where)}
    values = {name: torch.randn(len(where)).to(dtype) for name, where in positions.items()}
    return Patch({name: mask.shapes[name] for name in positions}, positions, values)


def sequential_varints(numbers: list[int]) -> list[int]:
    """LEB128 of the gaps, one byte after another."""
    out, last = [], -1
    for number in numbers:
        gap, last = number - last - 1, number
        while gap >= 128:
            out.append(gap % 128 + 128)
            gap //= 128
        out.append(gap)
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(GAP, max_size=40))
@example([])
@example([0])
@example([2**31, 0, 2**31 - 1, 127, 128, 16383, 16384])
@example([2**62])
def test_gaps_are_varints_and_come_back(gaps: list[int]) -> None:
    numbers, last = [], -1
    for gap in gaps:
        last += gap + 1
        numbers.append(last)
    coded = encode_gaps(torch.tensor(numbers, dtype=torch.int64))
    assert coded.tolist() == sequential_varints(numbers)
    assert decode_gaps(coded).tolist() == numbers


@pytest.mark.parametrize("coded", [[128], [1, 255], [255] * 9 + [1], [255] * 8 + [127, 0]])
def test_damaged_gaps_are_refused(coded: list[int]) -> None:
    with pytest.raises(TalosValueError, match="coded must hold"):
        decode_gaps(torch.tensor(coded, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_patch_makes_one_model_into_another(dtype: torch.dtype) -> None:
    base, tuned = Net(dtype=dtype), Net(dtype=dtype)
    with torch.no_grad():
        tuned.a[3, ::7] += 1
        tuned.b[2] = -0.0
        base.b[2] = 0.0
        tuned.d.fill_(3.0)
    patch = Patch.from_models(base, tuned.state_dict())
    assert patch.names == ("a", "b", "d")
    assert patch.positions["a"].tolist() == [90 + 7 * k for k in range(5)]
    assert patch.positions["b"].tolist() == [2]  # -0 is not 0
    assert len(patch) == 7
    assert patch.nbytes == 7 * (4 + dtype.itemsize)
    assert repr(patch) == f"Patch(7 values in 3 tensors, {7 * (4 + dtype.itemsize)} B)"
    plain = bits(base)
    for name in patch.names:  # what any receiver does
        where = patch.positions[name].long()
        plain[name].view(-1).index_copy_(0, where, patch.values[name])
    patch.apply_(base)
    for name, wanted in bits(tuned).items():
        assert_bit_equal(plain[name], wanted)
        assert_bit_equal(bits(base)[name], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_a_patch_of_a_vector_writes_the_bits_of_apply(dtype: torch.dtype, scale: float) -> None:
    base, edited, mask = Net(dtype=dtype), Net(dtype=dtype), masks(0.3)
    values = torch.randn(mask.nnz) * 0.01
    values[::5] = 0
    vector = TaskVector(mask, values)
    vector.apply_(edited, scale)
    before = bits(base)
    patch = Patch.between(base, vector, scale)
    from_state = Patch.between(base.state_dict(), vector, scale)
    assert patch == from_state == Patch.from_models(base, edited)
    for name, each in before.items():
        assert_bit_equal(bits(base)[name], each)
    patch.apply_(base)
    for name, each in bits(edited).items():
        assert_bit_equal(bits(base)[name], each)


def test_checkpoints_are_read_from_disk_and_not_written(tmp_path: Path) -> None:
    base, tuned, mask = Net(), Net(seed=1), masks()
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(bits(model), tmp_path / f"{name}.safetensors")
    path, other = tmp_path / "base.safetensors", Checkpoint(tmp_path / "tuned.safetensors")
    patch = Patch.from_models(path, other)
    assert patch == Patch.from_models(base, tuned)
    vector = TaskVector.from_models(base, tuned, mask, strict=False)
    assert Patch.between(path, vector) == Patch.between(base, vector)
    with pytest.raises(TalosTypeError, match="model must be in memory, got a checkpoint"):
        patch.apply_(other)


def test_a_patch_reaches_wrapped_transposed_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    base, tuned = Tied(), Tied()
    patch = Patch.from_models(base, tuned)
    assert patch.names == ("embed.weight",)
    assert patch == Patch.from_models(base.state_dict(), tuned)
    untied = {"embed.weight": tuned.embed.weight, "head.weight": torch.zeros(6, 4)}
    with pytest.raises(TalosValueError, match=r"one value of embed.weight, which is tied in base"):
        Patch.from_models(base, untied)
    patch.apply_(nn.DataParallel(base))
    assert torch.equal(base.head.weight, tuned.head.weight)
    columns = {"embed.weight": torch.zeros(4, 6).t()}
    patch.apply_(columns)
    assert torch.equal(columns["embed.weight"], tuned.embed.weight)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_ranks_of_a_mask_carry_a_patch(density: float, every: int) -> None:
    mask = masks(density)
    patch = some_patch(mask, every)
    buffers = patch.encode(mask)
    assert {each.dtype for each in buffers.values()} == {torch.uint8}
    assert Patch.decode(buffers, mask) == patch
    turned = Mask.from_dense({name: mask.to_dense(name) for name in reversed(mask.names)})
    assert turned == mask
    assert Patch.decode(buffers, turned) == patch  # equal masks, whatever their order


def test_ranks_carry_several_dtypes() -> None:
    mask = masks(0.5)
    parts = [some_patch(mask, 2, d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    values = {name: parts[i].values[name] for i, name in enumerate("abc")}
    shapes = {name: SHAPES[name] for name in "abc"}
    patch = Patch(shapes, {name: parts[0].positions[name] for name in "abc"}, values)
    assert Patch.decode(patch.encode(mask), mask) == patch


def test_positions_of_huge_tensors_are_int64(tmp_path: Path) -> None:
    """Nothing of the tensor's size is made."""
    shape, small = (1 << 17, 1 << 17), (1 << 15, 1 << 16)
    where = torch.tensor([0, 1 << 31, (1 << 31) + 1, (1 << 34) - 1])
    near = torch.tensor([0, (1 << 31) - 1])
    shapes, positions = {"w": shape, "s": small}, {"w": where, "s": near}
    values = {"w": torch.arange(4.0).bfloat16(), "s": torch.ones(2)}
    patch = Patch(shapes, positions, values)
    assert (patch.positions["w"].dtype, patch.positions["s"].dtype) == (torch.int64, torch.int32)
    mask = Mask.from_indices(positions, shapes)
    assert Patch.decode(patch.encode(mask), mask) == patch
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors") == patch


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    patch, path = some_patch(masks(), 3), tmp_path / "p.safetensors"
    patch.save(path)
    assert Patch.load(path) == patch
    with safe_open(path, framework="pt") as file:
        for name in patch.names:
            assert torch.equal(file.get_tensor(f"{name}.positions"), patch.positions[name])
            assert torch.equal(file.get_tensor(f"{name}.values"), patch.values[name])
        entries = json.loads(file.metadata()["talos"])["content"]["tensors"]
    assert {each["name"]: tuple(each["shape"]) for each in entries} == patch.shapes
    with pytest.raises(TalosValueError, match=r"got a patch; load it with talos.Patch.load"):
        Mask.load(path)
    masks().save(path)
    with pytest.raises(TalosValueError, match="must hold a patch, got a mask"):
        Patch.load(path)


def test_bytes_of_eight_bits_and_integers_are_patched(tmp_path: Path) -> None:
    base = {"w": torch.zeros(9).to(torch.float8_e4m3fn), "n": torch.zeros((), dtype=torch.int64)}
    tuned = {"w": torch.arange(9.0).to(torch.float8_e4m3fn), "n": torch.tensor(5)}
    patch = Patch.from_models(base, tuned)
    patch.save(tmp_path / "p.safetensors")
    Patch.load(tmp_path / "p.safetensors").apply_(base)
    assert torch.equal(base["w"].float(), tuned["w"].float())
    assert base["n"] == 5


class Sharded(Tensor):
    """Stands for a tensor that is no plain one, as DTensor."""


def test_everything_is_refused_before_the_first_write() -> None:
    patch = Patch(
        {"a": (2,), "b": (3,)},
        {"a": torch.tensor([0]), "b": torch.tensor([1])},
        {"a": torch.ones(1), "b": torch.ones(1)},
    )
    for other, error, match in (
        ({"a": torch.zeros(2)}, TalosValueError, "patch must name parameters of the model, got 1"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, TalosValueError, "model's shapes"),
        ({"a": torch.zeros(2), "b": torch.zeros(3).half()}, TalosTypeError, "patch's dtypes"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, device="meta")}, TalosTypeError, "with values"),
        ({"a": torch.zeros(2), "b": Sharded(torch.zeros(3))}, TalosTypeError, "got Sharded"),
    ):
        with pytest.raises(error, match=match):
            patch.apply_(other)
        assert not other["a"].any()
    shared = torch.zeros(4)
    with pytest.raises(TalosValueError, match="must not share a part of their memory"):
        patch.apply_({"a": shared[:2], "b": shared[1:]})


@pytest.mark.parametrize(
    ("positions", "values", "error", "match"),
    [
        ([1, 0], [1.0, 2.0], TalosValueError, "strictly ascending"),
        ([1, 1], [1.0, 2.0], TalosValueError, "strictly ascending"),
        ([0, 4], [1.0, 2.0], TalosValueError, r"in \[0, 4\)"),
        ([-1, 2], [1.0, 2.0], TalosValueError, r"in \[0, 4\)"),
        ([0, 1], [1.0], TalosValueError, "of one length"),
        ([0, 1], [1.0, math.nan], TalosValueError, "must be finite"),
        ([0.0, 1.0], [1.0, 2.0], TalosTypeError, "must be integers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    positions: list[float], values: list[float], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Patch({"w": (4,)}, {"w": torch.tensor(positions)}, {"w": torch.tensor(values)})


def test_models_and_vectors_that_do_not_fit_are_refused() -> None:
    base, mask = Net(), masks()
    with pytest.raises(
        TalosValueError, match="tuned must have every tensor of the change, lacks 1"
    ):
        Patch.from_models(base, {name: getattr(base, name) for name in "abc"})
    with pytest.raises(TalosValueError, match="base must have every tensor of the change, lacks 1"):
        Patch.from_models(base, {**base.state_dict(), "e": torch.zeros(1)})
    with pytest.raises(TalosValueError, match="shapes and dtypes of base"):
        Patch.from_models(base, Net(dtype=torch.bfloat16))
    vector = TaskVector.from_models(base, Net(seed=1), mask, strict=False)
    with pytest.raises(TalosValueError, match="base must be the base"):
        Patch.between(Net(seed=2), vector)
    assert len(Patch.between(Net(seed=2), vector, force=True))
    with pytest.raises(TalosValueError, match="base must have every tensor"):
        Patch.between({"a": base.a}, vector)


def test_other_masks_and_damaged_buffers_are_refused() -> None:
    mask = masks()
    patch = some_patch(mask, 3)
    buffers = patch.encode(mask)
    with pytest.raises(TalosValueError, match="must be the one that the patch was encoded with"):
        Patch.decode(buffers, masks(seed=1))
    with pytest.raises(TalosValueError, match="must select every entry of the patch"):
        patch.encode(masks(seed=1))
    with pytest.raises(TalosValueError, match="the patch's tensors in their shapes, lacks c"):
        patch.encode(Mask.from_dense({name: mask.to_dense(name) for name in "ab"}))
    for damaged, match in (
        ({**buffers, "values": buffers["values"][1:]}, "a value for each"),
        ({**buffers, "gaps": buffers["gaps"][:-1]}, "a value for each|whole gaps"),
        ({**buffers, "gaps": encode_gaps(torch.tensor([mask.nnz]))}, "ranks below"),
        ({**buffers, "dtypes": buffers["dtypes"][1:]}, "a code for each"),
        ({**buffers, "dtypes": buffers["dtypes"] + 9}, "a code for each"),
        ({"mask": buffers["mask"]}, "buffers must hold"),
    ):
        with pytest.raises(TalosValueError, match=match):
            Patch.decode(damaged, mask)


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([200, 5], dtype=torch.uint8),
        torch.tensor([0, 100, -100, 20], dtype=torch.int8),
        torch.tensor([5, 2], dtype=torch.uint16),
    ],
)
def test_positions_of_small_integers_are_checked_as_those_of_large_ones(positions: Tensor) -> None:
    # 5 - 200 is 61 in eight bits
    with pytest.raises(TalosValueError, match="strictly ascending"):
        Patch({"w": (300,)}, {"w": positions}, {"w": torch.ones(len(positions))})


def test_gaps_whose_sum_needs_more_than_63_bits_are_refused() -> None:
    one = encode_gaps(torch.tensor([2**62]))
    with pytest.raises(TalosValueError, match="at most 63 bits"):
        decode_gaps(torch.cat([one, one, one]))


def test_buffers_of_complex_numbers_and_extra_state_are_no_hindrance() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    base, tuned = Odd(2, 2), Odd(2, 2)
    for model, imaginary in ((base, 0.0), (tuned, -0.0)):
        model.register_buffer(
            "phases", torch.complex(torch.ones(3), torch.zeros(3)).to(torch.complex128)
        )
        model.phases[1] = complex(1.0, imaginary)
    patch = Patch.from_models(base.state_dict(), tuned.state_dict())
    assert patch.positions["phases"].tolist() == [1]
    patch.apply_(base)
    for name, each in tuned.named_parameters():
        assert_bit_equal(base.get_parameter(name).detach(), each.detach())
    assert math.copysign(1, base.phases[1].imag.item()) == -1


def test_a_base_that_cannot_be_edited_is_refused_as_apply_refuses_it() -> None:
    mask = Mask.from_dense({"w": torch.ones(2) > 0})
    vector = TaskVector(mask, torch.ones(2))
    with pytest.raises(TalosTypeError, match=r"w of torch.int64 on cpu"):
        Patch.between({"w": torch.zeros(2, dtype=torch.int64)}, vector)
    with pytest.raises(TalosTypeError, match=r"w of torch.float32 on meta"):
        Patch.between({"w": torch.zeros(2, device="meta")}, vector)
    with pytest.raises(TalosTypeError, match="w of layout"):
        Patch.from_models({"w": torch.eye(2).to_sparse()}, {"w": torch.ones(2, 2).to_sparse()})
    shared = nn.Parameter(torch.zeros(2))
    twice = TaskVector(
        Mask.from_indices({"a": torch.tensor([0]), "b": torch.tensor([0])}, {"a": (2,), "b": (2,)}),
        torch.ones(2),
    )
    with pytest.raises(TalosValueError, match="a tied parameter once, got a and b"):
        Patch.between({"a": shared, "b": shared}, twice)


def test_a_patch_of_a_checkpoint_changes_the_copies_that_export_changes(tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    weight = torch.randn(4, 4)
    save_file({"embed": weight, "head": weight.clone(), "other": torch.randn(4, 4)}, base)
    vector = TaskVector(Mask.from_dense({"embed": torch.eye(4) > 0}), torch.ones(4))
    with pytest.warns(UserWarning, match="head of the base is a copy of embed"):
        vector.export(base, out)
    with pytest.warns(UserWarning, match="head of the base is a copy of embed"):
        patch = Patch.between(base, vector)
    tensors = dict(Checkpoint(base))
    patch.apply_(tensors)
    for name, each in Checkpoint(out).items():
        assert_bit_equal(tensors[name], each)
