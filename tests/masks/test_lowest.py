"""The entries that a round of calibration keeps."""

import math

import pytest
import torch

from talos.errors import TalosValueError
from talos.masks.lowest import lowest_entries


@pytest.mark.parametrize("largest", [False, True], ids=["lowest", "largest"])
def test_among_narrows_the_choice(largest: bool) -> None:
    scores = {name: torch.rand(size) for name, size in (("a", (40, 5)), ("b", (0,)), ("c", (97,)))}
    among = {name: torch.rand(score.shape) < 0.6 for name, score in scores.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    allowed = torch.cat([choice.flatten() for choice in among.values()])
    order = flat.masked_fill(~allowed, -1.0 if largest else 2.0).argsort(descending=largest)
    chosen = lowest_entries(scores, 50, among, largest=largest)
    found = torch.cat([each.flatten() for each in chosen.values()])
    assert set(found.nonzero()[:, 0].tolist()) == set(order[:50].tolist())
    assert [each.shape for each in chosen.values()] == [each.shape for each in scores.values()]


def test_what_is_left_out_may_hold_anything() -> None:
    scores = {"w": torch.tensor([math.nan, 2.0, -1.0, 1.0])}
    chosen = lowest_entries(scores, 1, {"w": torch.tensor([False, True, False, True])})
    assert chosen["w"].tolist() == [False, False, False, True]


def test_all_ties_of_the_kth() -> None:
    scores = {"a": torch.tensor([1.0, 0.0, 3.0]), "b": torch.tensor([1.0, 2.0, 1.0])}
    exact = lowest_entries(scores, 2)
    assert [each.tolist() for each in exact.values()] == [[True, True, False], [False] * 3]
    every = lowest_entries(scores, 2, all_ties=True)
    assert [each.tolist() for each in every.values()] == [[True, True, False], [True, False, True]]
    none = lowest_entries({"a": torch.zeros(3)}, 0, all_ties=True)
    assert not none["a"].any()


def test_errors_name_the_tensor_and_the_counts() -> None:
    with pytest.raises(TalosValueError, match=r"scores\['b'\] must be finite and not negative"):
        lowest_entries({"a": torch.ones(2), "b": torch.tensor([math.nan])}, 1)
    with pytest.raises(TalosValueError, match=r"k must be at most 1, .* got 2"):
        lowest_entries({"a": torch.ones(2)}, 2, {"a": torch.tensor([True, False])})
