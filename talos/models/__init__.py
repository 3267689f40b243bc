"""Adapters that turn pretrained encoders into modules `talos` can score, fine-tune and merge."""

from talos.models.text import TextEncoder, ZeroShotClassifier, load_text_encoder

__all__ = ["TextEncoder", "ZeroShotClassifier", "load_text_encoder"]
