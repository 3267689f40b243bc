"""Encoders and classifiers: what all models have in common.

An `Encoder` is a pretrained model with a tokenizer for its examples; its method `classifier` adds
the classes of a task. A `Classifier` maps a batch to logits [B, C]. Its only parameters are its
encoder's, so that classifiers of one encoder can be merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from talos.batches import evaluation_mode
from talos.errors import TalosTypeError, TalosValueError

if TYPE_CHECKING:
    from talos.app.tasks import ImageTask, Task

_TEXTS_PER_PASS = 64


class Encoder(nn.Module, ABC):
    """A pretrained model of texts or images.

    Attributes:
        name: the source that was loaded.
        tokenizer: turns the examples of a task into tensors, as the task's `batches` takes it: for
            texts a tokenizer of transformers, for images a function from a picture to [3, H, W].
        path: the file or folder of its weights.
        heads: the heads that were saved with the model, by task; see `talos.app.models.heads`.
    """

    name: str
    path: Path
    tokenizer: Any
    heads: Mapping[str, Any] = MappingProxyType({})  # of Head

    @abstractmethod
    def classifier(self, class_texts: Sequence[str], head: Tensor | None = None) -> "Classifier":
        """Return a classifier that shares this encoder.

        Args:
            class_texts: one text per class.
            head: what an earlier classifier made of the texts, `Classifier.head`; None: it is made
                of them with the present weights.
        """

    def head_from(self, task: "Task | ImageTask") -> Tensor | None:
        """Return a head that is made of a task's training examples with the present weights.

        Args:
            task: the task.

        Returns:
            What `classifier` takes as `head`; None: this model makes heads of class texts.
        """
        return None

    @abstractmethod
    def takes(self, head: Tensor) -> bool:
        """Return whether this model can have made a head: by its kind and size.

        Args:
            head: `Classifier.head`.
        """

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def most_tokens(self, class_texts: Sequence[str]) -> int | None:
        """Return how many tokens of a text the model has positions for; None: no limit.

        Args:
            class_texts: one text per class.
        """
        for module in self.modules():
            most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
            if most is not None:
                return int(most) - _positions_of_padding(module)
        return None


class Classifier(nn.Module, ABC):
    """A module from batches to logits; its weights have the names of the pretrained model itself.

    Attributes:
        encoder: the encoder, which is shared and not copied.
        class_texts: one text per class.
        head: what was made of the texts, [C, ...], a buffer outside of the `state_dict`.
    """

    talos_wraps = "encoder"

    encoder: Encoder
    class_texts: tuple[str, ...]
    head: Tensor

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a batch of a task, float32 [B, C]."""


def _positions_of_padding(model: nn.Module) -> int:
    """Return the positions that no token takes: RoBERTa's begin after that of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


class ZeroShotEncoder(Encoder):
    """An encoder that maps examples and texts to unit vectors.

    Attributes:
        inputs: the entries of a batch that `forward` takes, in its order.
        scale: the logit of a class is `scale` times the cosine of two vectors.
    """

    inputs: ClassVar[tuple[str, ...]]
    scale: float

    def takes(self, head: Tensor) -> bool:
        """Return whether these are unit vectors of the model's size."""
        return head.is_floating_point() and head.shape[1] == self.encode(["a"]).shape[1]

    @abstractmethod
    def embed(self, texts: list[str]) -> Tensor:
        """Return the unit vectors of a few texts, float32 [len(texts), D]."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors of texts, without dropout and without gradients.

        Args:
            texts: the texts.

        Returns:
            float32 [len(texts), D] on the encoder's device.
        """
        starts = range(0, len(texts), _TEXTS_PER_PASS)
        with evaluation_mode(self):
            return torch.cat([self.embed(list(texts[i : i + _TEXTS_PER_PASS])) for i in starts])

    def classifier(
        self, class_texts: Sequence[str], head: Tensor | None = None
    ) -> "ZeroShotClassifier":
        """Return the zero-shot classifier of the classes that the texts describe.

        Args:
            class_texts: one text per class.
            head: float32 [C, D]; None: the unit vectors of the texts by the present weights.
        """
        return ZeroShotClassifier(self, class_texts, head)


class ZeroShotClassifier(Classifier):
    """An encoder with a frozen head, the unit vectors of the class texts.

        logits = scale * encoder(example) @ head.T

    Where a text has several lines, each describes the class: its vector is the mean of theirs.

    The head is a buffer, so nothing scores, selects or trains it. It is not in the `state_dict`,
    which therefore fits every other task with the same encoder.

    Several classifiers may share one encoder. Make them all before it is fine-tuned: a head is made
    with the weights that the encoder has at that moment.

    Args:
        encoder: the encoder, which is shared and not copied.
        class_texts: one text per class.
        head: float32 [C, D]; None: the unit vectors of the texts by the present weights.

    Raises:
        TalosTypeError: `class_texts` is not a sequence of strings.
        TalosValueError: there are fewer than two texts, or one is empty.
    """

    encoder: ZeroShotEncoder

    def __init__(
        self, encoder: ZeroShotEncoder, class_texts: Sequence[str], head: Tensor | None = None
    ) -> None:
        super().__init__()
        self.class_texts = checked_class_texts(class_texts)
        self.encoder = encoder
        made = _head(encoder, self.class_texts) if head is None else head.to(encoder.device)
        self.register_buffer("head", made, persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a batch.

        Args:
            batch: the encoder's `inputs`: `input_ids` and `attention_mask`, both int64 [B, T], or
                `pixel_values`, float32 [B, 3, H, W]; other entries are ignored.

        Returns:
            float32 [B, C].
        """
        vectors = self.encoder(*(batch[key] for key in self.encoder.inputs))
        logits: Tensor = self.encoder.scale * (vectors @ self.head.to(vectors.dtype).T)
        return logits


def _head(encoder: ZeroShotEncoder, class_texts: Sequence[str]) -> Tensor:
    """Return a unit vector of each class: of the mean over the lines of its text."""
    lines = [[line for line in text.splitlines() if line.strip()] for text in class_texts]
    if all(len(each) == 1 for each in lines):
        return encoder.encode(class_texts)
    vectors = encoder.encode([line for each in lines for line in each])
    means = [part.mean(0) for part in vectors.split([len(each) for each in lines])]
    return nn.functional.normalize(torch.stack(means), dim=-1)


def checked_class_texts(class_texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts of two classes or more; refuse anything else."""
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


def class_tokens(tokenizer: Any, texts: list[str], most: int) -> Any:
    """Tokenise the texts of classes: `input_ids` and `attention_mask`, int64 [len(texts), T].

    Args:
        tokenizer: of transformers.
        texts: the texts.
        most: the tokens that a text may have.

    Raises:
        TalosValueError: one has more.
    """
    lengths = {"truncation": True, "max_length": most + 1}
    encoded = tokenizer(texts, padding=True, return_tensors="pt", **lengths)
    sizes = encoded["attention_mask"].sum(1).tolist()
    if max(sizes) > most:
        raise TalosValueError(
            f"class_texts must have at most {most} tokens each, got more in "
            f"{texts[sizes.index(max(sizes))]!r:.80}; describe the class in fewer words"
        )
    return encoded
