"""Resident task vectors against `TaskVector.applied`; they copy nothing and refuse changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from talos import Mask, ResidentVectors, TaskVector
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.task_vectors import editing
from talos.task_vectors.fingerprints import fingerprint
from tests.cases import assert_bit_equal
from tests.task_vectors.test_task_vectors import (
    SHAPES,
    Model,
    Tied,
    assert_same_bits,
    bits,
    mask_of,
    vector_of,
)

NAMES = tuple(SHAPES)


def vectors_for(model: nn.Module) -> dict[str, TaskVector]:
    """Every pair of encodings meets in some tensor; `b` lacks the first, `c` selects few."""
    return {
        "a": vector_of(mask_of((1.0, 0.6, 0.1, 0.01), 1), 1, model),
        "b": vector_of(mask_of((0.0, 0.1, 0.01, 0.02), 2, NAMES[1:]), 2, model),
        "c": vector_of(mask_of((0.0, 0.0, 1.0, 0.0), 3), 3, model).astype(torch.bfloat16),
    }


def mixed_model() -> Model:
    """Three dtypes, one weight that is not row-major."""
    model = Model()
    model.layers[2].data = model.layers[2].data.t().contiguous().t()
    model.layers[1].data = model.layers[1].data.bfloat16()
    model.layers[3].data = model.layers[3].data.half()
    return model


STEPS = (
    ("a", 0.4), ("b", 1.0), ("a", 0.4), ("a", -2.0), ("c", 1.0), ("c", 0.0), ("b", 0.1),
    (None, 1.0), (None, 1.0), ("c", 3.0), ("a", 0.4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.float32, torch.no_grad),
        (torch.bfloat16, torch.inference_mode),
        (torch.float16, torch.enable_grad),
        (None, torch.no_grad),
    ],
    ids=str,
)
def test_every_swap_is_the_vector_alone_on_the_base(
    dtype: torch.dtype | None, mode: type, device: torch.device
) -> None:
    model = (mixed_model() if dtype is None else Model(dtype)).to(device)
    vectors, before = vectors_for(model), bits(model)
    expected = {}
    for name, scale in STEPS:
        if name is not None:
            with vectors[name].applied(model, scale):
                expected[name, scale] = bits(model)
    with mode(), ResidentVectors(model, vectors) as resident:
        assert resident.active is None
        for name, scale in STEPS:
            resident.swap(name, scale)
            assert resident.active == name
            assert_same_bits(model, before if name is None else expected[name, scale])
    assert_same_bits(model, before)
    vectors["a"].apply_(model)  # the base is known again, by its fingerprint


def test_an_exception_restores_the_base() -> None:
    model = Model(torch.bfloat16)
    before = bits(model)

    def interrupted() -> None:
        with ResidentVectors(model, vectors_for(model)) as resident:
            resident.swap("a", 3.0)
            resident.swap("b")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same_bits(model, before)


class Watch(TorchDispatchMode):
    """Counts the launches of ours, and the entries of every other operation's largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "talos":
            self.launches.append(func._schema.name.removeprefix("talos::"))
        elif not func.is_view:
            outputs = result if isinstance(result, list | tuple) else [result]
            sizes = [each.numel() for each in (*args, *outputs) if isinstance(each, Tensor)]
            self.largest = max([self.largest, *sizes])
        return result


def test_a_search_of_21_points_copies_and_allocates_nothing() -> None:
    model = Model(torch.bfloat16)
    vectors = vectors_for(model)
    before = bits(model)
    places = [param.data_ptr() for param in model.parameters()]
    with ResidentVectors(model, vectors) as resident:
        with Watch() as watch:
            for point in range(21):
                resident.swap("a", scale=point / 20)
            resident.swap("b")
            resident.swap(None)
        assert watch.launches == ["add_delta_", *["scatter_", "add_delta_"] * 21, "scatter_"]
        assert watch.largest == 0
        assert [param.data_ptr() for param in model.parameters()] == places
    assert_same_bits(model, before)
    with Watch() as watch, vectors["a"].applied(model):
        pass
    assert watch.largest > 0, "a watch that sees nothing proves nothing"


@pytest.mark.gpu
def test_a_swap_never_waits_for_the_device() -> None:
    model = Model(torch.bfloat16).cuda()
    with ResidentVectors(model, vectors_for(model)) as resident:
        for name in ("a", "b", "a", "a", None):  # compiles
            resident.swap(name)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for name in ("a", "b", "a", "a", None):
                resident.swap(name)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_is_held() -> None:
    model = Model(torch.bfloat16)
    mask = mask_of((1.0, 0.6, 0.1, 0.01), 1)
    one = vector_of(mask, 1, model)
    alone = ResidentVectors(model, {"one": one}).nbytes
    values, saved = 4 * mask.nnz, 2 * mask.nnz
    index = alone - values - saved
    assert 0 < index < 2 * mask.nbytes
    # another vector of the mask: its values, no index and no room for bits of its own
    many = {f"{i}": vector_of(mask, i, model) for i in range(4)}
    assert ResidentVectors(model, many).nbytes == 4 * values + saved + index


