"""CLIP models of open_clip as zero-shot classifiers of images.

Only the visual tower is trainable, as in the paper's runs. The text tower makes the head of each
task once, from its class texts, and is frozen with everything else.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from talos.app.extras import import_package
from talos.app.models.base import ZeroShotEncoder
from talos.app.models.folders import first_line
from talos.app.nearest import beside, did_you_mean, several
from talos.errors import TalosOSError, TalosValueError
from talos.files import Checkpoint

PREFIX = "openclip:"
CONFIG_FILE = "open_clip_config.json"
_PREPROCESSING = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "image_interpolation",
    "resize_mode": "image_resize_mode",
}
_KEYS = ("embed_dim", "vision_cfg", "text_cfg")


class ClipEncoder(ZeroShotEncoder):
    """A CLIP model: the visual tower maps images to unit vectors, the text tower maps texts.

    `load_clip` makes one. Only the visual tower's parameters require gradients.

    Args:
        clip: a model of open_clip.
        transform: turns a PIL image into float32 [3, H, W].
        tokenize: turns a list of texts into token ids, int64 [B, T].
        name: the source that was loaded.

    Attributes:
        config: what open_clip's own configuration file of the model holds.
    """

    talos_wraps = "clip"
    inputs = ("pixel_values",)
    clip: Any
    config: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        clip: Any,
        transform: Callable[[Any], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        *,
        name: str,
    ) -> None:
        super().__init__()
        clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        self.clip = clip
        self.tokenizer = transform
        self.tokenize = tokenize
        self.name = name
        # A bias, which SigLIP has, is the same for all classes and leaves their softmax as it is.
        self.scale = float(clip.logit_scale.detach().exp())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the unit vectors of images.

        Args:
            pixel_values: float32 [B, 3, H, W].

        Returns:
            float32 [B, D].
        """
        vectors: Tensor = self.clip.encode_image(pixel_values, normalize=True)
        return vectors.float()

    def embed(self, texts: list[str]) -> Tensor:
        """Return the unit vectors of a few texts, float32 [len(texts), D]."""
        ids = self.tokenize(texts).to(self.device)
        vectors: Tensor = self.clip.encode_text(ids, normalize=True)
        return vectors.float()


def load_clip(source: str) -> ClipEncoder:
    """Load a CLIP model of open_clip in float32 and evaluation mode.

    Only safetensors files are read, never pickle.

    Args:
        source: "NAME:WEIGHTS", or the same after "openclip:". NAME is an architecture of
            open_clip, or a .json file of one, as open_clip keeps and saves them. WEIGHTS is one of
            its pretrained tags, which is downloaded from the Hugging Face hub, or the path of a
            .safetensors file. OpenAI's own weights in a file belong to the architectures that end
            in -quickgelu.

    Returns:
        The encoder.

    Raises:
        TalosRuntimeError: open_clip is not installed.
        TalosOSError: the weights cannot be found or downloaded.
        TalosValueError: the architecture or tag is unknown, the file is not a safetensors file, or
            its weights do not fit the architecture.
    """
    named, _, weights = source.removeprefix(PREFIX).partition(":")
    open_clip = import_package("open_clip")
    architecture, options = named, dict[str, Any]()
    if named.endswith(".json"):
        architecture, preprocessing = _own_architecture(Path(named).expanduser())
        options = _preprocessing(preprocessing)
    if architecture not in open_clip.list_models():
        raise TalosValueError(
            f"source must name an architecture of open_clip or a .json file of one, got "
            f"{architecture!r}; the nearest are {several(open_clip.list_models(), architecture)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        raise TalosValueError(
            f"source must name weights, got {named!r} without; append :TAG (of "
            f"{several(tags) or 'which it has none'}) or :FILE.safetensors"
        )
    if weights in tags:
        tag = open_clip.get_pretrained_cfg(architecture, weights)
        path = _download(f"{architecture}:{weights}", tag)
        options = _preprocessing(tag)
        options["force_quick_gelu"] = bool(tag.get("quick_gelu", False))
    else:
        path = _local(weights, tags)
    Checkpoint(path)  # refuses other files, whatever their names are
    try:
        clip, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=str(path), **options
        )
        tokenize = open_clip.get_tokenizer(architecture)
    except Exception as error:  # weights that do not fit end in an AssertionError, too
        _check_architecture(architecture, named)
        raise TalosValueError(
            f"source must have the weights of {named}, got {path}: {error!s:.200}"
        ) from error
    name = f"{PREFIX}{Path(named).name}:{weights if weights in tags else path.name}"
    encoder = ClipEncoder(clip.float(), transform, tokenize, name=name).eval()
    architecture_config = dict(open_clip.get_model_config(architecture))
    if options.get("force_quick_gelu"):
        architecture_config["quick_gelu"] = True
    preprocessing = open_clip.get_model_preprocess_cfg(clip)
    encoder.config = {"model_cfg": architecture_config, "preprocess_cfg": preprocessing}
    encoder.path = path
    return encoder


