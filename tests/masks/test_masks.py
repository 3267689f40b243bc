"""`talos.Mask`: selection, set algebra on the compressed form, the table, files."""

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from talos.calibration import fisher_diag
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.masks.table import MaskTable
from tests.cases import DENSITIES, SIZES, dense_mask

DENSITY = st.sampled_from([0.0, 0.01, 0.05, 0.07, 0.3, 1.0])
NUMEL = st.sampled_from([1, 97, 2047, 2048, 2049, 70_001])


def random_mask(density: float, numel: int, seed: int) -> torch.Tensor:
    return dense_mask(numel, density, torch.Generator().manual_seed(seed))


def lowest(scores: dict[str, torch.Tensor], k: int) -> np.ndarray:
    """The k lowest of the concatenated scores by a stable sort, in numpy."""
    flat = np.concatenate([score.flatten().numpy() for score in scores.values()])
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[np.argsort(flat, kind="stable")[:k]] = True
    return chosen


def flat(mask: Mask) -> np.ndarray:
    return np.concatenate([mask.to_dense(name).flatten().numpy() for name in mask.names])


@pytest.mark.parametrize("density", [1e-3, 0.1, 0.5, 0.562, 1.0])
def test_from_scores_selects_exactly_the_lowest(density: float) -> None:
    scores = {"a": torch.rand(40, 50), "b": torch.rand(97), "c": torch.rand(3, 4, 5, 6)}
    mask = Mask.from_scores(scores, density)
    entries = sum(score.numel() for score in scores.values())
    assert mask.nnz == round(density * entries)
    np.testing.assert_array_equal(flat(mask), lowest(scores, mask.nnz))


def test_ties_are_taken_in_tensor_and_position_order() -> None:
    scores = {"a": torch.tensor([1.0, 0.0, 1.0]), "b": torch.tensor([1.0, 1.0, 0.0])}
    mask = Mask.from_scores(scores, density=0.5)
    assert flat(mask).tolist() == [True, True, False, False, False, True]


def test_select_highest_is_the_complement_of_the_lowest() -> None:
    scores = {"a": torch.rand(100), "b": torch.rand(100)}
    low, high = Mask.from_scores(scores, 0.3), Mask.from_scores(scores, 0.7, "highest")
    np.testing.assert_array_equal(flat(low), ~flat(high))


def test_rows_bound_the_selection_and_the_count() -> None:
    scores = {"in_proj": torch.rand(9, 4), "b": torch.rand(12)}
    mask = Mask.from_scores(scores, 0.5, rows={"in_proj": (0, 6)})
    assert mask.nnz == round(0.5 * (24 + 12))
    assert not mask.to_dense("in_proj")[6:].any()


def test_scores_of_a_fused_projection_bring_their_rows() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    scores = fisher_diag(Classifier(), [torch.randn(8, 3, 8)], params="qk")
    mask = Mask.from_scores(scores, 0.5)
    assert mask.nnz == round(0.5 * (2 * 8 * 8 + 2 * 8))
    assert not mask.to_dense("attention.in_proj_weight")[16:].any()


def test_scores_of_several_dtypes_select_exactly_k() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            "half": torch.rand(1000, generator=generator).bfloat16(),
            "norm": torch.rand(1000, generator=generator),
        }
        mask = Mask.from_scores(scores, 0.3)
        assert mask.nnz == 600
        flat_scores = {name: score.float() for name, score in scores.items()}
        np.testing.assert_array_equal(flat(mask), lowest(flat_scores, 600))


def test_all_scores_equal_warns_and_still_selects_exactly_k() -> None:
    with pytest.warns(UserWarning, match="scores equal"):
        mask = Mask.from_scores({"a": torch.zeros(10)}, 0.3)
    assert mask.to_dense("a").tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(TalosValueError, match=r"density must lie in \(0, 1\]"):
        Mask.from_scores({"a": torch.rand(10)}, density)


