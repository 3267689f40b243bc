"""The lists of tensors and the workloads, beside the libraries that own the models."""

import re
import sys

import open_clip
import pytest
import torch

from benches.shapes import SHAPES
from benches.workload import library_model, make_workload
from talos.params import select_parameters


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_library(name: str) -> None:
    listed = {tensor.name: tensor.shape for tensor in SHAPES[name].tensors}
    with torch.device("meta"):
        model = library_model(name)
    real = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert listed == real


@pytest.mark.parametrize("name", ["minilm", "vit-b-32"])
def test_masks_select_only_query_and_key(name: str) -> None:
    shape = SHAPES[name]
    masks = shape.masks(density=0.6)
    nnz = sum(int(mask.sum()) for mask in masks.values())
    assert nnz == pytest.approx(0.6 * shape.touched_numel, rel=0.01)
    for tensor in shape.touched:
        assert not masks[tensor.name][tensor.query_key_rows :].any()


@pytest.mark.parametrize("name", ["minilm", "vit-b-32"])
def test_a_workload_trains_the_entries_that_the_shapes_list(name: str) -> None:
    made = make_workload(name, batch_size=1, layers=1)
    listed = {
        f"tower.{tensor.name}": tensor.query_key_numel
        for tensor in SHAPES[name].touched
        if re.search(r"\.(layer|resblocks)\.0\.", tensor.name)
    }
    assert made.entries == listed
    assert made.mask.nnz == pytest.approx(0.6 * sum(listed.values()), rel=0.01)


@pytest.mark.parametrize("name", ["vit-b-32", "vit-l-14"])
def test_tokens_are_the_patches_and_the_class(name: str) -> None:
    library_name = {"vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14"}[name]
    vision = open_clip.get_model_config(library_name)["vision_cfg"]
    assert SHAPES[name].tokens == (vision["image_size"] // vision["patch_size"]) ** 2 + 1


@pytest.mark.parametrize("name", ["vit-b-32", "vit-l-14"])
def test_transformers_has_the_tower_where_open_clip_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(tower: torch.nn.Module) -> tuple[int, int, int]:
        selected = select_parameters(tower, "qk")
        numel = sum(param.numel() for param in tower.parameters())
        return numel, sum(each.numel for each in selected.values()), tower.output_dim

    usual = library_model(name, 2)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr("benches.workload.find_spec", lambda package: None)
    other = library_model(name, 2)
    assert type(other) is not type(usual)
    assert sizes(other) == sizes(usual)
    features = other(torch.randn(1, 3, 224, 224))
    assert features.shape == (1, usual.output_dim)


def test_layers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers must lie in \[1, 12\]"):
        library_model("vit-b-32", 13)
