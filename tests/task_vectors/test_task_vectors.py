"""Task vectors against dense torch arithmetic: sums, application, exact restoration, refusals."""

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import talos
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector, editing
from talos.task_vectors.fingerprints import fingerprint
from tests.cases import DTYPES, assert_bit_equal, assert_close, dense_mask

SHAPES = {"layers.0": (1,), "layers.1": (97,), "layers.2": (23, 90), "layers.3": (300, 250)}
NUMELS = {name: math.prod(shape) for name, shape in SHAPES.items()}
# full, bitmap, u16, and nothing selected, drawn anew for every tensor
DENSITY = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.6, 1.0])
DENSITIES = st.tuples(*[DENSITY] * len(SHAPES))
SEED = st.integers(0, 2**20)
SCALE = st.floats(-3, 3, allow_nan=False, width=32)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
        self.layers = nn.ParameterList([nn.Parameter(weight.to(dtype)) for weight in weights])
        self.register_buffer("running_mean", torch.ones(3))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_bits(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        assert_bit_equal(param, before[name])


def mask_of(
    densities: tuple[float, ...], seed: int, names: tuple[str, ...] = tuple(SHAPES)
) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    dense = {
        name: dense_mask(NUMELS[name], density, generator).view(SHAPES[name])
        for name, density in zip(SHAPES, densities, strict=True)
    }
    return Mask.from_dense({name: dense[name] for name in names})


def vector_of(mask: Mask, seed: int, model: nn.Module | None = None) -> TaskVector:
    values = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(seed))
    bases = {} if model is None else {n: fingerprint(p) for n, p in bits(model).items()}
    return TaskVector(mask, values, {n: base for n, base in bases.items() if n in mask})


def dense_of(vector: TaskVector) -> dict[str, Tensor]:
    """Dense float64 deltas from the dense masks, sharing no code with the vector's own."""
    dense, first = {}, 0
    for name in vector.mask.names:
        chosen = vector.mask.to_dense(name)
        count = int(chosen.sum())
        dense[name] = torch.zeros(chosen.shape, dtype=torch.float64)
        dense[name][chosen] = vector.values[first : first + count].double()
        first += count
    return dense


def assert_is_sum(result: TaskVector, terms: list[tuple[float, TaskVector]]) -> None:
    expected: dict[str, Tensor] = {}
    chosen: dict[str, Tensor] = {}
    for scale, vector in terms:
        for name, dense in dense_of(vector).items():
            expected[name] = expected.get(name, 0) + scale * dense
            selected = vector.mask.to_dense(name)
            chosen[name] = chosen.get(name, torch.zeros_like(selected)) | selected
    actual = dense_of(result)
    assert set(actual) == set(expected)
    assert result.values.dtype == torch.float32
    for name, dense in expected.items():
        assert torch.equal(result.mask.to_dense(name), chosen[name])
        torch.testing.assert_close(actual[name], dense, rtol=1e-6, atol=2e-6)


@settings(max_examples=30)
@given(a=DENSITIES, b=DENSITIES, seed=SEED, scales=st.tuples(SCALE, SCALE))
def test_sums_over_different_masks(
    a: tuple[float, ...], b: tuple[float, ...], seed: int, scales: tuple[float, float]
) -> None:
    first, second = vector_of(mask_of(a, seed), seed), vector_of(mask_of(b, seed + 1), seed + 1)
    assert_is_sum(first + second, [(1.0, first), (1.0, second)])
    assert_is_sum(first - second, [(1.0, first), (-1.0, second)])
    terms = [(scales[0], first), (scales[1], second), (-0.5, first)]
    assert_is_sum(TaskVector.combine(terms), terms)
    assert_is_sum(scales[0] * first + scales[1] * second - 0.5 * first, terms)
    assert first + second == second + first
    assert ((first + second) - second).allclose(first, atol=1e-5)


