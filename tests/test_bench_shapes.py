"""The benches' lists of tensors against the libraries that own the models."""

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from benches.shapes import SHAPES


def open_clip_tower(name: str) -> torch.nn.Module:
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    return VisionTransformer(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", 64),
        mlp_ratio=4.0,
        output_dim=config["embed_dim"],
    )


def library_model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        if name == "minilm":
            return BertModel(
                BertConfig(
                    hidden_size=384,
                    num_hidden_layers=6,
                    num_attention_heads=12,
                    intermediate_size=1536,
                )
            )
        if name == "t5-large":
            return T5ForConditionalGeneration(
                T5Config(d_model=1024, d_ff=4096, d_kv=64, num_layers=24, num_heads=16)
            )
        return open_clip_tower({"vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14"}[name])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_library(name: str) -> None:
    listed = {tensor.name: tensor.shape for tensor in SHAPES[name].tensors}
    real = {key: tuple(value.shape) for key, value in library_model(name).named_parameters()}
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
