"""`talos.tensors`: the one walk over nested tensors, and what the benches add to it."""

from collections import OrderedDict, defaultdict

import torch
from torch.testing._internal.two_tensor import TwoTensor

from benches.iterations import stored_in
from talos.tensors import tensors_in


def test_nested_tensors_come_in_order_and_whole() -> None:
    first, both = torch.zeros(1), TwoTensor(torch.zeros(2), torch.ones(2))
    state = defaultdict(dict, {first: {"step": first, "none": None}, "x": OrderedDict(a=(both,))})
    found = list(tensors_in([state, "text", 3, {torch.zeros(3)}]))
    assert [id(each) for each in found] == [id(first), id(both)]


def test_memory_is_kept_in_the_parts_of_a_tensor_that_is_made_of_others() -> None:
    inner = TwoTensor(torch.zeros(2), torch.ones(2))
    outer = TwoTensor(inner, TwoTensor(torch.full((2,), 2.0), torch.full((2,), 3.0)))
    found = list(stored_in({"a": [outer], "b": torch.full((2,), 4.0)}))
    assert [type(each) for each in found] == [torch.Tensor] * 5
    assert [each[0].item() for each in found] == [0.0, 1.0, 2.0, 3.0, 4.0]