def test_sums_over_different_tensors() -> None:
    densities = (1.0, 0.6, 0.1, 0.01)
    first = vector_of(mask_of(densities, 1, ("layers.3", "layers.1")), 1)
    second = vector_of(mask_of(densities, 2, ("layers.1", "layers.2")), 2)
    assert_is_sum(first + second, [(1.0, first), (1.0, second)])
    assert set((first + second).mask.names) == {"layers.1", "layers.2", "layers.3"}
    assert first + second == second + first


def test_equal_masks_in_another_order_are_not_mixed_up() -> None:
    densities = (1.0, 0.6, 0.1, 0.01)
    forward = vector_of(mask_of(densities, 1, ("layers.1", "layers.3")), 1)
    backward = vector_of(mask_of(densities, 1, ("layers.3", "layers.1")), 2)
    assert forward.mask == backward.mask
    assert_is_sum(forward + backward, [(1.0, forward), (1.0, backward)])
    assert forward != backward
    other = {
        name: dense_of(forward)[name][forward.mask.to_dense(name)]
        for name in SHAPES
        if name in forward.mask
    }
    again = TaskVector(
        backward.mask, torch.cat([other[name] for name in backward.mask.names]).float()
    )
    assert again == forward
    assert again.allclose(forward)


def test_one_mask_is_kept() -> None:
    mask = mask_of((1.0, 0.6, 0.1, 0.01), 0)
    first, second = vector_of(mask, 1), vector_of(mask, 2)
    assert (0.4 * first - second / 2).mask is mask


def test_operators() -> None:
    mask = mask_of((1.0, 0.6, 0.1, 0.01), 0)
    a, b = vector_of(mask, 1), vector_of(mask, 2)
    assert (-a) == -1 * a == a * -1
    assert a / 4 == 0.25 * a == a * Fraction(1, 4)
    assert sum([a, b, a]) == a + b + a
    assert 0 + a == a + 0 == a
    for scale in np.linspace(0, 1, 3):
        assert scale * a == float(scale) * a
        assert isinstance(scale * a, TaskVector)
    assert np.float32(0.5) * a == a * np.float32(0.5) == 0.5 * a
    for wrong in ("1", None, torch.ones(2), 1j):
        with pytest.raises(TypeError):
            a * wrong
        with pytest.raises(TypeError):
            a + wrong
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(ZeroDivisionError):
        a / 0
    for scale in (math.nan, math.inf):
        with pytest.raises(TalosValueError, match="scale must be finite"):
            scale * a
    with pytest.raises(TalosValueError, match="terms must hold"):
        TaskVector.combine([])
    with pytest.raises(TalosValueError, match=r"finite, got -?inf at entry \d+ of layers"):
        1e38 * (1e38 * a)


def test_sums_are_float32() -> None:
    mask = Mask.from_dense({"w": torch.ones(1) > 0})
    small = TaskVector(mask, torch.tensor([2.0**-10], dtype=torch.bfloat16))
    one = TaskVector(mask, torch.ones(1, dtype=torch.bfloat16))
    total = one + small
    assert total.values.dtype == torch.float32
    assert total.values.item() == 1 + 2.0**-10  # bfloat16 would lose it


def test_the_sum_lists_its_sources() -> None:
    mask = Mask.from_dense({"w": torch.ones(1) > 0})
    a = TaskVector(mask, torch.ones(1), metadata={"task": "a"})
    b = TaskVector(mask, torch.ones(1), metadata={"task": "b"})
    edit = 0.5 * (a - 2 * b) + a
    assert [(part["scale"], part["of"]["task"]) for part in edit.metadata["sum"]] == [
        (1.5, "a"),
        (-1.0, "b"),
    ]
    odd = TaskVector(mask, torch.ones(1), metadata={"sum": 3})
    (part,) = (2 * odd).metadata["sum"]
    assert (part["scale"], part["of"]["sum"]) == (2.0, 3)


