"""One name for every kind of model."""

from talos.app.models.base import Encoder
from talos.app.models.clip import PREFIX, load_clip
from talos.app.models.folders import find_folder
from talos.app.models.language import is_language_model, language_model
from talos.app.models.text import load_text_encoder, text_encoder


def load_encoder(source: str) -> Encoder:
    """Loads a pretrained model in float32 and evaluation mode.

    Args:
        source: "minilm"; "openclip:NAME:WEIGHTS" as `load_clip` takes it; or a folder with a
            transformers model, or the name of one on the Hugging Face hub: a language model where
            its configuration says so, else a text encoder.

    Returns:
        The model; its `classifier` makes it one of a task's classes.

    Raises:
        TalosError: A package is not installed.
        TalosOSError: The model cannot be found or downloaded.
        TalosValueError: It cannot be loaded; see `load_text_encoder`, `load_language_model` and
            `load_clip`.

    Example:
        >>> classifier = load_encoder("minilm").classifier(["an animal", "a vehicle"])
        >>> classifier.encoder.name
        'minilm'
    """
    if source == "minilm":
        return load_text_encoder(source)
    if source.startswith(PREFIX):
        return load_clip(source)
    folder, name = find_folder(source)
    load = language_model if is_language_model(folder) else text_encoder
    return load(folder, name)


def takes_images(source: str) -> bool:
    """Says whether a model that `load_encoder` knows classifies images rather than texts."""
    return source.startswith(PREFIX)
