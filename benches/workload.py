"""Published architectures with random weights, and the batch and the mask that training takes.

Or a folder of transformers (`pytest benches --model FOLDER`), with its own weights.

CLIP's visual towers and encoders of text answer through a frozen head, an encoder-decoder as it
is. Labels are random, and dropout is off. The mask selects 60 % of the
query and key weights, about a tenth of a model: four rounds of `calibrate` leave nearly all of a
mask there. Where queries and keys cannot be told apart, it selects a tenth of all maskable weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benches.shapes import QK_DENSITY, SHAPES
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.params import Candidates, select_parameters

CLASSES = 64
OPEN_CLIP = {"vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14"}
CLIP_SIZES: dict[str, dict[str, Any]] = {
    "vit-b-32": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 32},
    "vit-l-14": {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14},
}
CLIP_PROJECTION = {"vit-b-32": 512, "vit-l-14": 768}
IDS = (1000, 30000)
SPREAD_DENSITY = 0.1
OWN_TOKENS = 48

Batch = dict[str, Tensor]  # each [B, ...]


class Answering(nn.Module):
    """Maps a batch to logits: `[B, C]` through a frozen head, or T5's own `[B, T, V]`."""

    head: Tensor

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.eval()
        width = width_of(tower)
        head = None if width is None else torch.randn(width, CLASSES) / width**0.5
        self.register_buffer("head", head)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor
        if "images" in batch:
            logits = self.tower(batch["images"]) @ self.head
        elif "decoder_input_ids" in batch:
            ids = {name: batch[name] for name in ("input_ids", "decoder_input_ids")}
            logits = self.tower(**ids, use_cache=False).logits
        else:
            states = self.tower(input_ids=batch["input_ids"]).last_hidden_state
            logits = states.mean(1) @ self.head
        return logits

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.logits(batch)


def width_of(tower: Any) -> int | None:
    """Return the size of a tower's features; None for an encoder-decoder, which gives logits."""
    if hasattr(tower, "output_dim"):
        return int(tower.output_dim)
    return None if tower.config.is_encoder_decoder else int(tower.config.hidden_size)


@dataclass(frozen=True)
class Workload:
    """A model and a batch, the same for every form of fine-tuning; each trains it in place.

    Attributes:
        name: a key of `SHAPES`, or a folder or hub name of transformers.
        model: maps a batch to logits.
        batch: the model's inputs.
        labels: int64 `[B]` or `[B, T]`.
        mask: what TaLoS trains.
        entries: of each tensor of the mask, the entries in rows that may hold selected ones.
        dtype: float32, or bfloat16: fp32 weights under autocast.
    """

    name: str
    model: nn.Module
    batch: Batch
    labels: Tensor
    mask: Mask
    entries: dict[str, int]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @staticmethod
    def logits(module: nn.Module, batch: Any) -> Tensor:
        """Call a module as `logits_fn` of talos does."""
        logits: Tensor = module(batch)
        return logits

    def loss(self, module: nn.Module, logits_fn: Any) -> Tensor:
        """Return the mean cross entropy of the labels."""
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
    """Make a model, its batch and its mask; always the same ones."""
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:  # a large model's random weights take a CPU longer than all that follows
            tower = library_model(name, layers) if name in SHAPES else own_model(name).to(device)
            config = None if name in SHAPES else getattr(tower, "config", None)
            batch = inputs_of(name, batch_size, tokens, config)
            model = Answering(tower)
            labels = torch.randint(CLASSES, (batch_size,))
            if "decoder_input_ids" in batch:
                labels = torch.randint_like(batch["decoder_input_ids"], *_ids(config))
        masks, entries = {}, {}
        candidates, density = _candidates(model)
        for key, each in candidates.items():
            if each.param.dim() < 2:
                continue
            start, end = each.rows or (0, len(each.param))
            mask = masks[key] = torch.zeros(each.param.shape, dtype=torch.bool)
            mask[start:end] = torch.rand(mask[start:end].shape) < density
            entries[key] = mask[start:end].numel()
    return Workload(name, model, batch, labels, Mask.from_dense(masks), entries, dtype)


