"""The benches' lists of tensors against the libraries that own the models."""

import open_clip
import pytest
import torch

from benches.shapes import SHAPES
from talos.app.costs import library_model


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_library(name: str) -> None:
    listed = {tensor.name: tensor.shape for tensor in SHAPES[name].tensors}
    with torch.device("meta"):
        model = library_model(name)
    real = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert listed == real


@pytest.mark.parametrize(
    ("name", "touched"),
    [("minilm", 12), ("vit-b-32", 12), ("vit-l-14", 24), ("t5-large", 144)],
)
def test_touched_tensors_are_those_of_query_and_key(name: str, touched: int) -> None:
    assert len(SHAPES[name].touched) == touched


@pytest.mark.parametrize("name", ["minilm", "vit-b-32"])
def test_masks_select_only_query_and_key(name: str) -> None:
    shape = SHAPES[name]
    masks = shape.masks(density=0.6)
    nnz = sum(int(mask.sum()) for mask in masks.values())
    assert nnz == pytest.approx(0.6 * shape.touched_numel, rel=0.01)
    for tensor in shape.touched:
        assert not masks[tensor.name][tensor.query_key_rows :].any()


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("minilm", {(384, 384), (1536, 384), (384, 1536)}),
        ("vit-b-32", {(2304, 768), (768, 768), (3072, 768), (768, 3072)}),
        ("vit-l-14", {(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)}),
        ("t5-large", {(1024, 1024), (4096, 1024), (1024, 4096)}),
    ],
)
def test_linears_are_the_matrices_of_the_blocks(name: str, linears: set[tuple[int, int]]) -> None:
    assert set(SHAPES[name].linears) == linears


@pytest.mark.parametrize("name", ["vit-b-32", "vit-l-14"])
def test_tokens_are_the_patches_and_the_class(name: str) -> None:
    library_name = {"vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14"}[name]
    vision = open_clip.get_model_config(library_name)["vision_cfg"]
    assert SHAPES[name].tokens == (vision["image_size"] // vision["patch_size"]) ** 2 + 1
