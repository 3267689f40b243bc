"""Fingerprints of weights, and the records that save hashing them again."""

import copy
import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from talos import Mask, ResidentVectors, TaskVector
from talos.errors import TalosTypeError, TalosValueError
from talos.task_vectors import fingerprints
from talos.task_vectors.fingerprints import base_fingerprints, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors hashed since the test began."""
    calls: list[Tensor] = []

    def counting(tensor: Tensor) -> str:
        calls.append(tensor)
        return fingerprint(tensor)

    monkeypatch.setattr(fingerprints, "fingerprint", counting)
    return calls


def vector_for(model: nn.Module) -> TaskVector:
    """A vector on the first three entries of `weight`, of this model's base."""
    dense = torch.zeros_like(model.weight, dtype=torch.bool)
    dense.view(-1)[:3] = True
    base = {"weight": fingerprint(model.weight)}
    return TaskVector(Mask.from_dense({"weight": dense}), torch.full((3,), 0.1), base)


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


def in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.add_(1.0)


def through_data(param: nn.Parameter) -> None:
    param.data.view(-1)[-1].neg_()


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


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(
    "write",
    [in_place, through_data, through_numpy, swapped, swapped_back_to_the_same_address, loaded],
)
def test_a_write_by_other_code_is_noticed(
    write: Callable[[nn.Parameter], None], edited: bool
) -> None:
    model = nn.Linear(5, 3)
    vector = vector_for(model)
    with vector.applied(model):
        pass
    if edited:
        vector.apply_(model)
    write(model.weight)
    before = model.weight.detach().clone()
    with pytest.raises(TalosValueError, match="model must be the base"):
        vector.apply_(model)
    assert torch.equal(model.weight, before)


def test_edits_of_one_base_stack_and_hash_it_once(hashed: list[Tensor]) -> None:
    model = nn.Linear(4, 4)
    vector, base = vector_for(model), model.weight.detach().clone()
    for scale in torch.linspace(0, 1, 21).tolist():
        with vector.applied(model, scale), vector.applied(model, -scale):
            pass
    assert torch.equal(model.weight, base)
    with vector.applied(model):
        vector.apply_(model)  # lost at the end of the block
    vector.apply_(model)
    vector.apply_(model)
    torch.testing.assert_close(model.weight, base + 2 * vector.to_dense("weight"))
    with ResidentVectors(model, {"a": vector}) as resident:
        resident.swap("a")
        torch.testing.assert_close(model.weight, base + 3 * vector.to_dense("weight"))
    vector.apply_(model, -2.0)
    torch.testing.assert_close(model.weight, base)
    assert base_fingerprints({"weight": model.weight}) == vector.fingerprints
    assert len(hashed) == 1


def test_vectors_made_from_an_edited_model_belong_to_the_edited_weights() -> None:
    model = nn.Linear(4, 4)
    vector, before = vector_for(model), fingerprint(model.weight)
    vector.apply_(model)
    assert base_fingerprints({"w": model.weight}) == {"w": before}
    made = TaskVector.from_models(model, nn.Linear(4, 4))
    assert made.fingerprints["weight"] == fingerprint(model.weight) != before


def test_a_block_that_other_code_wrote_in_leaves_no_false_record() -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    with vector.applied(model), torch.no_grad():
        model.weight[3, 3] += 1.0  # not selected: stays
    with pytest.raises(TalosValueError, match="fingerprint"):
        vector.apply_(model)


def test_blocks_that_end_in_the_wrong_order_leave_no_false_record() -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    first, second = vector.applied(model), vector.applied(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)  # writes the first edit back
    with pytest.raises(TalosValueError, match="fingerprint"):
        vector.apply_(model)


def test_a_copy_of_an_edited_model_is_another_base() -> None:
    model = nn.Linear(4, 4)
    vector = vector_for(model)
    vector.apply_(copy.deepcopy(model))
    vector.apply_(model)
    with pytest.raises(TalosValueError, match="fingerprint"):
        vector.apply_(copy.deepcopy(model))


def test_records_of_tensors_that_are_gone_are_dropped() -> None:
    for _ in range(3):
        base_fingerprints({str(i): torch.randn(8) for i in range(100)})
    assert len(fingerprints._records) < 250


def test_parameters_can_still_be_swapped() -> None:
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    expected = {"a": fingerprint(second), "b": fingerprint(first)}
    base_fingerprints({"a": first, "b": second})
    torch.utils.swap_tensors(first, second)
    assert base_fingerprints({"a": first, "b": second}) == expected


def test_inference_tensors_are_always_hashed(hashed: list[Tensor]) -> None:
    with torch.inference_mode():
        params = {"w": torch.randn(3)}
    assert base_fingerprints(params) == base_fingerprints(params)
    assert len(hashed) == 2


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("numel", [1, 3, 8])
def test_every_dtype_and_size(dtype: torch.dtype, numel: int) -> None:
    params = {"w": torch.ones(numel + 1).to(dtype)[1:], "t": torch.randn(3, 5).to(dtype).t()}
    expected = {name: fingerprint(param) for name, param in params.items()}
    assert base_fingerprints(params) == base_fingerprints(params) == expected
