"""Adapters that turn pretrained models into modules `talos` can score, fine-tune and merge."""

from talos.app.models.base import (
    Classifier,
    Encoder,
    ZeroShotClassifier,
    ZeroShotEncoder,
)
from talos.app.models.clip import ClipEncoder, load_clip
from talos.app.models.clip_transformers import TransformersClipEncoder
from talos.app.models.folders import class_name
from talos.app.models.language import AnswerClassifier, LanguageModel
from talos.app.models.load import can_load, load_encoder, takes_images
from talos.app.models.text import TextEncoder
from talos.app.models.vision import VisionEncoder

__all__ = [
    "AnswerClassifier",
    "Classifier",
    "ClipEncoder",
    "Encoder",
    "LanguageModel",
    "TextEncoder",
    "TransformersClipEncoder",
    "VisionEncoder",
    "ZeroShotClassifier",
    "ZeroShotEncoder",
    "can_load",
    "class_name",
    "load_clip",
    "load_encoder",
    "takes_images",
]
