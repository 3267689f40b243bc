"""CLIP models of transformers as zero-shot classifiers of images: only the image tower trains."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from talos.app.extras import import_package
from talos.app.models.base import ZeroShotEncoder, class_tokens
from talos.app.models.folders import configuration, load_folder, quiet
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TransformersClipEncoder(ZeroShotEncoder):
    """A `CLIPModel`: its image tower maps images to unit vectors, its text tower maps texts.

    `load_encoder` makes one of a folder. Only the image tower and its projection require gradients.

    Args:
        clip: a `CLIPModel` of transformers.
        processor: the image processor that belongs to it.
        text_tokenizer: its tokenizer of class texts.
        name: the source that was loaded.
    """

    talos_wraps = "clip"
    inputs = ("pixel_values",)
    clip: Any

    def __init__(
        self,
        clip: Any,
        processor: Any,
        text_tokenizer: "PreTrainedTokenizerBase",
        *,
        name: str,
    ) -> None:
        super().__init__()
        clip.requires_grad_(False)
        clip.vision_model.requires_grad_(True)
        clip.visual_projection.requires_grad_(True)
        self.clip = clip
        self.processor = processor
        self.tokenizer = self.pixels
        self.text_tokenizer = text_tokenizer
        self.name = name
        self.scale = float(clip.logit_scale.detach().exp())

    def pixels(self, image: Any) -> Tensor:
        """Return a PIL image as the model takes it, float32 [3, H, W]."""
        found: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return found

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the unit vectors of images.

        Args:
            pixel_values: float32 [B, 3, H, W].

        Returns:
            float32 [B, D].
        """
        return _unit(self.clip.get_image_features(pixel_values=pixel_values))

    def embed(self, texts: list[str]) -> Tensor:
        """Return the unit vectors of a few texts, float32 [len(texts), D]."""
        most = self.clip.config.text_config.max_position_embeddings
        encoded = class_tokens(self.text_tokenizer, texts, most).to(self.device)
        return _unit(
            self.clip.get_text_features(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
            )
        )


def _unit(features: Any) -> Tensor:
    """Return features with length 1; older versions of transformers return the tensor alone."""
    found = features if isinstance(features, Tensor) else features.pooler_output
    return nn.functional.normalize(found.float(), dim=-1)


def is_transformers_clip(folder: Path) -> bool:
    """Return whether the configuration of a folder is that of a CLIP of transformers."""
    return configuration(folder).get("model_type") == "clip"


def load_transformers_clip(folder: Path, name: str) -> TransformersClipEncoder:
    """Load the CLIP of a folder; see `talos.app.models.load_encoder`."""
    model, tokenizer = load_folder(folder, "AutoModel", texts=False)
    if not hasattr(model, "visual_projection"):
        raise TalosValueError(
            f"source must be a CLIPModel, with both towers, got a {type(model).__name__} in "
            f"{folder}; save the whole model with save_pretrained"
        )
    transformers = import_package("transformers")
    try:
        with quiet(transformers):
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
        raise TalosValueError(
            f"source must hold an image processor, got {folder} without one that can be loaded "
            f"({error!s:.200}); save the model's processor there with save_pretrained"
        ) from error
    return TransformersClipEncoder(model, processor, tokenizer, name=name).eval()