def test_sources_with_equal_metadata_stay_apart_by_their_values() -> None:
    mask = Mask.from_dense({"w": torch.ones(1) > 0})
    a, b = (TaskVector(mask, torch.full((1,), v), metadata={"method": "talos"}) for v in (1.0, 2.0))
    assert [part["scale"] for part in (0.5 * a - b).metadata["sum"]] == [0.5, -1.0]
    assert [part["scale"] for part in (0.5 * a + a).metadata["sum"]] == [1.5]


def test_vectors_of_two_bases_are_not_summed() -> None:
    mask = mask_of((1.0, 0.6, 0.1, 0.01), 0)
    first = vector_of(mask, 1, Model(seed=1))
    second = vector_of(mask, 1, Model(seed=2))
    one, other = first.fingerprints["layers.0"], second.fingerprints["layers.0"]
    with pytest.raises(TalosValueError, match=f"{one} and {other} of layers.0"):
        first + second
    without = TaskVector(mask, second.values)
    assert (first + without).fingerprints == first.fingerprints
    shapes = Mask.from_dense({"layers.1": torch.ones(96) > 0})
    with pytest.raises(TalosValueError, match=r"shape of layers\.1"):
        first + TaskVector(shapes, torch.ones(96))


@settings(max_examples=25)
@given(densities=DENSITIES, seed=SEED, dtype=st.sampled_from(DTYPES), scale=SCALE)
def test_applied_is_dense_addition_and_leaves_no_trace(
    densities: tuple[float, ...], seed: int, dtype: torch.dtype, scale: float
) -> None:
    model = Model(dtype, seed)
    vector = vector_of(mask_of(densities, seed), seed, model)
    before = bits(model)
    with vector.applied(model, scale) as edited:
        assert edited is model
        for name, delta in dense_of(vector).items():
            chosen = vector.mask.to_dense(name)
            param = model.get_parameter(name).detach()
            exact = before[name].double() + scale * delta
            assert_bit_equal(param[~chosen], before[name][~chosen])
            # one float32 product and sum, then the rounding to the weights' dtype
            bound = 2.0**-22 * (before[name].double().abs() + (scale * delta).abs())
            bound += {2: 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11, 4: 0.0}[
                dtype.itemsize
            ] * exact.abs() + (2.0**-24 if dtype == torch.float16 else 0.0)
            assert bool(((param.double() - exact).abs() <= bound)[chosen].all())
    assert_same_bits(model, before)
    vector.apply_(model, scale)
    after = bits(model)
    with (-vector).applied(model, 7.0), vector.applied(model, -0.3):
        pass
    assert_same_bits(model, after)


def test_blocks_nest_and_restore_after_an_exception() -> None:
    model = Model(torch.bfloat16)
    first = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model)
    second = vector_of(mask_of((1.0, 0.1, 0.6, 0.1), 2), 2, model)
    before = bits(model)
    with first.applied(model, 2.0):
        inside = bits(model)
        with pytest.raises(KeyboardInterrupt), second.applied(model):
            raise KeyboardInterrupt
        assert_same_bits(model, inside)
        with first.applied(model, -2.0), second.applied(model, 0.5):
            pass
        assert_same_bits(model, inside)
    assert_same_bits(model, before)


def test_what_the_block_wrote_is_lost_on_selected_entries_only() -> None:
    model = Model()
    vector = vector_of(mask_of((0.0, 0.6, 0.0, 0.0), 1), 1, model)
    chosen = vector.mask.to_dense("layers.1")
    before = bits(model)
    with vector.applied(model), torch.no_grad():
        model.layers[1].fill_(5.0)
    assert torch.equal(model.layers[1][chosen], before["layers.1"][chosen])
    assert bool((model.layers[1][~chosen] == 5.0).all())


