"""Heads in a file beside the model: what a classifier is besides the weights of its encoder.

A head is made with the weights of the base. One that is made again with edited weights is another
classifier. So an exported model carries the heads of its base in `HEAD_FILE`, and whatever loads
the model takes them from there.

The file lies in a folder of its own: some programs read every safetensors file beside a model as a
part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from talos.app.models.base import Classifier, Encoder, ZeroShotEncoder
from talos.errors import TalosValueError
from talos.files import load_file, save_file

if TYPE_CHECKING:
    from talos.app.tasks import ImageTask, Task

HEAD_FILE = "talos/head.safetensors"
"""The place of the heads in a model's folder."""

_KIND = "heads"
_DTYPES = {"zero_shot": torch.float32, "answers": torch.int64}
_KEYS = {"task", "kind", "class_names", "class_texts", "scale", "max_length", "data"}


@dataclass(frozen=True)
class Head:
    """The head of a task.

    Attributes:
        task: the task's name.
        kind: "zero_shot": a unit vector of each class; "answers": the tokens of each class's text,
            for a language model.
        class_names: the names of the classes.
        class_texts: the text of each class.
        scale: the logit of a class is `scale` times the cosine of two vectors; None for answers.
        max_length: tokens of a text that are read.
        data: the fingerprint of the task's test examples.
        tensor: float32 [C, D] or int64 [C, L], padded with -100.
    """

    task: str
    kind: Literal["zero_shot", "answers"]
    class_names: tuple[str, ...]
    class_texts: tuple[str, ...]
    scale: float | None
    max_length: int
    data: str
    tensor: Tensor = field(repr=False)

    @property
    def made(self) -> dict[str, Any]:
        """What it was made with, by the keys that the metadata of masks and vectors have."""
        keys = ("task", "class_names", "class_texts", "max_length", "data")
        made = {key: getattr(self, key) for key in keys}
        return {key: list(each) if isinstance(each, tuple) else each for key, each in made.items()}

    def classifier(self, encoder: Encoder) -> Classifier:
        """Return the classifier of an encoder with this head.

        Raises:
            TalosValueError: the encoder takes a head of another kind or size.
        """
        if not encoder.takes(self.tensor):
            raise TalosValueError(
                f"source must be the model that its head of {self.task} was made for, got "
                f"{encoder.name}, which takes heads of another kind or size; export it again"
            )
        if isinstance(encoder, ZeroShotEncoder) and self.scale is not None:
            encoder.scale = self.scale
        return encoder.classifier(self.class_texts, self.tensor)


def head_of(
    classifier: Classifier, task: str, class_names: tuple[str, ...], max_length: int, data: str
) -> Head:
    """Return the head of a classifier, to save it.

    Args:
        classifier: with the weights of the base.
        task: the task's name.
        class_names: the names of its classes.
        max_length: tokens of a text that are read.
        data: the fingerprint of its test examples.

    Example:
        >>> from talos.app.models import load_encoder
        >>> classifier = load_encoder().classifier(["an animal", "a vehicle"])
        >>> head_of(classifier, "things", ("animal", "vehicle"), 48, "").tensor.shape
        torch.Size([2, 384])
    """
    encoder = classifier.encoder
    scale = float(encoder.scale) if isinstance(encoder, ZeroShotEncoder) else None
    kind: Literal["zero_shot", "answers"] = "answers" if scale is None else "zero_shot"
    tensor = classifier.head.detach().cpu()
    return Head(task, kind, class_names, classifier.class_texts, scale, max_length, data, tensor)


def classifier_for(encoder: Encoder, task: "Task | ImageTask") -> Classifier:
    """Return the classifier of a task: with a head that was saved with the encoder, if one fits.

    Else the head is made with the present weights: of the class texts, or of training examples
    where the encoder reads no texts.

    Args:
        encoder: the encoder, which is shared and not copied.
        task: the task.
    """
    found = saved_head(encoder, task)
    if found is not None:
        return found.classifier(encoder)
    return encoder.classifier(task.class_texts, encoder.head_from(task))


def saved_head(encoder: Encoder, task: "Task | ImageTask") -> Head | None:
    """Return the head of an encoder for the classes of a task; None if none was saved with it."""
    classes = task.class_names, task.class_texts
    heads = encoder.heads.values()
    return next((h for h in heads if (h.class_names, h.class_texts) == classes), None)


def save_heads(path: Path, heads: Mapping[str, Head]) -> None:
    """Write heads to a file, by the names of their tasks.

    Raises:
        TalosOSError: the file cannot be written.
    """
    tensors = {name: head.tensor for name, head in heads.items()}
    entries = [{key: getattr(head, key) for key in sorted(_KEYS)} for head in heads.values()]
    save_file(path, _KIND, tensors, {"heads": entries})


def load_heads(folder: Path) -> dict[str, Head]:
    """Read the heads of a model's folder; none where it has no `HEAD_FILE`.

    Raises:
        TalosValueError: the file is damaged, or of another version or kind.
        TalosOSError: it cannot be read.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return {}
    tensors, content = load_file(path, _KIND)
    entries: Any = content.get("heads")
    try:
        heads = [_parsed(entry, tensors) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise TalosValueError(f"{path}: not valid heads: {error}; export the model again") from None
    return {head.task: head for head in heads}


def _parsed(entry: Any, tensors: Mapping[str, Tensor]) -> Head:
    """Return a head of a file, whose content is not trusted."""
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        raise ValueError(f"each must have {', '.join(sorted(_KEYS))}")
    names, texts = entry["class_names"], entry["class_texts"]
    for words in (names, texts):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("class_names and class_texts must be lists of texts")
    tensor, scale, length = tensors[entry["task"]], entry["scale"], entry["max_length"]
    if tensor.dtype != _DTYPES[entry["kind"]] or tensor.dim() != 2:
        raise ValueError(f"a head of {entry['kind']} must have the dtype of its kind")
    if not len(set(names)) == len(names) == len(texts) == len(tensor):
        raise ValueError("each must have a row for each class, and each class another name")
    if not isinstance(entry["data"], str):
        raise ValueError("data must be a text")
    if type(length) is not int or length < 3:
        raise ValueError("max_length must be an integer of at least 3")
    positive = isinstance(scale, float) and 0 < scale < math.inf
    if positive != (entry["kind"] == "zero_shot") or not (positive or scale is None):
        raise ValueError("scale must be a positive number for zero_shot alone")
    padding = tensor == -100
    inside = (padding[:, :-1] & ~padding[:, 1:]).any()
    if entry["kind"] == "answers" and (
        inside or padding[:, 0].any() or (tensor < 0).logical_xor(padding).any()
    ):
        raise ValueError("answers must be tokens, with padding behind them")
    own = {**entry, "class_names": tuple(names), "class_texts": tuple(texts)}
    return Head(**own, tensor=tensor)