def is_clip(folder: Path) -> bool:
    """Return whether a folder holds a CLIP as open_clip saves it."""
    return (folder / CONFIG_FILE).is_file()


def load_clip_folder(folder: Path, name: str) -> ClipEncoder:
    """Load the CLIP that open_clip or `talos export` saved in a folder; see `load_clip`.

    Args:
        folder: with `CONFIG_FILE` and its weights.
        name: the source that is loaded.

    Raises:
        TalosRuntimeError: open_clip is not installed.
        TalosValueError: the folder holds no safetensors file, or its weights do not fit the
            configuration.
    """
    open_clip = import_package("open_clip")
    Checkpoint(folder)  # refuses other files
    where = f"local-dir:{folder}"
    try:
        clip, _, transform = open_clip.create_model_and_transforms(where)
        tokenize = open_clip.get_tokenizer(where)
    except Exception as error:  # as in `load_clip`
        raise TalosValueError(
            f"source must be a folder that open_clip can load, got {folder}: {error!s:.300}"
        ) from error
    return ClipEncoder(clip.float(), transform, tokenize, name=name).eval()


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """Return how images are prepared, as `create_model_and_transforms` takes it."""
    return {ours: config[key] for key, ours in _PREPROCESSING.items() if key in config}


def _own_architecture(path: Path) -> tuple[str, dict[str, Any]]:
    """Make the architecture of a file known to open_clip; return its name and preprocessing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TalosOSError(
            f"source must name a configuration that can be read, got {path} ({error.strerror})"
            f"{did_you_mean(str(path), beside(path))}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TalosValueError(f"source must name a JSON file, got {path}: {error}") from error
    content = content if isinstance(content, dict) else {}
    config, preprocessing = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    parts = (config, preprocessing)
    if not all(isinstance(e, dict) for e in parts) or not config.keys() >= set(_KEYS):
        raise TalosValueError(
            f"source must name a model configuration of open_clip, with {', '.join(_KEYS)}, got "
            f"{path} without; `open_clip.get_model_config(NAME)` shows one"
        )
    text = json.dumps(config, sort_keys=True)
    # open_clip calls an architecture as its file; the digest keeps its own ones as they are.
    name = f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.json")
        file.write_text(text, encoding="utf-8")
        import_package("open_clip").add_model_config(file)
    return name, preprocessing


def _check_architecture(architecture: str, named: str) -> None:
    """Refuse a configuration that makes no model, with any weights."""
    try:
        import_package("open_clip").create_model(architecture)
    except Exception as error:  # a configuration may end in any error
        raise TalosValueError(
            f"source must name a configuration of open_clip that makes a model, got {named}: "
            f"{error!s:.200}"
        ) from error


def _local(weights: str, tags: Sequence[str]) -> Path:
    """Return the path of a .safetensors file."""
    path = Path(weights).expanduser()
    if path.suffix != ".safetensors":
        raise TalosValueError(
            f"source must name a pretrained tag ({several(tags) or 'there is none'}) or a "
            f".safetensors file, got {weights!r}; pickled weights are never loaded: convert them "
            "with safetensors.torch.save_file"
        )
    if not path.is_file():
        near = did_you_mean(str(path), beside(path))
        raise TalosOSError(
            f"source must name an existing file, got {path}{near or '; check the path'}"
        )
    return path


def _download(source: str, tag: dict[str, Any]) -> Path:
    """Download the safetensors file of a pretrained tag."""
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
        raise TalosOSError(
            f"source must have a file {name} that can be downloaded from {repository}, got "
            f"{source} ({first_line(error)}); give a .safetensors file where there is no network"
        ) from error
