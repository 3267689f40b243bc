"""A tensor of more than 2^31 entries, in pages that the system makes when they are written."""

import mmap
import sys

import pytest
import torch
from torch import Tensor

from talos_kernels import Index, TensorIndex, add_delta_, gather_grad_, sparse_adam_

SIZE = 2**31 + 70_000
WHERE = torch.tensor([0, 2**31 - 1, 2**31, SIZE - 1])


def untouched() -> Tensor:
    """Zeros that take no memory until they are written."""
    return torch.frombuffer(mmap.mmap(-1, 2 * SIZE), dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="needs pages that are made when written")
def test_entries_on_both_sides_of_two_to_the_31_are_written_and_no_other() -> None:
    index = Index.pack([TensorIndex.from_positions(WHERE, SIZE)])
    param, grad = untouched(), untouched()
    near = torch.cat([WHERE[:3] + 1, WHERE[1:] - 1])
    param[near] = 7  # the neighbours, but for those that are selected
    param[WHERE] = torch.arange(1.0, 5.0).bfloat16()
    grad[WHERE] = torch.tensor([1.0, -1.0, 2.0, -2.0]).bfloat16()
    before = param[near].clone()

    gathered = torch.zeros(4)
    gather_grad_(gathered, [grad], index)
    assert gathered.tolist() == [1, -1, 2, -2]

    saved = torch.zeros(4, dtype=torch.bfloat16)
    add_delta_([param], index, torch.tensor([10.0, 20.0, 30.0, 40.0]), saved=saved)
    assert saved.tolist() == [1, 2, 3, 4]
    assert param[WHERE].tolist() == [11, 22, 33, 44]

    moments, steps = (torch.zeros(4), torch.zeros(4)), torch.zeros(1)
    sparse_adam_([param], [grad], index, *moments, steps, lr=1.0)
    assert param[WHERE].tolist() == [10, 23, 32, 45]  # the first step of Adam is lr x sign
    others = ~torch.isin(near, WHERE)
    assert torch.equal(param[near][others], before[others])
    assert others.sum() == 4
