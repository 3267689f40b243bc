"""The compiled library's CUDA kernels, by the tests of the ops that both backends serve."""

import pytest
import torch

from talos_kernels import _ops
from tests import test_ops as ops

DEVICE = torch.device("cuda")

test_add_delta_and_revert = ops.test_add_delta_and_revert
test_one_adam_step_against_float64 = ops.test_one_adam_step_against_float64
test_skipping_scaling_and_found_inf = ops.test_skipping_scaling_and_found_inf
test_compact_gradients_step_as_dense_ones_do = ops.test_compact_gradients_step_as_dense_ones_do
test_bf16_moments = ops.test_bf16_moments_keep_small_changes_on_average
test_two_runs_are_bit_equal = ops.test_two_runs_are_bit_equal_on_any_number_of_threads


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def implementation() -> str:
    return "op"


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    served = [name for name in _ops.CUDA_BACKENDS if "csrc" in _ops.cuda_backends(name)]
    if not served:
        pytest.skip("the compiled library was built without CUDA")
    for name in served:
        monkeypatch.setitem(_ops.CUDA_BACKENDS, name, "csrc")
