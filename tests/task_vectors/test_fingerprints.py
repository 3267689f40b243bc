"""Fingerprints of weights, and the ledger that spares hashing them again."""

import copy
import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import talos.task_vectors.fingerprints
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from talos.task_vectors.fingerprints import base_fingerprints, fingerprint, fingerprints

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors hashed since the test began."""
    calls: list[Tensor] = []
    original = fingerprint

    def counting(tensor: Tensor) -> str:
        calls.append(tensor)
        return original(tensor)

    monkeypatch.setattr(talos.task_vectors.fingerprints, "fingerprint", counting)
    return calls


def vector_for(model: nn.Module, *, selected: int = 3) -> TaskVector:
    """A vector on the first entries of `weight`, of this model's base."""
    dense = torch.zeros_like(model.weight, dtype=torch.bool)
    dense.view(-1)[:selected] = True
    mask = Mask.from_dense({"weight": dense})
    base = {"weight": fingerprint(model.weight)}
    return TaskVector(mask, torch.full((selected,), 0.1), base)


def test_fingerprint_is_the_hash_it_says() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    expected = hashlib.sha256(b"torch.float32|(2, 3)|" + tensor.numpy().tobytes()).hexdigest()
    assert fingerprint(tensor) == expected[:16]


def test_fingerprint_sees_bits_dtype_and_shape_but_not_strides() -> None:
    tensor = torch.randn(4, 6)
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    assert fingerprint(tensor) != fingerprint(tensor.view(6, 4))
    assert fingerprint(tensor) != fingerprint(tensor.view(torch.int32))
    assert fingerprint(torch.zeros(1)) != fingerprint(-torch.zeros(1))
    assert fingerprint(torch.zeros(())) != fingerprint(torch.zeros(1))
    assert len({fingerprint(tensor.to(dtype)) for dtype in DTYPES}) == 3
    assert len(fingerprint(torch.zeros(0))) == 16


def test_fingerprint_refuses_what_holds_no_values() -> None:
    with pytest.raises(TalosTypeError, match="meta"):
        fingerprint(torch.empty(2, device="meta"))
    with pytest.raises(TalosTypeError, match="sparse"):
        fingerprint(torch.eye(2).to_sparse())


def test_an_untouched_tensor_is_hashed_once(hashed: list[Tensor]) -> None:
    params = {"a": nn.Parameter(torch.randn(5)), "b": nn.Parameter(torch.randn(4, 3).t())}
    first = fingerprints(params)
    assert fingerprints(params) == base_fingerprints(params) == first
    assert first == {name: fingerprint(param) for name, param in params.items()}
    assert len(hashed) == 2


def in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.add_(1.0)


def through_data(param: nn.Parameter) -> None:
    param.data.add_(1.0)


def through_numpy(param: nn.Parameter) -> None:
    param.detach().numpy().ravel()[0] += 1.0


def swapped(param: nn.Parameter) -> None:
    param.data = param.data + 1.0


def swapped_back_to_the_same_address(param: nn.Parameter) -> None:
    address = param.data_ptr()
    for _ in range(50):
        param.data = param.data + 1.0
        if param.data_ptr() == address:
            return


def loaded(param: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = param
    holder.load_state_dict({"weight": torch.randn(param.shape)})


@pytest.mark.parametrize(
    "write",
    [in_place, through_data, through_numpy, swapped, swapped_back_to_the_same_address, loaded],
)
def test_a_write_by_somebody_else_is_noticed(write: Callable[[nn.Parameter], None]) -> None:
    param = nn.Parameter(torch.randn(7))
    before = fingerprints({"w": param})
    write(param)
    assert fingerprints({"w": param}) == {"w": fingerprint(param)}
    assert base_fingerprints({"w": param}) != before


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "upside down": lambda w: w.flip(0),
    "backwards": lambda w: w.flip(0, 1),
    "two rows": lambda w: w[[0, 2, 1, *range(3, len(w))]],
    "neighbours": lambda w: w.view(-1, 2).flip(1).view_as(w),
    "rotated by a row of the checksum": lambda w: w.flatten().roll(
        talos.task_vectors.fingerprints._ROW * 2
    ),
    "permuted": lambda w: w.flatten()[torch.randperm(w.numel())],
    "transposed": lambda w: w.t(),
    "negated": lambda w: -w,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 7, 192])
