"""Language models as classifiers: the classes' texts are the answers they choose from.

The logit of a class is the log-probability that the model gives its text after the example's,
summed over the text's tokens: an encoder-decoder (T5) decodes it, a decoder (GPT-2, Llama) goes on.

transformers is imported when a model is loaded, never before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talos import batches
from talos.app.models.base import Classifier, Encoder, checked_class_texts
from talos.app.models.folders import find_folder, load_folder
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ARCHITECTURES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_PADDING = -100  # of answers that are shorter than the longest


class LanguageModel(Encoder):
    """An encoder-decoder or a decoder of transformers.

    `load_language_model` makes one.

    Args:
        model: A transformers model that returns `logits` [B, T, V].
        tokenizer: The tokenizer that belongs to it.
        name: What was loaded.
        sha256: SHA-256 of the weights' file, or over those of several.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        name: str,
        sha256: str,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.sha256 = sha256

    def classifier(self, class_texts: Sequence[str]) -> "AnswerClassifier":
        """Returns a classifier that chooses among texts.

        Args:
            class_texts: One answer per class.
        """
        return AnswerClassifier(self, class_texts)

    def answer_ids(self, texts: Sequence[str]) -> Tensor:
        """Returns the tokens of answers: int64 [len(texts), L], padded with -100.

        A decoder continues its input, so that its answers begin with a space and have no special
        tokens; those of an encoder-decoder are tokenised as its targets are.

        Args:
            texts: The answers.

        Raises:
            TalosValueError: An answer has no tokens.
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
    """A language model that chooses among the classes' texts.

    The answers are a buffer that is not part of the `state_dict`, which therefore fits every other
    task with the same model. All parameters are the language model's.

    Args:
        encoder: The language model, which is kept and not copied.
        class_texts: One answer per class.

    Raises:
        TalosTypeError: `class_texts` is one string, or holds something else than strings.
        TalosValueError: There are fewer than two texts, or one is empty or has no tokens.

    Attributes:
        choice_ids: The answers' tokens, int64 [C, L], padded with -100.
    """

    encoder: LanguageModel
    choice_ids: Tensor

    def __init__(self, encoder: LanguageModel, class_texts: Sequence[str]) -> None:
        super().__init__()
        self.class_texts = checked_class_texts(class_texts)
        self.encoder = encoder
        ids = encoder.answer_ids(self.class_texts).to(encoder.device)
        self.register_buffer("choice_ids", ids, persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the log-probability of each answer.

        Args:
            batch: `input_ids` and `attention_mask`, both int64 [B, T]; other entries are not read.

        Returns:
            float32 [B, C].
        """
        asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
        asked["choice_ids"] = self.choice_ids.expand(len(asked["input_ids"]), -1, -1)  # [B, C, L]
        logits: Tensor = batches.choice_logits(self.encoder.model, asked)
        return logits


def load_language_model(source: str | Path, *, attention: str = "eager") -> LanguageModel:
    """Loads an encoder-decoder or a decoder in float32 and evaluation mode.

    Only safetensors files are read, never pickle, and no code that comes with a model is run.

    Args:
        source: A folder with a transformers model, or the name of one on the Hugging Face hub.
        attention: How transformers computes attention: "eager" or "sdpa".

    Returns:
        The model.

    Raises:
        TalosError: transformers is not installed.
        TalosOSError: The model cannot be found or downloaded.
        TalosValueError: It is no language model, its folder holds no readable safetensors file, its
            weights do not fit its configuration, or its tokenizer has no token to pad with.
    """
    return language_model(*find_folder(source), attention)


def is_language_model(folder: Path) -> bool:
    """Says whether the configuration of a folder is one of a language model."""
    config = _configuration(folder)
    architectures = config.get("architectures") or []
    return bool(config.get("is_encoder_decoder")) or any(
        str(each).endswith(_ARCHITECTURES) for each in architectures
    )


def language_model(folder: Path, name: str, attention: str = "eager") -> LanguageModel:
    """Loads the language model of a folder; see `load_language_model`."""
    if not is_language_model(folder):
        raise TalosValueError(
            f"source must be a language model, got {folder}, whose configuration names none of "
            f"{', '.join(_ARCHITECTURES)}; load an encoder with load_text_encoder"
        )
    decodes = bool(_configuration(folder).get("is_encoder_decoder"))
    auto = "AutoModelForSeq2SeqLM" if decodes else "AutoModelForCausalLM"
    model, tokenizer, sha256 = load_folder(
        folder, lambda library: getattr(library, auto), attention=attention
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise TalosValueError(
                f"source must have a tokenizer with a token to pad with, got {folder} without one; "
                "set its pad_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token  # never seen: the attention mask hides it
    return LanguageModel(model, tokenizer, name=name, sha256=sha256).eval()


def _configuration(folder: Path) -> dict[str, Any]:
    """Reads config.json; empty where it cannot be read, which the loader then tells."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
