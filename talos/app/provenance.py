"""What a mask or a task vector was made with: written into its metadata, compared when it is used.

docs/format.md lists the keys.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from talos.app.models import Classifier, Encoder
from talos.app.models.heads import saved_head
from talos.app.nearest import several
from talos.app.tasks import ImageTask, Task
from talos.app.tasks.splits import SPLITS
from talos.masks import Mask
from talos.names import match_tensors, named_parameters
from talos.task_vectors.fingerprints import base_fingerprints
from talos.task_vectors.sums import origins

__all__ = [
    "USUAL_LENGTH",
    "base_of",
    "differences",
    "digest_of_reading",
    "digest_of_weights",
    "made_with",
    "other_tasks",
    "tokens_of",
]

USUAL_LENGTH = 48  # tokens of a text
_FIRST = 32  # examples of each split whose inputs a fingerprint covers


def made_with(
    task: Task | ImageTask, encoder: Encoder, max_length: int, **settings: object
) -> dict[str, Any]:
    """Return the metadata of a file that a command makes.

    Args:
        task: the data.
        encoder: the model.
        max_length: the tokens of a text that were kept; images have none.
        **settings: further ones: steps, lr, seed.
    """
    return {
        "task": task.name,
        "model": encoder.name,
        "class_names": list(task.class_names),
        "class_texts": list(task.class_texts),
        "data": task.fingerprint(),
        **({"max_length": max_length} if task.reads == "texts" else {}),
        **settings,
    }


def base_of(mask: Mask, model: nn.Module) -> str:
    """Return a fingerprint of the weights that a mask may select of: 16 hex digits."""
    return digest_of_weights(match_tensors(mask.shapes, named_parameters(model)))


def digest_of_weights(params: Mapping[str, Tensor]) -> str:
    """Return a fingerprint of named weights: 16 hex digits.

    Args:
        params: the weights; edits of this library on them do not count.
    """
    found = json.dumps(base_fingerprints(params), sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def digest_of_reading(task: Task | ImageTask, classifier: Classifier, max_length: int) -> str:
    """Return a fingerprint of what a model makes of a task's examples besides its weights.

    It covers the settings and buffers of the model, the first inputs of each split (tokens or
    pictures), and a head of tokens or one that was saved with the model. A head that is computed
    with the weights is left out: its last bits differ from machine to machine.

    Args:
        task: the data.
        classifier: of the task.
        max_length: tokens per text.

    Returns:
        16 hex digits.
    """
    encoder = classifier.encoder
    found = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(encoder)).encode())
    configs = {id(c): c for m in encoder.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        # Of transformers; a configuration of another kind by what it prints.
        content = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {"": str(config)}
        for key in ("_name_or_path", "transformers_version"):
            content.pop(key, None)
        found.update(json.dumps(content, sort_keys=True, default=str).encode())
    tensors = dict(encoder.named_buffers())
    tensors = {name: each for name, each in encoder.state_dict().items() if name in tensors}
    if saved_head(encoder, task) is not None or not classifier.head.is_floating_point():
        tensors["head"] = classifier.head
    for split in SPLITS:
        size = {"batch_size": _FIRST, "max_length": max_length}
        batch = next(iter(task.batches(split, encoder.tokenizer, **size).first(_FIRST)))
        tensors |= {f"{split} {name}": each for name, each in batch.items()}
    for name, each in tensors.items():
        found.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
        found.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found.update(f"{getattr(encoder, 'scale', 0.0):.6g}".encode())
    return found.hexdigest()[:16]


def tokens_of(task: str, made: Iterable[Mapping[str, Any]]) -> int:
    """Return the tokens of a text for a task: the most that a file was made with, else 48.

    Args:
        task: the task's name.
        made: the metadata of masks or vectors; those of other tasks do not count.

    Example:
        >>> tokens_of("a", [{"task": "a", "max_length": 96}, {"task": "b", "max_length": 128}])
        96
        >>> tokens_of("c", [])
        48
    """
    return max(_lengths(task, made), default=USUAL_LENGTH)


def differences(
    task: Task | ImageTask, max_length: int, file: object, metadata: Mapping[str, Any]
) -> list[str]:
    """Return a sentence for each difference of a task from the one that a file was made with.

    Args:
        task: the task at hand.
        max_length: the tokens of a text at hand.
        file: the mask or vector.
        metadata: of the file; what it says of other tasks does not count.
    """
    name = task.source or task.name
    found = []
    for of in origins(metadata):
        if of.get("task") != task.name:
            continue
        for key, what in (("class_names", "labels"), ("class_texts", "texts of the labels")):
            now = list(getattr(task, key))
            if (was := of.get(key, now)) != now:
                found.append(
                    f"{file} was made with other {what} of {task.name} ({_few(was)}) than {name} "
                    f"has ({_few(now)})"
                )
                break
        else:
            if of.get("data", task.fingerprint()) != task.fingerprint():
                found.append(
                    f"the test examples of {name} are not those of when {file} was made; it may "
                    "have been made with some of them"
                )
    if task.reads == "texts":
        found += [
            f"{file} was made with {length} tokens of a text of {task.name}, got {max_length}; "
            "leave --max-length out to take as many"
            for length in sorted(_lengths(task.name, [metadata]) - {max_length})
        ]
    return list(dict.fromkeys(found))


def other_tasks(tasks: Iterable[str], metadata: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a file was made for, if none of them is at hand.

    Args:
        tasks: the names of those at hand.
        metadata: of the file.

    Example:
        >>> other_tasks(["b"], {"task": "a"}), other_tasks(["a", "b"], {"task": "a"})
        (['a'], [])
    """
    made = dict.fromkeys(str(of["task"]) for of in origins(metadata) if "task" in of)
    return [] if set(made) & set(tasks) else list(made)


def _lengths(task: str, made: Iterable[Mapping[str, Any]]) -> set[int]:
    every = [of for metadata in made for of in origins(metadata) if of.get("task") == task]
    return {of["max_length"] for of in every if isinstance(of.get("max_length"), int)}


def _few(names: object) -> str:
    shown = [str(name) for name in names] if isinstance(names, list) else [str(names)]
    return several(shown)