def test_weights_that_only_changed_places_are_noticed(
    move: str, dtype: torch.dtype, size: int
) -> None:
    if move == "neighbours" and size % 2:
        size += 1
    for base in (torch.randn(size, size), torch.eye(size).roll(1, 1)):
        param = nn.Parameter(base.to(dtype))
        before = fingerprints({"w": param})
        version = param._version
        param.data.copy_(MOVES[move](param.data.clone()).reshape(size, size))
        assert param._version == version
        if fingerprint(param) != before["w"]:
            assert fingerprints({"w": param}) != before


def test_every_single_bit_counts() -> None:
    row = talos.task_vectors.fingerprints._ROW
    words = torch.randint(-(2**62), 2**62, (3 * row + 5,))
    before = fingerprints({"w": words})
    for position in (0, 1, row, len(words) - 1):
        for bit in (0, 31, 32, 63):
            words.numpy()[position] ^= np.int64(1) << np.int64(bit)
            after = fingerprints({"w": words})
            assert after != before, (position, bit)
            before = after


def test_two_highest_bits_count_too() -> None:
    param = nn.Parameter(torch.randn(2 * talos.task_vectors.fingerprints._ROW, dtype=torch.float64))
    before = fingerprints({"w": param})
    param.data[:2].neg_()
    assert fingerprints({"w": param}) != before


@pytest.mark.parametrize("write", [in_place, through_data, through_numpy, swapped, loaded])
def test_a_write_after_our_edit_is_noticed_too(write: Callable[[nn.Parameter], None]) -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    vector.apply_(model)
    write(model.weight)
    with pytest.raises(TalosValueError, match="base"):
        vector.apply_(model)


def test_repeated_application_hashes_once(hashed: list[Tensor]) -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    for scale in torch.linspace(0, 1, 21).tolist():
        with vector.applied(model, scale), vector.applied(model, -scale):
            pass
    vector.apply_(model)
    (-vector).apply_(model)
    with vector.applied(model):
        vector.apply_(model)
    vector.apply_(model)
    assert len(hashed) == 1


def test_an_edited_model_counts_as_its_base_and_is_named_by_its_bits() -> None:
    model = nn.Linear(4, 4)
    params, before = {"w": model.weight}, fingerprint(model.weight)
    vector = vector_for(model)
    vector.apply_(model)
    assert base_fingerprints(params) == {"w": before}
    assert fingerprints(params) == {"w": fingerprint(model.weight)} != {"w": before}
    with vector.applied(model):
        assert base_fingerprints(params) == {"w": before}
    assert base_fingerprints(params) == {"w": before}


def test_after_the_block_the_bits_are_known_again(hashed: list[Tensor]) -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    with vector.applied(model):
        pass
    assert fingerprints({"w": model.weight}) == {"w": vector.fingerprints["weight"]}
    assert len(hashed) == 1


def test_a_block_that_somebody_wrote_in_leaves_no_false_knowledge() -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    with vector.applied(model), torch.no_grad():
        model.weight[3, 3] += 1.0  # not selected: stays
    assert fingerprints({"w": model.weight}) == {"w": fingerprint(model.weight)}
    with pytest.raises(TalosValueError, match="fingerprint"):
        vector.apply_(model)


def test_a_copy_of_an_edited_model_is_another_base() -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    vector.apply_(copy.deepcopy(model))
    vector.apply_(model)
    with pytest.raises(TalosValueError, match="fingerprint"):
        vector.apply_(copy.deepcopy(model))


def test_the_ledger_forgets_tensors_that_are_gone() -> None:
    for _ in range(3):
        fingerprints({str(i): torch.randn(8) for i in range(100)})
    assert len(talos.task_vectors.fingerprints._ledger) < 250


def test_parameters_can_still_be_swapped() -> None:
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    expected = {"a": fingerprint(second), "b": fingerprint(first)}
    fingerprints({"a": first, "b": second})
    torch.utils.swap_tensors(first, second)
    assert fingerprints({"a": first, "b": second}) == expected


def test_inference_tensors_are_always_hashed(hashed: list[Tensor]) -> None:
    with torch.inference_mode():
        params = {"w": torch.randn(3)}
    assert fingerprints(params) == fingerprints(params)
    assert len(hashed) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex128, *DTYPES])
@pytest.mark.parametrize("numel", [0, 1, 3, 8])
def test_every_dtype_and_size(dtype: torch.dtype, numel: int) -> None:
    whole = torch.ones(numel + 1).to(dtype)
    params = {"w": whole[1:]}
    assert fingerprints(params) == fingerprints(params) == {"w": fingerprint(whole[1:])}
