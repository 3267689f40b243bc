"""The overlap of masks against sets of positions."""

import pytest
import torch

from talos import Mask
from talos.errors import TalosValueError
from talos.evaluation.similarity import mask_similarity
from tests.cases import assert_close, dense_mask


def test_iou_is_that_of_sets() -> None:
    draw = torch.Generator().manual_seed(0)
    dense = {
        task: {"a": dense_mask(97, density, draw), "b": dense_mask(4000, density / 20, draw)}
        for task, density in (("x", 0.6), ("y", 0.4), ("z", 0.0))
    }
    found = mask_similarity({task: Mask.from_dense(each) for task, each in dense.items()})
    assert found.tasks == ("x", "y", "z")
    sets = [
        {(name, int(i)) for name, each in own.items() for i in each.nonzero()[:, 0]}
        for own in dense.values()
    ]
    expected = [[len(a & b) / len(a | b) if a | b else 1.0 for b in sets] for a in sets]
    assert found.iou.tolist() == expected


def test_random_masks_overlap_as_by_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    masks = {
        task: Mask.from_dense({"a": dense_mask(2_000_000, density, draw)})
        for task, density in (("x", 0.1), ("y", 0.3))
    }
    found = mask_similarity(masks)
    assert_close(found.iou, found.by_chance, reduction=True, dtype=torch.float16)
    assert found.by_chance[0, 1] < 0.1


def test_no_masks_or_other_shapes_are_refused() -> None:
    with pytest.raises(TalosValueError, match="masks must hold at least one mask"):
        mask_similarity({})
    masks = {str(n): Mask.from_dense({"a": torch.ones(n) > 0}) for n in (2, 3)}
    with pytest.raises(TalosValueError, match="masks must agree on the shape of a"):
        mask_similarity(masks)