def test_density_that_selects_nothing() -> None:
    with pytest.raises(TalosValueError, match="no weight selected"):
        Mask.from_scores({"a": torch.rand(10)}, 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_bad_score_is_named(bad: float) -> None:
    scores = {"good": torch.rand(3), "bad": torch.tensor([0.0, bad])}
    with pytest.raises(TalosValueError, match=r"scores\['bad'\]"):
        Mask.from_scores(scores, 0.5)


def test_from_dense_accepts_exact_zeros_and_ones_only() -> None:
    assert Mask.from_dense({"a": torch.tensor([0.0, 1.0])}).nnz == 1
    assert Mask.from_dense({"a": torch.tensor([0, 1, 1])}).nnz == 2
    with pytest.raises(TalosValueError, match="bool or exactly 0 and 1"):
        Mask.from_dense({"a": torch.tensor([0.0, 0.5])})
    with pytest.raises(TalosTypeError, match="scores must be a mapping"):
        Mask.from_scores([torch.ones(2)], 0.5)
    with pytest.raises(TalosTypeError, match="floating point"):
        Mask.from_scores({"a": torch.tensor([1, 2])}, 0.5)


def test_from_indices_names_the_tensor_of_a_bad_position() -> None:
    with pytest.raises(TalosValueError, match=r"w: positions must lie in \[0, 4\)"):
        Mask.from_indices({"w": torch.tensor([4])}, {"w": (2, 2)})
    with pytest.raises(TalosValueError, match="w: positions must be strictly ascending"):
        Mask.from_indices({"w": torch.tensor([2, 2])}, {"w": (2, 2)})


@given(NUMEL, DENSITY, DENSITY)
def test_set_algebra_equals_the_dense_one(numel: int, first: float, second: float) -> None:
    a, b = random_mask(first, numel, 1), random_mask(second, numel, 2)
    left, right = Mask.from_dense({"w": a}), Mask.from_dense({"w": b})
    assert torch.equal((left & right).to_dense("w"), a & b)
    assert torch.equal((left | right).to_dense("w"), a | b)
    assert left & right == Mask.from_dense({"w": a & b})
    either = int((a | b).sum())
    assert left.iou(right) == (int((a & b).sum()) / either if either else 1.0)


def test_set_algebra_over_different_tensors() -> None:
    a = Mask.from_dense({"x": torch.tensor([True, False]), "y": torch.tensor([True])})
    b = Mask.from_dense({"y": torch.tensor([True]), "z": torch.tensor([True, True])})
    assert (a & b).names == ("y",)
    assert (a | b).nnz == 4
    assert a.iou(b) == 1 / 4
    with pytest.raises(TalosValueError, match="agree on the shape of x"):
        a & Mask.from_dense({"x": torch.tensor([True])})


def test_equality_hash_and_fingerprint_follow_the_selection() -> None:
    dense = {"w": random_mask(0.3, 97, 0)}
    assert Mask.from_dense(dense) == Mask.from_dense(dense, metadata={"seed": 1})
    assert hash(Mask.from_dense(dense)) == hash(Mask.from_dense(dense))
    both = {"v": torch.ones(3) > 0, **dense}
    swapped = Mask.from_dense(dict(reversed(both.items())))
    assert swapped == Mask.from_dense(both)
    assert hash(swapped) == hash(Mask.from_dense(both))
    other = {"w": ~dense["w"]}
    assert Mask.from_dense(dense) != Mask.from_dense(other)
    assert Mask.from_dense(dense).fingerprint != Mask.from_dense(other).fingerprint


@pytest.mark.parametrize("numel", SIZES)
def test_a_file_gives_back_the_mask(numel: int, tmp_path: Path) -> None:
    dense = {f"d{i}": random_mask(max(d, 0), numel, i) for i, d in enumerate(DENSITIES)}
    mask = Mask.from_dense(dense, metadata={"method": "test", "seed": 3})
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded == mask
    assert loaded.metadata == mask.metadata


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoding": "u16", "nnz": 0, "shape": [2**48]}, "must be smaller"),
        ({"encoding": "full", "nnz": -2, "shape": [-2]}, "must list name, shape, encoding and nnz"),
        ({"encoding": "full", "nnz": 5, "shape": [4]}, "w: must select 5 entries, got 4"),
        ({"encoding": "full", "shape": [4]}, "must list name, shape, encoding and nnz"),
    ],
)
def test_sizes_that_a_file_claims_are_checked_first(change: dict[str, Any], match: str) -> None:
    with pytest.raises(TalosValueError, match=match):
        Mask.from_buffers({}, [{"name": "w", **change}])


def test_rename_changes_names_only() -> None:
    mask = Mask.from_dense(
        {"a.q": torch.eye(2) > 0, "a.k": torch.ones(3) > 0}, metadata={"seed": 3}
    )
    found = mask.rename({r"^(.*q)$": r"base.\1.base_layer", "^": "base."})
    assert found.names == ("base.a.q.base_layer", "base.a.k")
    assert torch.equal(found.to_dense("base.a.q.base_layer"), mask.to_dense("a.q"))
    assert found.metadata == mask.metadata
    assert found.rename({r"^base\.|\.base_layer": ""}) == mask
    with pytest.raises(TalosValueError, match="fit none or only renamed ones: b"):
        mask.rename({"b": "c"})


def test_describe_sums_by_layer_and_type() -> None:
    mask = Mask.from_dense(
        {
            "encoder.layer.0.attention.self.query.weight": torch.ones(4, 4) > 0,
            "encoder.layer.1.attention.self.query.weight": torch.eye(4) > 0,
            "encoder.layer.1.output.dense.bias": torch.zeros(4) > 0,
        }
    )
    table = mask.describe()
    assert isinstance(table, MaskTable)
    assert [(row.kind, row.nnz, row.numel) for row in table.by_kind()] == [
        ("query", 20, 32),
        ("bias", 0, 4),
    ]
    assert len(table.by_layer_and_kind()) == 3
    assert table.total().nnz == mask.nnz
    assert "full+bitmap" in str(table)
    lines = str(mask.describe(layers=True)).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["0", "query"],
        ["1", "query"],
        ["1", "bias"],
    ]