def test_a_block_that_replaces_the_storage_is_restored() -> None:
    model = Model()
    vector = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model)
    before = bits(model)
    with vector.applied(model):
        for param in model.parameters():
            param.data = param.data.clone()
    assert_same_bits(model, before)
    vector.apply_(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_device(device: torch.device, dtype: torch.dtype) -> None:
    model = Model(dtype)
    vector = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model)
    before = bits(model)
    model.to(device)
    with vector.applied(model, 0.5):
        for name, delta in dense_of(vector).items():
            exact = (before[name].float() + 0.5 * delta.float()).to(dtype)
            assert_close(model.get_parameter(name).detach().cpu(), exact)
        model.cpu()  # the block may move the model
    assert_same_bits(model, before)


def test_a_block_that_casts_the_model_is_refused() -> None:
    model = Model()
    vector = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model)
    message = r"keep its weights' dtype torch\.float32"
    with pytest.raises(TalosRuntimeError, match=message), vector.applied(model):
        model.half()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode(mode: type) -> None:
    model = Model()
    vector = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model)
    before = bits(model)
    with mode():
        with vector.applied(model):
            assert not torch.equal(model.layers[0], before["layers.0"])
        assert_same_bits(model, before)
        vector.apply_(model)
    with vector.applied(model):  # what was made in one mode serves in another
        pass
    assert all(param.requires_grad and param.grad_fn is None for param in model.parameters())
    sum(param.sum() for param in model.parameters()).backward()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Model()
        before = bits(model)
        with vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model).applied(model):
            assert not torch.equal(model.layers[0], before["layers.0"])
        assert_same_bits(model, before)


def test_writing_inside_a_graph_is_noticed_by_autograd() -> None:
    model = nn.Linear(3, 3)
    vector = TaskVector(Mask.from_dense({"weight": torch.ones(3, 3) > 0}), torch.ones(9))
    loss = model(torch.ones(1, 3, requires_grad=True)).square().sum()
    vector.apply_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_tied_weights_are_edited_once_by_either_name(name: str) -> None:
    model = Tied()
    before = model.head.weight.detach().clone()
    vector = TaskVector(Mask.from_dense({name: torch.ones(5, 3) > 0}), torch.ones(15))
    vector.apply_(model)
    assert_close(model.head.weight.detach(), before + 1)
    both = Mask.from_dense(dict.fromkeys(["embedding.weight", "head.weight"], torch.ones(5, 3) > 0))
    with pytest.raises(TalosValueError, match="tied parameter once"):
        TaskVector(both, torch.ones(30)).apply_(model)


def test_strided_weights_and_mixed_dtypes() -> None:
    model = Model()
    model.layers[2].data = model.layers[2].data.t().contiguous().t()
    model.layers[1].data = model.layers[1].data.bfloat16()
    model.layers[3].data = model.layers[3].data.half()
    vector = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model)
    before = bits(model)
    with vector.applied(model, 0.5):
        for name, delta in dense_of(vector).items():
            exact = (before[name].float() + 0.5 * delta.float()).to(before[name].dtype)
            assert_close(model.get_parameter(name).detach(), exact)
    assert_same_bits(model, before)
    assert not model.layers[2].is_contiguous()


def refused(
    model: nn.Module, vector: TaskVector, match: str, error: type = TalosValueError
) -> None:
    before = bits(model)
    for attempt in (vector.apply_, lambda m: vector.applied(m).__enter__()):
        with pytest.raises(error, match=match):
            attempt(model)
    assert_same_bits(model, before)


