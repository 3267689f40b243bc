"""CLIP models of open_clip as zero-shot classifiers of images.

Only the visual tower is trainable, as in the paper's runs: the text tower makes the head of each
task once, from its class texts, and is frozen with everything else.

open_clip is imported when a model is loaded, never before.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.app.models.base import ZeroShotEncoder, evaluation_mode
from talos.app.models.folders import check_safetensors, hash_files
from talos.errors import TalosError, TalosOSError, TalosValueError

PREFIX = "openclip:"
_INSTALL = 'pip install "talos-sparse[clip]"'
_PREPROCESSING = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "image_interpolation",
    "resize_mode": "image_resize_mode",
}


class ClipEncoder(ZeroShotEncoder):
    """A CLIP model: images to unit vectors, by the visual tower; texts likewise, by the text tower.

    `load_clip` makes one. Only the visual tower's parameters require gradients.

    Args:
        clip: A model of open_clip.
        transform: Turns a PIL image into float32 [3, H, W].
        tokenize: Turns a list of texts into token ids, int64 [B, T].
        name: What was loaded.
        sha256: SHA-256 of the weights' file.
    """

    inputs = ("pixel_values",)
    clip: Any

    def __init__(
        self,
        clip: Any,
        transform: Callable[[Any], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        *,
        name: str,
        sha256: str,
    ) -> None:
        super().__init__()
        clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        self.clip = clip
        self.tokenizer = transform
        self.tokenize = tokenize
        self.name = name
        self.sha256 = sha256
        # A bias, which SigLIP has, is the same for all classes and leaves their softmax as it is.
        self.scale = float(clip.logit_scale.detach().exp())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns the unit vectors of images.

        Args:
            pixel_values: float32 [B, 3, H, W].

        Returns:
            float32 [B, D].
        """
        vectors: Tensor = self.clip.encode_image(pixel_values, normalize=True)
        return vectors.float()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Returns the unit vectors of texts, without dropout and without gradients.

        Args:
            texts: The texts.
            batch_size: Texts per forward pass.

        Returns:
            float32 [len(texts), D] on the encoder's device.
        """
        vectors = []
        with evaluation_mode(self):
            for start in range(0, len(texts), batch_size):
                ids = self.tokenize(list(texts[start : start + batch_size])).to(self.device)
                vectors.append(self.clip.encode_text(ids, normalize=True).float())
        return torch.cat(vectors)


def load_clip(source: str) -> ClipEncoder:
    """Loads a CLIP model of open_clip in float32 and evaluation mode.

    Only safetensors files are read, never pickle.

    Args:
        source: "NAME:WEIGHTS", or the same after "openclip:". NAME is an architecture that
            open_clip knows, WEIGHTS one of its pretrained tags, which is downloaded from the
            Hugging Face hub, or the path of a .safetensors file. OpenAI's own weights in a file
            belong to the architectures that end in -quickgelu.

    Returns:
        The encoder.

    Raises:
        TalosError: open_clip is not installed.
        TalosOSError: The weights cannot be found or downloaded.
        TalosValueError: The architecture or tag is unknown, the file is no safetensors file, or its
            weights do not fit the architecture.
    """
    architecture, _, weights = source.removeprefix(PREFIX).partition(":")
    open_clip = _open_clip()
    if architecture not in open_clip.list_models():
        raise TalosValueError(
            f"source must name an architecture of open_clip, got {architecture!r}; known are "
            f"{', '.join(open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        raise TalosValueError(
            f"source must name weights, got {architecture!r} without; append :TAG (of "
            f"{', '.join(tags) or 'which it has none'}) or :FILE.safetensors"
        )
    options: dict[str, Any] = {}
    if weights in tags:
        tag = open_clip.get_pretrained_cfg(architecture, weights)
        path = _download(f"{architecture}:{weights}", tag)
        options = {ours: tag[key] for key, ours in _PREPROCESSING.items() if key in tag}
        options["force_quick_gelu"] = bool(tag.get("quick_gelu", False))
    else:
        path = _local(weights, tags)
    check_safetensors([path])
    try:
        clip, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=str(path), **options
        )
        tokenize = open_clip.get_tokenizer(architecture)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise TalosValueError(
            f"source must have the weights of {architecture}, got {path}: {error!s:.300}"
        ) from error
    name = f"{PREFIX}{architecture}:{weights if weights in tags else path.name}"
    sha256 = hash_files([path])
    return ClipEncoder(clip.float(), transform, tokenize, name=name, sha256=sha256).eval()


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise TalosError(f"CLIP models need open_clip ({error}); {_INSTALL}") from error
    return open_clip


def _local(weights: str, tags: Sequence[str]) -> Path:
    path = Path(weights).expanduser()
    if path.suffix != ".safetensors":
        raise TalosValueError(
            f"source must name a pretrained tag ({', '.join(tags) or 'there is none'}) or a "
            f".safetensors file, got {weights!r}; pickled weights are never loaded: convert them "
            "with safetensors.torch.save_file"
        )
    if not path.is_file():
        raise TalosOSError(f"source must name an existing file, got {path}; check the path")
    return path


def _download(source: str, tag: dict[str, Any]) -> Path:
    """Fetches the safetensors file of a pretrained tag."""
    repository, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    if not repository:
        raise TalosValueError(
            f"source must have weights on the Hugging Face hub, got {source} without; download "
            "them, convert them to .safetensors and give that file"
        )
    from huggingface_hub import hf_hub_download
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME

    name = Path(file).with_suffix(".safetensors").name if file else HF_SAFE_WEIGHTS_NAME
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # httpx, OSError and validation errors, by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise TalosOSError(
            f"source must have a file {name} that can be downloaded from {repository}, got "
            f"{source} ({reason}); give a .safetensors file where there is no network"
        ) from error