def _candidates(model: nn.Module) -> tuple[Candidates, float]:
    """Return queries and keys, or where there are none all maskable weights, and a density."""
    try:
        return select_parameters(model, "qk"), QK_DENSITY
    except TalosValueError:
        return select_parameters(model), SPREAD_DENSITY


def inputs_of(name: str, batch_size: int, tokens: int | None = None, config: Any = None) -> Batch:
    """Return random inputs; texts have `tokens` tokens, an encoder-decoder's answers a quarter.

    `config` is that of a model that is not in `SHAPES`.
    """
    size = 224 if config is None else getattr(config, "image_size", None)
    if name in OPEN_CLIP or (config is not None and size is not None):
        return {"images": torch.randn(batch_size, getattr(config, "num_channels", 3), size, size)}
    tokens = tokens or (SHAPES[name].tokens if config is None else OWN_TOKENS)
    batch = {"input_ids": torch.randint(*_ids(config), (batch_size, tokens))}
    if name == "t5-large" or getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(*_ids(config), (batch_size, max(1, tokens // 4)))
    return batch


def _ids(config: Any) -> tuple[int, int]:
    """Return the range of random tokens."""
    return IDS if config is None else (0, int(config.vocab_size))


def own_model(source: str) -> nn.Module:
    """Load a model of transformers: a folder, or a name on the hub.

    Raises:
        ValueError: it takes something else than one image or one text.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    if hasattr(config, "text_config") or hasattr(config, "vision_config"):
        raise ValueError(f"--model must take images or texts, got {source}, which takes both")
    if hasattr(config, "image_size"):
        return _TransformersTower(transformers.AutoModel.from_pretrained(source))
    name = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModel"
    model: nn.Module = getattr(transformers, name).from_pretrained(source, use_cache=False)
    return model


def library_model(name: str, layers: int | None = None) -> nn.Module:
    """Return a published architecture as its library makes it, with random weights.

    `layers` shortens each stack. Of CLIP this is open_clip's `VisionTransformer`; where open_clip
    is not installed, transformers' tower of the same shape.
    """
    full = SHAPES[name].layers
    if layers is not None and not 1 <= layers <= full:
        raise ValueError(f"layers must lie in [1, {full}] of {name}, got {layers}")
    if name not in OPEN_CLIP:
        return _text_model(name, layers or full)
    if find_spec("open_clip") is None:
        return _transformers_tower(name, layers or full)
    return _open_clip_tower(name, layers or full)


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
        model = transformers.BertModel(bert, add_pooling_layer=False)
    else:
        t5 = transformers.T5Config(
            d_model=1024, d_ff=4096, d_kv=64, num_layers=layers, num_heads=16
        )
        model = transformers.T5ForConditionalGeneration(t5)
    return model


def _open_clip_tower(name: str, layers: int) -> nn.Module:
    import open_clip
    from open_clip.transformer import VisionTransformer

    config: dict[str, Any] = open_clip.get_model_config(OPEN_CLIP[name])
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


def _transformers_tower(name: str, layers: int) -> nn.Module:
    """Return transformers' visual tower of CLIP."""
    import transformers

    sizes = CLIP_SIZES[name]
    config = transformers.CLIPVisionConfig(
        num_hidden_layers=layers,
        intermediate_size=4 * sizes["hidden_size"],
        projection_dim=CLIP_PROJECTION[name],
        hidden_act="gelu",
        **sizes,
    )
    return _TransformersTower(transformers.CLIPVisionModelWithProjection(config))


class _TransformersTower(nn.Module):
    """A tower of transformers, called as open_clip's is: images to features."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.projects = hasattr(model, "visual_projection")
        width = self.config.projection_dim if self.projects else self.config.hidden_size
        self.output_dim: int = width

    def forward(self, images: Tensor) -> Tensor:
        made = self.model(pixel_values=images)
        features: Tensor = made.image_embeds if self.projects else made.last_hidden_state.mean(1)
        return features