def test_tied_weights_by_either_name_and_wrappers() -> None:
    model = Tied()
    before = model.head.weight.detach().clone()
    mask = torch.ones(5, 3) > 0
    vectors = {
        name: TaskVector(Mask.from_dense({name: mask}), torch.full((15,), value))
        for name, value in (("embedding.weight", 1.0), ("head.weight", 2.0))
    }
    with ResidentVectors(nn.DataParallel(model), vectors) as resident:
        resident.swap("embedding.weight")
        assert torch.equal(model.head.weight, before + 1)
        resident.swap("head.weight")
        assert torch.equal(model.embedding.weight, before + 2)
    assert_bit_equal(model.head.weight, before)


def _write(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].mul_(2)


def _replace(model: Model) -> None:
    model.layers[1] = nn.Parameter(model.layers[1].detach().clone())


def _swap_storage(model: Model) -> None:
    model.layers[1].data = model.layers[1].data.clone()


def _resize(model: Model) -> None:
    model.layers[1].data = model.layers[1].data[:50]


def _apply(model: Model) -> None:
    mask = Mask.from_dense({"layers.1": torch.ones(97) > 0})
    TaskVector(mask, torch.ones(97)).apply_(model)


@pytest.mark.parametrize("on", [None, "a"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_write, r"layers\.1 with another version, so other code wrote it"),
        (_replace, r"layers\.1 replaced by another tensor"),
        (_swap_storage, r"layers\.1 with another storage"),
        (_resize, r"layers\.1 with another shape"),
        (_apply, r"layers\.1 with another version"),
        (Model.double, r"layers\.0 with another dtype and 3 more"),
    ],
)
def test_a_change_by_other_code_is_refused(
    change: Callable[[Model], object], match: str, on: str | None
) -> None:
    model = Model()
    resident = ResidentVectors(model, vectors_for(model))
    resident.swap(on, 0.5)
    change(model)
    changed = bits(model)
    remedy = "make ResidentVectors anew" if on is None else "load the weights again"
    for name in ("a", "b", None):
        with pytest.raises(TalosRuntimeError, match=f"{match}.*{remedy}"):
            resident.swap(name)
        assert_same_bits(model, changed)
    assert resident.active == on
    with pytest.raises(TalosRuntimeError, match=match), resident:
        pass


def test_what_no_vector_touches_may_be_written() -> None:
    model = Model()
    vector = vector_of(mask_of((0.0, 0.6, 0.0, 0.0), 1), 1, model)
    with ResidentVectors(model, {"a": vector}) as resident:
        resident.swap("a")
        with torch.no_grad():
            model.layers[0].fill_(5.0)
        resident.swap("a", 2.0)
    assert model.layers[0].tolist() == [5.0]


def test_a_launch_that_fails_leaves_what_was_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_model()
    resident = ResidentVectors(model, vectors_for(model))
    resident.swap("a", 0.5)
    before, add, calls = bits(model), editing.add_delta_, []

    def fails_once(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        add(*args, **kwargs)

    monkeypatch.setattr(editing, "add_delta_", fails_once)
    with pytest.raises(MemoryError):
        resident.swap("b")
    assert resident.active == "a"
    assert_same_bits(model, before)
    resident.swap("b")
    assert resident.active == "b"


def test_refusals_come_before_the_first_write() -> None:
    model, other = Model(), Model(seed=1)
    vectors = vectors_for(model)
    before = bits(other)
    with pytest.raises(TalosValueError, match=r"must be the base .* got layers\.\d"):
        ResidentVectors(other, vectors)
    ResidentVectors(other, vectors, force=True).swap(None)
    with pytest.raises(TalosValueError, match="at least one task vector, got none"):
        ResidentVectors(model, {})
    with pytest.raises(TalosTypeError, match=r"must be a torch\.nn\.Module"):
        ResidentVectors(bits(model), vectors)
    strange = TaskVector(Mask.from_dense({"x": torch.ones(1) > 0}), torch.ones(1))
    with pytest.raises(TalosValueError, match="parameters of the model, got 1 that it lacks"):
        ResidentVectors(model, {**vectors, "strange": strange})
    resident = ResidentVectors(model, vectors)
    with pytest.raises(TalosValueError, match="one of a, b, c or None, got d"):
        resident.swap("d")
    with pytest.raises(TalosValueError, match="scale must be finite"):
        resident.swap("a", float("nan"))
    with pytest.raises(TalosTypeError, match="scale must be a real number"):
        resident.swap("a", "1")
    assert_same_bits(other, before)
    assert_same_bits(model, dict(Model().named_parameters()))


def test_other_vectors_refuse_a_model_while_one_is_on() -> None:
    model = Model()
    vectors = vectors_for(model)
    base = fingerprint(model.layers[0])
    with ResidentVectors(model, vectors) as resident:
        resident.swap("a")
        with pytest.raises(TalosValueError, match="model must be the base"):
            ResidentVectors(model, vectors)
        with pytest.raises(TalosValueError, match="model must be the base"):
            vectors["b"].apply_(model)
    assert fingerprint(model.layers[0]) == base


@pytest.mark.parametrize("vectors", [[], ["a"], {"a": 1}, {1: None}], ids=str)
def test_vectors_are_a_mapping_of_names(vectors: Any) -> None:
    with pytest.raises((TalosTypeError, TalosValueError), match="vectors must"):
        ResidentVectors(torch.nn.Linear(2, 2), vectors)
