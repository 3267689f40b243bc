"""Backbones of DINOv2's layout in ONNX files that torch exported: their weights, renamed.

Only the weights of the file are read. transformers' own `Dinov2Model` computes with them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.app.extras import import_package
from talos.app.models.folders import whole_model
from talos.app.models.vision import VisionEncoder
from talos.errors import TalosValueError

__all__ = ["load_dinov2_onnx"]

SIZE = 112  # 8 x 8 patches; the positions are interpolated
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in the package
_HEAD_WIDTH = 64  # of every DINOv2
_PREFIX = "backbone."
_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_dinov2_onnx(path: Path, name: str) -> VisionEncoder:
    """Load the backbone of an ONNX file in float32 and evaluation mode.

    Args:
        path: the file; the names of its weights begin with `backbone.`.
        name: the source that is loaded.

    Raises:
        TalosRuntimeError: onnx or transformers is not installed.
        TalosValueError: the file is no ONNX file or holds no such backbone.
    """
    onnx, transformers = import_package("onnx"), import_package("transformers")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        tensors = {
            each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
            for each in graph.initializer
        }
        state = _state(graph, tensors)
        projection = state["embeddings.patch_embeddings.projection.weight"]
        width, _, patch, _ = projection.shape
        places = state["embeddings.position_embeddings"].shape[1] - 1
        config = transformers.Dinov2Config(
            hidden_size=width,
            num_hidden_layers=sum(own.endswith(".layer_scale1.lambda1") for own in state),
            num_attention_heads=width // _HEAD_WIDTH,
            mlp_ratio=len(state["encoder.layer.0.mlp.fc1.bias"]) // width,
            patch_size=patch,
            image_size=round(places**0.5) * patch,
            use_mask_token=False,  # nothing is masked, and the file has none
        )
    except Exception as error:  # the reader raises any error over a damaged file
        raise TalosValueError(
            f"source must be an ONNX file with a backbone of DINOv2's layout, got {path}: "
            f"{error!s:.200}; install its package again"
        ) from error
    model = whole_model("Dinov2Model", None, path, config=config, state_dict=state)
    return VisionEncoder(model, SIZE, MEAN, STD, name=name).eval()


def _state(graph: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by the names of transformers.

    The weight of a linear layer has no name and is transposed: it is the one whose product the bias
    is added to. The positions are in two parts: that of the class token, and a square.
    """
    state = {name: each for name, each in tensors.items() if name.startswith(_PREFIX)}
    products: dict[str, str] = {}
    token = square = None
    for node in graph.node:
        known = [each for each in node.input if each in tensors]
        if node.op_type == "MatMul" and known:
            products[node.output[0]] = known[0]
        elif node.op_type == "Add" and len(known) == 1 and known[0] in state:
            others = [products[each] for each in node.input if each in products]
            if others:
                weight = known[0].removesuffix(".bias") + ".weight"
                state[weight] = tensors[others[0]].T.contiguous()
        elif node.op_type == "Concat" and known and known[0] not in state:
            token = tensors[known[0]]
        elif node.op_type == "Reshape" and known and known[0] not in state:
            square = tensors[known[0]]
    if token is None or square is None:
        raise ValueError("it has no embeddings of positions")
    state[f"{_PREFIX}embeddings.position_embeddings"] = torch.cat([token, square], 1)
    return {_renamed(name.removeprefix(_PREFIX)): each for name, each in state.items()}


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name
