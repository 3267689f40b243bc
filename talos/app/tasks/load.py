"""Load any data by its name, as every command's --data and every recipe takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from talos.app.nearest import beside, did_you_mean, several
from talos.app.tasks.catalogue import PACKAGED
from talos.app.tasks.files import SUFFIXES, load_file
from talos.app.tasks.hub import PAPER, PREFIX, load_hub
from talos.app.tasks.images import ImageTask, load_digits, load_image_folder
from talos.app.tasks.registry import checked_sizes, load_packaged, load_task
from talos.app.tasks.splits import SPLITS, by_turns
from talos.app.tasks.standard_library import SOURCES
from talos.app.tasks.task import Task
from talos.errors import TalosValueError

__all__ = ["built_in", "load_any"]

T = TypeVar("T", Task, ImageTask)


def built_in() -> list[str]:
    """Return the names of the built-in tasks, of which some need a package.

    Example:
        >>> "cifar10" in built_in()
        True
    """
    return [*(task.name for task in SOURCES), "digits", *(task.name for task in PACKAGED)]


def load_any(
    data: str,
    sizes: Sequence[int] | None = None,
    *,
    name: str = "",
    text: str = "",
    label: str = "",
    train: str = "",
    validation: str = "",
    test: str = "",
    template: str | Sequence[str] = (),
    answers: str | Sequence[str] = (),
    class_texts: Sequence[str] = (),
    revision: str = "",
) -> Task | ImageTask:
    """Load a built-in task, a file, a folder of images or a data set, in the splits of seed 0.

    No seed of a command changes the splits: otherwise a model could be evaluated on its training
    data.

    Args:
        data: the name of a built-in task, the path of a file or folder, or a data set as
            `load_hub` takes it: "hf:OWNER/NAME", "hf:FOLDER" or "paper:NAME".
        sizes: largest number of train, validation and test examples. By default a built-in task
            has at most 1600, 96 and 400, and other data is taken whole.
        name: the task's name; "" for the usual one.
        text: the column of a file or data set that holds the texts; "" for the usual one.
        label: the column of a file or data set that holds the labels; "" for `label`.
        train: of a data set, as `load_hub` takes it.
        validation: of a data set, too.
        test: of a data set, too.
        template: of a data set, too.
        answers: of a data set, too.
        class_texts: of a data set, too.
        revision: of a data set, too.

    Raises:
        TalosOSError: the data cannot be read, or its package is not on this machine.
        TalosTypeError: one of `sizes` is not an integer.
        TalosValueError: there is no such data, it has no such setting, or it cannot be split into
            a task.

    Example:
        >>> load_any("character_kind", (60, 12, 12), name="characters").name
        'characters'
    """
    given: dict[str, Any] = {
        "text": text,
        "label": label,
        "train": train,
        "validation": validation,
        "test": test,
        "template": template,
        "answers": answers,
        "class_texts": class_texts,
        "revision": revision,
    }
    task = _load(data, sizes, {key: value for key, value in given.items() if value})
    return replace(task, name=name) if name else task


def _load(data: str, sizes: Sequence[int] | None, settings: Mapping[str, Any]) -> Task | ImageTask:
    path = Path(data)
    if not data.startswith(PREFIX):
        known = ("text", "label") if path.is_file() else ()
        for key in settings.keys() - known:
            raise TalosValueError(
                f"{key} must be left out with {data}, got {settings[key]!r:.80}; it is for data "
                "sets such as hf:OWNER/NAME" + ", or for files" * (key in ("text", "label"))
            )
    if data.startswith((PREFIX, PAPER)):
        return load_hub(data, sizes, **settings)
    if path.is_file():
        return _limited(load_file(path, **settings), sizes)
    if data == "digits":
        return _limited(load_digits(), sizes)
    if path.is_dir():
        images = load_image_folder(path)
        images.check()
        return _limited(images, sizes)
    if data in [task.name for task in SOURCES]:
        return load_task(data, sizes=sizes)
    if data in [task.name for task in PACKAGED]:
        return load_packaged(data, sizes=sizes)
    files = [each for each in beside(path) if Path(each).suffix.lower() in SUFFIXES]
    stems = {str(Path(each).with_suffix("")): each for each in files}
    near = did_you_mean(data, [*built_in(), *files])
    near = f"; did you mean {stems[data]}?" if data in stems else near
    near = near or f"; built in are {several(built_in(), most=8)}"
    raise TalosValueError(
        "data must be a built-in task, a data set such as hf:OWNER/NAME, or an existing .csv, .tsv "
        f"or .jsonl file or folder of images, got {data}{near}"
    )


def _limited(task: T, sizes: Sequence[int] | None) -> T:
    """Keep at most so many examples of each split, of all classes alike where there are enough."""
    if sizes is None:
        return task
    wanted = checked_sizes(sizes, len(task.class_names), task.name)
    train, validation, test = (
        _first(task.examples(split), size) for split, size in zip(SPLITS, wanted, strict=True)
    )
    return replace(task, train=train, validation=validation, test=test)


def _first(examples: Sequence[Any], size: int) -> list[Any]:
    """Return the first `size` examples, counted within each class, in their order."""
    return [examples[at] for at in sorted(by_turns([each.label for each in examples])[:size])]
