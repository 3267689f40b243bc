"""Adapters that turn pretrained models into modules `talos` can score, fine-tune and merge."""

from talos.models.base import (
    Classifier,
    Encoder,
    ZeroShotClassifier,
    ZeroShotEncoder,
    evaluation_mode,
)
from talos.models.clip import ClipEncoder, load_clip
from talos.models.language import AnswerClassifier, LanguageModel, load_language_model
from talos.models.load import load_encoder, takes_images
from talos.models.text import TextEncoder, load_text_encoder

__all__ = [
    "AnswerClassifier",
    "Classifier",
    "ClipEncoder",
    "Encoder",
    "LanguageModel",
    "TextEncoder",
    "ZeroShotClassifier",
    "ZeroShotEncoder",
    "evaluation_mode",
    "load_clip",
    "load_encoder",
    "load_language_model",
    "load_text_encoder",
    "takes_images",
]
