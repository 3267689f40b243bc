"""What every model has in common for whoever trains, scores or merges it.

An `Encoder` is a pretrained model with what turns examples into its inputs; `classifier` gives it
the classes of a task. A `Classifier` maps a batch to logits [B, C] and keeps its encoder, whose
parameters are the only ones it has: classifiers of one encoder can be merged.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError

__all__ = ["Classifier", "Encoder", "evaluation_mode"]


class Encoder(nn.Module, ABC):
    """A pretrained model of texts or images.

    Attributes:
        name: What was loaded.
        sha256: SHA-256 of the weights' file, or over those of several.
        tokenizer: Turns the examples of a task into tensors, as the task's `batches` takes it: for
            texts a tokenizer of transformers, for images what makes [3, H, W] of a picture.
    """

    name: str
    sha256: str
    tokenizer: Any

    @abstractmethod
    def classifier(self, class_texts: Sequence[str]) -> "Classifier":
        """Returns a classifier of the classes that texts describe, around this very encoder.

        Args:
            class_texts: One text per class.
        """

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


class Classifier(nn.Module, ABC):
    """A module from batches to logits.

    Attributes:
        encoder: The encoder, which is kept and not copied.
        class_texts: One text per class.
    """

    encoder: Encoder
    class_texts: tuple[str, ...]

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits of a batch, float32 [B, C].

        Args:
            batch: What the batches of a task hold.
        """


class ZeroShotEncoder(Encoder):
    """An encoder that has a vector for an example and for a text, and compares them.

    Attributes:
        inputs: The entries of a batch that `forward` takes, in its order.
        scale: What the cosine of two vectors is multiplied by to be a logit.
    """

    inputs: ClassVar[tuple[str, ...]]
    scale: float

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns the unit vectors of texts, float32 [len(texts), D], without gradients.

        Args:
            texts: The texts.
        """

    def classifier(self, class_texts: Sequence[str]) -> "ZeroShotClassifier":
        """Returns the zero-shot classifier of the classes that texts describe.

        Args:
            class_texts: One text per class.
        """
        return ZeroShotClassifier(self, class_texts)


class ZeroShotClassifier(Classifier):
    """An encoder with a frozen head made of the classes' texts.

    logits = scale * encoder(example) @ head.T, the head being the unit vectors of the class texts.

    The head is a buffer and no parameter, so nothing scores, selects or trains it. It is not part
    of the `state_dict`, which therefore fits every other task with the same encoder.

    Several classifiers may share one encoder. Make them all before it is fine-tuned: a head comes
    from the weights that the encoder has at that moment.

    Args:
        encoder: The encoder, which is kept and not copied.
        class_texts: One text per class.
        scale: What a cosine is multiplied by, the inverse temperature of the softmax; by default
            the encoder's own.

    Raises:
        TalosTypeError: `class_texts` is one string, or holds something else than strings.
        TalosValueError: There are fewer than two texts, one is empty, or `scale` is not positive.

    Attributes:
        class_texts: One text per class.
        scale: The scale.
        head: float32 [C, D], a non-persistent buffer.
    """

    encoder: ZeroShotEncoder
    head: Tensor

    def __init__(
        self, encoder: ZeroShotEncoder, class_texts: Sequence[str], *, scale: float | None = None
    ) -> None:
        super().__init__()
        self.class_texts = checked_class_texts(class_texts)
        self.scale = float(encoder.scale if scale is None else scale)
        if not 0 < self.scale < float("inf"):
            raise TalosValueError(f"scale must be positive and finite, got {self.scale}")
        self.encoder = encoder
        self.register_buffer("head", encoder.encode(self.class_texts), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits of a batch.

        Args:
            batch: The encoder's `inputs`: `input_ids` and `attention_mask`, both int64 [B, T], or
                `pixel_values`, float32 [B, 3, H, W]; other entries are not read.

        Returns:
            float32 [B, C].
        """
        vectors = self.encoder(*(batch[key] for key in self.encoder.inputs))
        logits: Tensor = self.scale * (vectors @ self.head.to(vectors.dtype).T)
        return logits


def checked_class_texts(class_texts: Sequence[str]) -> tuple[str, ...]:
    """Refuses what is not one text per class, for two classes or more."""
    if isinstance(class_texts, str) or not all(isinstance(text, str) for text in class_texts):
        raise TalosTypeError(
            f"class_texts must be a sequence of strings, got {class_texts!r:.80}; give one text "
            "per class"
        )
    if len(class_texts) < 2 or not all(text.strip() for text in class_texts):
        raise TalosValueError(
            f"class_texts must be at least two texts that are not empty, got {class_texts!r:.80}"
        )
    return tuple(class_texts)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and each of its modules back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