def test_refusals_come_before_the_first_write() -> None:
    model = Model()
    ones = {name: torch.ones(shape) > 0 for name, shape in SHAPES.items()}
    missing = Mask.from_dense({**ones, "layer.2": ones["layers.2"]})
    refused(model, vector_of(missing, 0), r"layer\.2 \(nearest: layers\.\d")
    turned = Mask.from_dense({**ones, "layers.3": ones["layers.3"].t()})
    refused(model, vector_of(turned, 0), r"\(250, 300\).*\(300, 250\)")
    eighth = Model().to(torch.float8_e4m3fn)
    refused(eighth, vector_of(Mask.from_dense(ones), 0), "float8", TalosTypeError)
    partly_meta = Model()
    partly_meta.layers[3] = nn.Parameter(torch.empty(300, 250, device="meta"))
    with pytest.raises(TalosTypeError, match=r"layers\.3 of torch\.float32 on meta"):
        vector_of(Mask.from_dense(ones), 0).apply_(partly_meta)
    with pytest.raises(TalosTypeError, match=r"torch\.nn\.Module, got OrderedDict"):
        vector_of(Mask.from_dense(ones), 0).apply_(model.state_dict())
    for scale in (math.nan, math.inf):
        with pytest.raises(TalosValueError, match="scale must be finite"):
            vector_of(Mask.from_dense(ones), 0).apply_(model, scale)
    with pytest.raises(TalosTypeError, match="scale must be a real number"):
        vector_of(Mask.from_dense(ones), 0).apply_(model, "0.5")


@pytest.mark.parametrize("change", ["one bit", "bfloat16"])
def test_another_base_is_refused_unless_forced(change: str) -> None:
    vector = vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, Model())
    other = Model()
    if change == "one bit":
        other.layers[3].data.view(-1).view(torch.int32)[-1] ^= 1
    else:
        other.bfloat16()
    name = "layers.3" if change == "one bit" else "layers.0"
    found, wanted = fingerprint(other.get_parameter(name)), vector.fingerprints[name]
    refused(other, vector, rf"{name} with fingerprint {found}, wanted {wanted}.*force=True")
    before = bits(other)
    with vector.applied(other, force=True):
        assert not torch.equal(other.layers[3], before["layers.3"])
    assert_same_bits(other, before)
    vector.apply_(other, force=True)
    with pytest.raises(TalosValueError, match="force=True"):
        vector.apply_(other)


def test_tensors_without_a_selected_entry_are_not_verified_or_written() -> None:
    model = Model()
    vector = vector_of(mask_of((0.0, 0.6, 0.0, 0.0), 1), 1, model)
    with torch.no_grad():
        model.layers[3].zero_()
    version = model.layers[3]._version
    vector.apply_(model)
    assert model.layers[3]._version == version


def test_few_packed_indices_are_kept_and_none_of_a_mask_that_is_gone() -> None:
    model = Model()
    vectors = [vector_of(mask_of((1.0, 0.6, 0.1, 0.01), seed), 1, model) for seed in range(20)]
    for vector in vectors:
        vector.apply_(model, 0.0)
    assert len(editing._packed) == editing._MOST_PACKED
    del vectors, vector
    assert not editing._packed


def test_from_models_keeps_what_the_mask_selects() -> None:
    base, tuned = Model(seed=1), copy.deepcopy(Model(seed=1))
    mask = mask_of((1.0, 0.6, 0.1, 0.0), 3)
    with torch.no_grad():
        for name in mask.names:
            tuned.get_parameter(name)[mask.to_dense(name)] += 0.25
    vector = TaskVector.from_models(base, tuned, mask, metadata={"task": "x"})
    assert vector.mask is mask
    assert vector.metadata == {"task": "x"}
    for name, delta in dense_of(vector).items():
        expected = tuned.get_parameter(name).double() - base.get_parameter(name).double()
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-7)
    touched = ("layers.0", "layers.1", "layers.2")
    assert vector.fingerprints == {n: fingerprint(base.get_parameter(n)) for n in touched}
    outside = int((~mask.to_dense("layers.2")).nonzero()[0, 0])
    with torch.no_grad():
        tuned.layers[2][outside][~mask.to_dense("layers.2")[outside]] += 1
        tuned.layers[3][0, 0] += 1
    with pytest.raises(TalosValueError, match=r"layers\.3 \(1\).*strict=False"):
        TaskVector.from_models(base, tuned, mask)
    assert TaskVector.from_models(base, tuned, mask, strict=False) == vector
    with torch.no_grad():
        tuned.layers[2][~mask.to_dense("layers.2")] = base.layers[2][~mask.to_dense("layers.2")]
        base.layers[3][0, 0] = tuned.layers[3][0, 0] = math.nan
    TaskVector.from_models(base, tuned, mask)


