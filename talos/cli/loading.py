"""Models and data as the options name them."""

from pathlib import Path

from talos.demo.machine import default_device
from talos.models import TextEncoder, ZeroShotClassifier, load_text_encoder
from talos.tasks import Task, load_file, load_task

__all__ = ["load_classifier", "load_data", "load_encoder"]


def load_data(data: str) -> Task:
    """Loads a built-in task or a file, in the splits of seed 0.

    The commands' --seed is for training and labels only: were the splits to follow it, a model
    could be evaluated on what it was trained on.

    Args:
        data: a task's name, or a path that ends in .csv or .jsonl or exists.

    Returns:
        The task.

    Raises:
        TalosValueError: there is no such task, or the file's content is wrong.
        TalosOSError: the file cannot be read.
    """
    path = Path(data)
    if path.suffix.lower() in (".csv", ".jsonl") or path.is_file():
        return load_file(path)
    return load_task(data)


def load_encoder(model: str) -> TextEncoder:
    """Loads an encoder to the GPU, or the CPU where there is none.

    Args:
        model: minilm, a folder, or a name on the hub.

    Returns:
        The encoder, in evaluation mode.
    """
    return load_text_encoder(model).to(default_device())


def load_classifier(model: str, task: Task) -> ZeroShotClassifier:
    """Loads an encoder with the zero-shot head of a task.

    Args:
        model: minilm, a folder, or a name on the hub.
        task: its class texts make the head.

    Returns:
        The classifier.
    """
    return ZeroShotClassifier(load_encoder(model), task.class_texts)
