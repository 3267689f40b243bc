"""The tasks that are made of the Python installation itself, by name."""

import difflib
import functools
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from talos.app.tasks.sources import library_folder
from talos.app.tasks.splits import DEFAULT_SIZES, SPLITS, Candidate, split_groups
from talos.app.tasks.standard_library import SOURCES, TaskSource
from talos.app.tasks.task import Example, Task
from talos.errors import TalosTypeError, TalosValueError

# Below this a class cannot be learned and its accuracy has no meaning.
MIN_CLASS = 100

_BY_NAME = {source.name: source for source in SOURCES}


def available_tasks(*, source: str | Path | None = None) -> list[str]:
    """Lists the tasks for which this Python installation holds enough text.

    Reading the installation takes a few seconds the first time in a process.

    Args:
        source: Folder of another Python's standard library. Tasks that take their texts from the
            running interpreter are not listed then.

    Returns:
        Names for `load_task`, always in the same order.

    Raises:
        TalosOSError: `source` is not a folder.

    Example:
        >>> "character_kind" in available_tasks()
        True
    """
    folder = library_folder(source)
    return [
        task.name
        for task in SOURCES
        if not (task.from_interpreter and source is not None) and _lacking(task, folder) is None
    ]


def load_task(
    name: str,
    *,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    source: str | Path | None = None,
) -> Task:
    """Loads a task made of the texts of a Python installation.

    The same name, seed, sizes and Python version give the same task on every machine. No text is
    in two splits, and no file (or row or region, as the task's description says). Every class is
    equally often in a split, up to one example.

    Args:
        name: One of `available_tasks()`.
        seed: Decides which files come into which split, and which texts are drawn.
        sizes: Largest number of train, validation and test examples, by default 1600, 400, 600. A
            split is smaller where there is less text.
        source: Folder of the standard library to read, by default the running interpreter's.

    Returns:
        The task, with at least one example of each class in every split.

    Raises:
        TalosOSError: `source` is not a folder.
        TalosTypeError: `seed` or one of `sizes` is not an integer.
        TalosValueError: There is no such task, the installation holds too little text for it, or
            `sizes` are not three numbers of at least one example per class.

    Example:
        >>> task = load_task("character_kind", sizes=(60, 12, 12))
        >>> len(task.train), task.class_names[:2]
        (60, ('letter', 'mark'))
    """
    task = _BY_NAME.get(name)
    if task is None:
        near = difflib.get_close_matches(str(name), _BY_NAME, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TalosValueError(
            f"name must be a known task, got {name!r}; {hint}known are {', '.join(_BY_NAME)}"
        )
    if task.from_interpreter and source is not None:
        raise TalosValueError(
            f"source must be None for {name}, got {str(source)!r}; its texts come from the running "
            "interpreter"
        )
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TalosTypeError(f"seed must be an integer, got {seed!r}") from None
    wanted = _check_sizes(sizes, len(task.classes))
    folder = library_folder(source)
    lacking = _lacking(task, folder)
    if lacking is not None:
        raise TalosValueError(lacking)
    splits = split_groups(_candidates(task.name, folder), len(task.classes), seed, wanted)
    train, validation, test = (
        [Example(c.text, c.label, c.origin) for c in candidates] for candidates in splits
    )
    return Task(
        name=task.name,
        description=task.description,
        class_names=tuple(task.classes),
        class_texts=tuple(task.classes.values()),
        train=train,
        validation=validation,
        test=test,
    )


def _check_sizes(sizes: Sequence[int] | None, n_classes: int) -> tuple[int, int, int]:
    given = DEFAULT_SIZES if sizes is None else sizes
    try:
        numbers = [operator.index(size) for size in given]
    except TypeError:
        raise TalosTypeError(f"sizes must be three integers, got {given!r}") from None
    if len(numbers) != len(SPLITS) or min(numbers) < n_classes:
        raise TalosValueError(
            f"sizes must be three numbers of at least {n_classes}, one example per class, got "
            f"{tuple(numbers)}; the order is train, validation, test"
        )
    return numbers[0], numbers[1], numbers[2]


@functools.lru_cache(maxsize=32)
def _candidates(name: str, folder: Path) -> list[Candidate]:
    return _BY_NAME[name].build(folder)


def _lacking(task: TaskSource, folder: Path) -> str | None:
    """Returns what keeps a task from being made of a folder, or None."""
    counts = Counter(candidate.label for candidate in _candidates(task.name, folder))
    if all(counts[label] >= MIN_CLASS for label in range(len(task.classes))):
        return None
    found = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(task.classes))
    return (
        f"name must be a task with at least {MIN_CLASS} texts of each class in the standard "
        f"library, got {task.name} with {found} in {folder}; install the library's sources and "
        "tests (Debian: the packages libpython3-stdlib and libpython3-testsuite), or give the "
        "library folder of another Python as source"
    )
