"""Folders of transformers models: how they are found, checked and loaded.

Only safetensors files are read, never pickle, and no code that comes with a model is run.
"""

import contextlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from talos.app.extras import import_package
from talos.app.models.packages import PACKAGED
from talos.app.nearest import beside, did_you_mean
from talos.errors import TalosOSError, TalosValueError
from talos.files import Checkpoint

# What each class of transformers can load, as a mapping from configurations to models.
_MODELS = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
_NOT_TEXTS = {"pixel_values", "input_features", "input_values", "bbox"}  # images, sounds, layouts
_NAMES = ", ".join(map(repr, PACKAGED))
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model")


def find_folder(source: str | Path) -> tuple[Path, str]:
    """Return the folder and name of a model on this machine, or of one downloaded from the hub."""
    folder = Path(source).expanduser()
    if str(source) and folder.is_dir():
        return folder, folder.resolve().name
    near = did_you_mean(str(source), [*PACKAGED, *beside(folder)])
    if folder.is_file():
        raise TalosOSError(
            f"source must be {_NAMES}, a folder or the name of a model on the hub, got "
            f"{str(source)!r}, which is a file; pass the folder of the whole model"
        )
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise TalosOSError(
            f"source must be {_NAMES}, a folder or the name of a model on the hub, got "
            f"{str(source)!r}, which is no folder{near or '; check the path'}"
        )
    return _download(source, near or "; use 'minilm' where there is no network"), source


def configuration(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a configuration; return nothing where it cannot be read: the loader reports that."""
    try:
        content = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def save_json(content: object, path: Path) -> None:
    """Write a configuration file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def class_name(folder: Path) -> str:
    """Return the class of transformers that a folder was saved from, or AutoModel.

    Example:
        >>> from talos.app.models import load_encoder
        >>> class_name(load_encoder().path)
        'BertModel'
    """
    names = configuration(folder).get("architectures")
    return str(names[0]) if names and isinstance(names, list) else "AutoModel"


def takes_texts(folder: Path, auto: str) -> bool:
    """Return whether a class of transformers makes a model of texts alone of a configuration.

    A configuration that cannot be read passes: the loader reports that.
    """
    transformers = import_package("transformers")
    models = getattr(transformers, _MODELS[auto])
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            if type(config) not in models:
                return False
            model = models[type(config)]
    except Exception:  # a configuration may end in any error, by version
        return True
    if auto != "AutoModel":
        return True
    model = model[0] if isinstance(model, tuple) else model
    taken = set(inspect.signature(model.forward).parameters)
    return "input_ids" in taken and not taken & _NOT_TEXTS


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds files of a tokenizer."""
    return any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern))


def load_folder(folder: Path, auto: str, *, texts: bool = True) -> tuple[Any, Any]:
    """Load the model of a folder and its tokenizer; see `load_model`.

    Args:
        folder: the folder.
        auto: the class of transformers whose `from_pretrained` is called.
        texts: refuse a model that reads anything else than texts.

    Returns:
        The model and its tokenizer.
    """
    Checkpoint(folder)  # refuses other files
    if texts and not takes_texts(folder, auto):
        raise TalosValueError(
            f"source must be a text encoder or a language model, got a {class_name(folder)} in "
            f"{folder}; of other models only CLIP and DINOv2 are read: a CLIPModel, a model of "
            "open_clip or a Dinov2Model"
        )
    if configuration(folder) and not has_tokenizer(folder):
        raise TalosValueError(
            f"source must hold a tokenizer, got {folder} without one; save the model's tokenizer "
            "there with save_pretrained"
        )
    return load_model(folder, auto), load_tokenizer(folder)


def load_model(folder: Path, auto: str) -> Any:
    """Load the model of a folder with safetensors files in float32 and evaluation mode.

    Args:
        folder: the folder.
        auto: the class of transformers whose `from_pretrained` is called.
    """
    Checkpoint(folder)  # refuses other files
    local = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    try:
        return whole_model(auto, folder, folder, **local)
    except TalosValueError:
        raise
    except Exception as error:  # a configuration may end in any error, by version
        raise _unreadable(folder, error) from error


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """Load a tokenizer of transformers.

    Args:
        folder: the folder.
        **options: further ones of `AutoTokenizer.from_pretrained`.
    """
    transformers = import_package("transformers")
    try:
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, **options
            )
    except Exception as error:  # as above
        raise _unreadable(folder, error) from error


def whole_model(auto: str, source: Path | None, where: Path, **options: Any) -> Any:
    """Make a model of transformers in float32 and evaluation mode, with all of its weights.

    Attention is computed by "eager": it can be differentiated twice and in forward mode.

    Args:
        auto: the class of transformers whose `from_pretrained` is called.
        source: what it is called with; None: the options hold `config` and `state_dict`.
        where: what errors name.
        **options: further ones of `from_pretrained`.

    Raises:
        TalosValueError: a weight is missing or has another shape.
    """
    transformers = import_package("transformers")
    with quiet(transformers):
        model, report = getattr(transformers, auto).from_pretrained(
            source,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **options,
        )
    if others := report["mismatched_keys"]:
        name, found, wanted = sorted(others)[0]
        raise TalosValueError(
            f"source must have weights of the shapes of its configuration, got {where} with "
            f"{name} of {list(found)} in place of {list(wanted)}; save the model again with "
            "save_pretrained"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise TalosValueError(
            f"source must hold every weight of its configuration, got {where} without "
            f"{missing[0]} and {len(missing) - 1} others, which would be random; save the model "
            "again with save_pretrained"
        )
    return model.float().eval()


def _unreadable(folder: Path, error: Exception) -> TalosValueError:
    return TalosValueError(
        f"source must be a folder that transformers can load, got {folder}: {error!s:.300}"
    )


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
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


def _download(name: str, remedy: str) -> Path:
    """Download a model from the Hugging Face hub."""
    transformers = import_package("transformers")
    from huggingface_hub import snapshot_download

    patterns = ["model*.safetensors*", "talos/*.safetensors", "*.json", "*.txt", "*.model"]
    try:
        with quiet(transformers):
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # httpx, OSError and validation errors, by version
        raise TalosOSError(
            f"source must be {_NAMES}, a folder or the name of a model on the hub, got "
            f"{name!r}, which could not be downloaded ({first_line(error)}){remedy}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