def test_from_models_of_every_kind() -> None:
    base, tuned = Model(torch.bfloat16, seed=1), Model(torch.bfloat16, seed=2)
    whole = TaskVector.from_models(base, tuned)
    assert [index.encoding for index in whole.mask.indices.values()] == ["full"] * 4
    assert whole.values.dtype == torch.float32
    for pair in ((base.state_dict(), tuned), (base, tuned.state_dict())):
        assert TaskVector.from_models(*pair) == whole
    both = TaskVector.from_models(base.state_dict(), tuned.state_dict())
    assert "running_mean" in both.mask  # a state dict does not separate buffers from weights
    empty = {"a": torch.zeros(0), "b": torch.ones(2), "n": torch.ones(2).int()}
    assert TaskVector.from_models(empty, empty).mask.nnz == 2


def test_from_models_refuses() -> None:
    base, tuned = dict(Model(seed=1).named_parameters()), dict(Model(seed=2).named_parameters())
    make = TaskVector.from_models
    renamed = {name.replace("layers.3", "layers.33"): t for name, t in tuned.items()}
    with pytest.raises(TalosValueError, match=r"tuned must have.*layers\.3 \(nearest: layers\.33"):
        make(base, renamed)
    with pytest.raises(TalosValueError, match=r"base must have the weights of tuned"):
        make(base, {**tuned, "more": torch.ones(1)})
    with pytest.raises(TalosValueError, match=r"\(98,\) for layers\.1, which is \(97,\)"):
        make(base, {**tuned, "layers.1": torch.ones(98)})
    broken = tuned["layers.1"].detach().clone()
    broken[7] = math.nan
    with pytest.raises(TalosValueError, match=r"finite, got nan at entry 7 of layers\.1"):
        make(base, {**tuned, "layers.1": broken})
    with pytest.raises(TalosValueError, match="mask must name weights of base, got q"):
        make(base, tuned, Mask.from_dense({"q": torch.ones(1) > 0}))
    with pytest.raises(TalosValueError, match=r"mask must have the shapes of base, got \(3,\)"):
        make(base, tuned, Mask.from_dense({"layers.1": torch.ones(3) > 0}))
    with pytest.raises(TalosValueError, match="floating-point weight, got none"):
        make({}, {})
    with pytest.raises(
        TalosTypeError, match="module or a state dict, or the path of a checkpoint, got l"
    ):
        make([], base)
    with pytest.raises(TalosTypeError, match="on meta"):
        make(base, {**tuned, "layers.1": torch.ones(97, device="meta")})


def test_the_constructor_refuses() -> None:
    mask = Mask.from_dense({"w": torch.tensor([False, True, False, True])})
    with pytest.raises(TalosTypeError, match="float64"):
        TaskVector(mask, torch.ones(2).double())
    with pytest.raises(TalosValueError, match=r"shape \(2,\).*got \(3,\)"):
        TaskVector(mask, torch.ones(3))
    with pytest.raises(TalosValueError, match="got inf at entry 3 of w"):
        TaskVector(mask, torch.tensor([1.0, math.inf]))
    with pytest.raises(TalosValueError, match="fingerprints must name tensors of the mask, got v"):
        TaskVector(mask, torch.ones(2), {"v": "0" * 16})
    with pytest.raises(AttributeError):
        TaskVector(mask, torch.ones(2)).values = torch.zeros(2)


