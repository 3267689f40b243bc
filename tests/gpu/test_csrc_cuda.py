"""The compiled library's CUDA kernels on a device, by the tests that run them without one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from talos_kernels import _ops
from tests.kernels import test_csrc as csrc
from tests.kernels import test_csrc_cuda

test_sparse_adam = csrc.test_sparse_adam_is_the_references
test_every_instance = csrc.test_every_instance_is_the_references
test_compact_gradients = csrc.test_compact_gradients_beside_dense_ones
test_skipping = csrc.test_what_has_no_gradient_is_not_counted_and_nothing_is_on_inf
test_counting = csrc.test_steps_count_where_nothing_is_selected
test_many_tensors = csrc.test_more_tensors_than_a_launch_takes
test_add_delta = csrc.test_add_delta_is_the_references
test_damaged_index = test_csrc_cuda.test_a_damaged_index_reaches_no_other_memory
test_refused_arguments = csrc.test_arguments_are_refused_before_anything_is_written


@pytest.fixture
def op() -> csrc.Ops:
    """The library's ops on copies of the arguments on a device, copied back afterwards."""
    if "csrc" not in _ops.cuda_backends("sparse_adam_"):
        pytest.skip("the compiled library was built without CUDA")

    def on_device(name: str) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            moved = tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, (args, kwargs))
            getattr(torch.ops.talos_C, name)(*moved[0], **moved[1])
            for ours, theirs in zip(tree_leaves((args, kwargs)), tree_leaves(moved), strict=True):
                if isinstance(ours, Tensor):
                    ours.copy_(theirs)

        return call

    return on_device
