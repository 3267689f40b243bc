"""Text encoders for a frozen zero-shot head.

An encoder turns a text into a unit vector. A class is the unit vector of a text that describes it.
The logit of a class is `scale` times the cosine of the two, as in CLIP's zero-shot head. Only the
encoder has parameters, so models that are fine-tuned on different tasks can be merged.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from talos.app.models.base import ZeroShotEncoder, class_tokens
from talos.app.models.folders import load_folder, save_json
from talos.files import Beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The best calibrated of 5, 10, 20 and 30 for all-MiniLM-L6-v2: it has the smallest cross-entropy on
# the validation data of five of the tasks in `talos.app.tasks` (8 to 15 are alike). Fisher scores
# sample labels from this softmax.
SCALE = 10.0
_TOKENS_OF_A_CLASS = 128


class TextEncoder(ZeroShotEncoder):
    """A transformer with mean pooling: token ids to unit vectors.

    `load_encoder` makes one, in which a pooler is frozen: its weights do not change the output, and
    would be scored as the least sensitive of all.

    Args:
        transformer: a transformers model whose output has `last_hidden_state` [B, T, D].
        tokenizer: the tokenizer that belongs to it.
        name: the source that was loaded.
    """

    talos_wraps = "transformer"
    inputs = ("input_ids", "attention_mask")
    scale = SCALE

    def __init__(
        self, transformer: nn.Module, tokenizer: "PreTrainedTokenizerBase", *, name: str
    ) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.tokenizer = tokenizer
        self.name = name

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one unit vector per text: the normalised mean of its tokens' last hidden states.

        Args:
            input_ids: token ids, int64 [B, T].
            attention_mask: 1 for tokens and 0 for padding, int64 [B, T].

        Returns:
            float32 [B, D].
        """
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state.float()  # [B, T, D]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return nn.functional.normalize(mean, dim=-1)

    def embed(self, texts: list[str]) -> Tensor:
        """Return the unit vectors of a few texts, float32 [len(texts), D].

        Raises:
            TalosValueError: a text has more tokens than a class may have.
        """
        most = min(_TOKENS_OF_A_CLASS, self.most_tokens(texts) or _TOKENS_OF_A_CLASS)
        encoded = class_tokens(self.tokenizer, texts, most).to(self.device)
        vectors: Tensor = self(encoded["input_ids"], encoded["attention_mask"])
        return vectors


def load_text_encoder(folder: Path, name: str) -> TextEncoder:
    """Load the text encoder of a folder; see `talos.app.models.load_encoder`."""
    transformer: Any
    transformer, tokenizer = load_folder(folder, "AutoModel")
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler.requires_grad_(False)
    return TextEncoder(transformer, tokenizer, name=name).eval()


def sentence_transformers_files(encoder: TextEncoder) -> Beside:
    """Return what makes sentence-transformers load a folder as this encoder; nothing if it does.

    Args:
        encoder: loaded of a folder.
    """
    if (encoder.path / "modules.json").exists():
        return {}
    names = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(names.items())
    ]
    size = encoder.transformer.config.hidden_size
    pooling = {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
    contents = {"modules.json": modules, "1_Pooling/config.json": pooling}
    return {name: partial(save_json, content) for name, content in contents.items()}