def test_norms_size_table_and_dtype_of_a_vector() -> None:
    mask = Mask.from_dense({"h.0.q.weight": torch.eye(2) > 0, "h.0.fc1.weight": torch.ones(1) > 0})
    vector = TaskVector(mask, torch.tensor([3.0, 4.0, 12.0]))
    assert len(vector) == 3
    assert vector.norm() == 13.0
    assert vector.norms() == {"h.0.q.weight": 5.0, "h.0.fc1.weight": 12.0}
    assert vector.nbytes == 12 + mask.nbytes
    assert repr(vector) == "TaskVector(3 float32 values in 2 tensors, 284 B)"
    assert vector.describe().splitlines()[-1].split() == ["total", "2", "3", "0.600", "13"]
    assert vector.to_dense("h.0.q.weight").tolist() == [[3.0, 0.0], [0.0, 4.0]]
    half = vector.astype(torch.float16)
    assert half.values.dtype == torch.float16
    assert half != vector
    assert half.allclose(vector)
    with pytest.raises(TalosTypeError, match="dtype must be"):
        vector.astype(torch.float64)
    with pytest.raises(TalosValueError, match="float16 is out of range"):
        (1e5 * vector).astype(torch.float16)
    with pytest.raises(TypeError, match="unhashable"):
        hash(vector)
    assert copy.deepcopy(vector) == vector


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_of_wrapped_models_are_those_of_the_model(prefix: str) -> None:
    base, tuned = nn.Linear(4, 3), nn.Linear(4, 3)
    wrapped = {prefix + name: each for name, each in tuned.state_dict().items()}
    bare = TaskVector.from_models(base, tuned)
    for other_base, other in ((base, wrapped), (nn.DataParallel(base), tuned)):
        assert torch.equal(TaskVector.from_models(other_base, other).values, bare.values)
    other = TaskVector.from_models(
        {prefix + name: each for name, each in base.state_dict().items()}, tuned
    )
    assert other.mask.names == (prefix + "weight", prefix + "bias")
    other.apply_(base)
    torch.testing.assert_close(base.weight, tuned.weight)


@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight", "both", "clones"])
def test_a_file_may_hold_any_name_of_a_tied_weight(kept: str) -> None:
    base, tuned = Tied(), Tied()
    weights = dict(tuned.state_dict())
    if kept == "clones":
        weights = {name: each.clone() for name, each in weights.items()}
    elif kept != "both":
        weights = {kept: weights[kept]}
    for source in (base, base.state_dict()):
        vector = TaskVector.from_models(source, weights)
        assert vector.mask.names == ("embedding.weight",)
        wanted = (tuned.embedding.weight - base.embedding.weight).detach().flatten()
        assert torch.equal(vector.values, wanted)
    mask = Mask.from_dense({"head.weight": torch.ones(5, 3) > 0})
    assert TaskVector.from_models(base, weights, mask).mask.names == ("head.weight",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_edit_that_would_overflow_is_refused(dtype: torch.dtype, sign: float) -> None:
    """At the largest number and just short of it, and where the base is infinite already."""
    most = torch.finfo(dtype).max
    model = nn.Linear(4, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, sign * most, sign * most / 2, math.inf]]))
    before = model.weight.detach().clone()
    mask = Mask.from_dense({"weight": torch.tensor([[True, True, True, True]])})
    values = torch.tensor([1.0, sign, 1.0, 1.0])
    last_place = most * torch.finfo(dtype).eps / 2
    fits, breaks = 0.49 * last_place, 0.51 * last_place
    vector = TaskVector(mask, values)
    with pytest.raises(
        TalosValueError, match=r"every weight finite, got .*, with which 1 of weight"
    ):
        vector.apply_(model, scale=breaks)
    with (
        pytest.raises(TalosValueError, match="every weight finite"),
        vector.applied(model, scale=breaks),
    ):
        pass
    with talos.ResidentVectors(model, {"a": vector}) as resident:
        resident.swap("a", scale=fits)
        on = model.weight.detach().clone()
        with pytest.raises(TalosValueError, match="every weight finite"):
            resident.swap("a", scale=breaks)
        assert torch.equal(model.weight, on)
        assert resident.active == "a"
    assert torch.equal(model.weight, before)
    vector.apply_(model, scale=fits)
    assert model.weight[0, :3].isfinite().all()


