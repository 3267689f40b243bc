"""Language models as classifiers: they choose among the texts of the classes.

The logit of a class is the log-probability of its text after the example's text, summed over the
text's tokens. An encoder-decoder (T5) decodes the text; a decoder (GPT-2, Llama) continues with it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talos import batches
from talos.app.extras import import_package
from talos.app.models.base import Classifier, Encoder, checked_class_texts
from talos.app.models.folders import configuration, load_folder, quiet
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ARCHITECTURES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_PADDING = -100  # of answers that are shorter than the longest


class LanguageModel(Encoder):
    """An encoder-decoder or a decoder of transformers; `load_encoder` makes one.

    Args:
        model: a transformers model that returns `logits` [B, T, V].
        tokenizer: the tokenizer that belongs to it.
        name: the source that was loaded.
    """

    talos_wraps = "model"

    model: Any
    tokenizer: "PreTrainedTokenizerBase"

    def __init__(
        self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", *, name: str
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        tokenizer.answer_ids = self.answer_ids  # for tasks whose texts have answers of their own

    def classifier(
        self, class_texts: Sequence[str], head: Tensor | None = None
    ) -> "AnswerClassifier":
        """Return a classifier that chooses among texts.

        Args:
            class_texts: one answer per class.
            head: the answers' tokens as `answer_ids` returns them; None: they are made.
        """
        return AnswerClassifier(self, class_texts, head)

    def takes(self, head: Tensor) -> bool:
        """Return whether these are tokens of the model's vocabulary."""
        size = len(self.model.get_input_embeddings().weight)
        return not head.is_floating_point() and int(head.max()) < size

    def most_tokens(self, class_texts: Sequence[str]) -> int | None:
        """Return how many tokens of a text fit, before the answers of a decoder; None: any number.

        Args:
            class_texts: one answer per class.
        """
        most = super().most_tokens(class_texts)
        decodes = self.model.config.is_encoder_decoder
        return most if most is None or decodes else most - self.answer_ids(class_texts).shape[1]

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer into a folder, as transformers reads them."""
        with quiet(import_package("transformers")):
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def answer_ids(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of answers: int64 [len(texts), L], padded with -100.

        A decoder continues its input, so its answers begin with a space and have no special
        tokens. Those of an encoder-decoder are tokenised as its targets.

        Args:
            texts: the answers.

        Raises:
            TalosValueError: an answer has no tokens.
        """
        if self.model.config.is_encoder_decoder:
            tokens = self.tokenizer(list(texts))["input_ids"]
        else:
            spaced = [f" {text}" for text in texts]
            tokens = self.tokenizer(spaced, add_special_tokens=False)["input_ids"]
        if not all(tokens):
            raise TalosValueError(
                f"class_texts must have tokens, got {texts[tokens.index([])]!r}, of which "
                f"{type(self.tokenizer).__name__} makes none; describe the class in other words"
            )
        rows = [torch.tensor(each, dtype=torch.int64, device="cpu") for each in tokens]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PADDING)


class AnswerClassifier(Classifier):
    """A language model that chooses among the texts of the classes.

    The answers are a buffer outside of the `state_dict`, which therefore fits every other task with
    the same model. All parameters are the language model's.

    Args:
        encoder: the language model, which is shared and not copied.
        class_texts: one answer per class.
        head: the answers' tokens, int64 [C, L], padded with -100; None: they are made.

    Raises:
        TalosTypeError: `class_texts` is not a sequence of strings.
        TalosValueError: there are fewer than two texts, or one is empty or has no tokens.
    """

    encoder: LanguageModel

    def __init__(
        self, encoder: LanguageModel, class_texts: Sequence[str], head: Tensor | None = None
    ) -> None:
        super().__init__()
        self.class_texts = checked_class_texts(class_texts)
        self.encoder = encoder
        ids = encoder.answer_ids(self.class_texts) if head is None else head
        self.register_buffer("head", ids.to(encoder.device), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-probability of each answer.

        Args:
            batch: `input_ids` and `attention_mask`, both int64 [B, T], and `choice_ids`,
                int64 [B, C, L], where texts have answers of their own; other entries are ignored.

        Returns:
            float32 [B, C].
        """
        asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
        shared = self.head.expand(len(asked["input_ids"]), -1, -1)  # [B, C, L]
        asked["choice_ids"] = batch.get("choice_ids", shared)
        logits: Tensor = batches.choice_logits(self.encoder.model, asked)
        return logits


def auto_class(folder: Path) -> str:
    """Return the class of transformers that loads a folder's language model."""
    decodes = bool(configuration(folder).get("is_encoder_decoder"))
    return "AutoModelForSeq2SeqLM" if decodes else "AutoModelForCausalLM"


def is_language_model(folder: Path) -> bool:
    """Return whether the configuration of a folder is that of a language model."""
    config = configuration(folder)
    architectures = config.get("architectures") or []
    return bool(config.get("is_encoder_decoder")) or any(
        str(each).endswith(_ARCHITECTURES) for each in architectures
    )


def load_language_model(folder: Path, name: str) -> LanguageModel:
    """Load the language model of a folder; see `talos.app.models.load_encoder`."""
    model, tokenizer = load_folder(folder, auto_class(folder))
    return language_model(model, tokenizer, folder, name)


def language_model(model: Any, tokenizer: Any, where: Path, name: str) -> LanguageModel:
    """Return a language model whose tokenizer pads.

    Args:
        model: of transformers.
        tokenizer: of transformers.
        where: the file or folder of the model.
        name: the source that was loaded.

    Raises:
        TalosValueError: the tokenizer has no token to pad with.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise TalosValueError(
                f"source must have a tokenizer with a token to pad with, got {where} without one; "
                "set its pad_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token  # never seen: the attention mask hides it
    return LanguageModel(model, tokenizer, name=name).eval()