def test_buffers_that_differ_are_named_in_a_warning() -> None:
    base, tuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert TaskVector.from_models(base, tuned).metadata == {}
    tuned(torch.randn(8, 3))
    moved = ["running_mean", "running_var"]
    for pair in ((base, tuned), (base, tuned.state_dict()), (base.state_dict(), tuned)):
        with pytest.warns(UserWarning, match="buffers moved.*running_mean, running_var"):
            vector = TaskVector.from_models(*pair, metadata={"task": "a"})
        assert vector.metadata == {"task": "a", "moved_buffers": moved}
        assert vector.mask.names == ("weight", "bias")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, "meta"])
def test_weights_that_the_mask_leaves_out_need_no_values(kind: Any) -> None:
    base, tuned = Model(seed=1), Model(seed=1)
    name, kept, *_ = SHAPES
    for model in (base, tuned):
        owner, _, leaf = name.rpartition(".")
        weight = model.get_parameter(name).detach()
        odd = weight.to(kind) if isinstance(kind, torch.dtype) else weight.to("meta")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(odd, requires_grad=False))
    with torch.no_grad():
        tuned.get_parameter(kept).add_(1)
    mask = Mask.from_dense({kept: torch.ones(SHAPES[kept]) > 0})
    vector = TaskVector.from_models(base, tuned, mask)
    vector.apply_(base)
    torch.testing.assert_close(base.get_parameter(kept), tuned.get_parameter(kept))
    if kind != "meta":
        with torch.no_grad():
            odd = tuned.get_parameter(name)
            odd.copy_((odd.float() + 1).to(kind))
        with pytest.raises(TalosValueError, match=f"only where mask selects, got .*{name}"):
            TaskVector.from_models(Model(seed=1).to(torch.float32), tuned, mask)


def test_integers_that_differ_are_named_in_a_warning() -> None:
    base = {"w": torch.ones(2), "scale": torch.tensor([3, 4], dtype=torch.int8)}
    tuned = {"w": torch.zeros(2), "scale": torch.tensor([3, 5], dtype=torch.int8)}
    with pytest.warns(UserWarning, match="not in the task vector: scale"):
        vector = TaskVector.from_models(base, tuned)
    assert vector.metadata["moved_buffers"] == ["scale"]


def test_a_difference_of_state_dicts_holds_buffers_and_is_put_on_those_too() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    tuned = copy.deepcopy(base)
    tuned(torch.randn(8, 4))
    with torch.no_grad():
        tuned[0].weight.mul_(1.5)
    vector = TaskVector.from_models(base.state_dict(), tuned.state_dict())
    before = copy.deepcopy(base.state_dict())
    x = torch.randn(3, 4)
    wanted = tuned.eval()(x)
    base.eval()
    with vector.applied(base):
        assert_close(base(x), wanted)
    with talos.ResidentVectors(torch.nn.DataParallel(base), {"a": vector}) as resident:
        resident.swap("a")
        assert_close(base(x), wanted)
    for name, each in base.state_dict().items():
        assert_bit_equal(each, before[name])
    resident = talos.ResidentVectors(base, {"a": vector})
    base[1].running_mean = base[1].running_mean.clone()
    with pytest.raises(TalosRuntimeError, match=r"1\.running_mean replaced by another tensor"):
        resident.swap("a")
    vector.apply_(base)
    assert_close(base(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_copies_of_a_tied_weight_of_any_float_are_compared(dtype: torch.dtype) -> None:
    base = nn.Module()
    base.linear = nn.Linear(2, 2)
    base.one = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    base.two = base.one
    tuned = copy.deepcopy(base)
    tuned.two = nn.Parameter(base.one.detach().clone(), requires_grad=False)
    mask = Mask.from_dense({"linear.weight": torch.ones(2, 2) > 0})
    assert not TaskVector.from_models(base, tuned, mask).values.any()
    tuned.two = nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)
    with pytest.raises(
        TalosValueError, match="one value of one, which is tied in base, got one and two, which"
    ):
        TaskVector.from_models(base, tuned, mask)
