"""The tasks that are built in, by name: of the Python installation itself, and of packages."""

import difflib
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from talos.app.nearest import did_you_mean
from talos.app.tasks.catalogue import PACKAGED, PackagedTask
from talos.app.tasks.images import ImageExample, ImageTask
from talos.app.tasks.package_images import Picture
from talos.app.tasks.sources import library_folder
from talos.app.tasks.splits import DEFAULT_SIZES, SPLITS, Candidate, split_groups
from talos.app.tasks.standard_library import SOURCES, TaskSource
from talos.app.tasks.task import Example, Task
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.options import integer

# A class with fewer texts cannot be learned, and its accuracy has no meaning.
MIN_TEXTS = 100

_BY_NAME = {source.name: source for source in SOURCES}


def available_tasks() -> list[str]:
    """List the tasks for which this Python installation holds enough text.

    Reading the installation takes a few seconds the first time in a process.

    Returns:
        Names for `load_task`, always in the same order.

    Example:
        >>> "character_kind" in available_tasks()
        True
    """
    return [task.name for task in SOURCES if _lacking(task) is None]


def load_task(name: str, *, seed: int = 0, sizes: Sequence[int] | None = None) -> Task:
    """Load a task made of the texts of the running Python's standard library.

    The same name, seed, sizes and Python version give the same task on every machine. No text is
    in two splits, and no file (or row or region, as the task's description says). All classes are
    equally large in a split, up to one example.

    Args:
        name: one of `available_tasks()`.
        seed: decides which files are in which split, and which texts are drawn.
        sizes: largest number of train, validation and test examples, by default 1600, 96, 400. A
            split is smaller where there is less text. A smaller one is a part of a larger one.

    Returns:
        The task, with at least one example of each class in every split.

    Raises:
        TalosTypeError: one of `sizes` is not an integer.
        TalosValueError: there is no such task, or the installation holds too little text for it.
            Or `seed` is not an integer, or `sizes` are not three numbers of at least one example
            per class.

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
    wanted = checked_sizes(sizes, len(task.classes), name)
    lacking = _lacking(task)
    if lacking is not None:
        raise TalosValueError(lacking)
    splits = split_groups(_candidates(task.name), len(task.classes), seed, wanted)
    examples = [[Example(c.text, c.label, c.origin) for c in split] for split in splits]
    return Task(
        task.name,
        task.description,
        tuple(task.classes),
        tuple(task.classes.values()),
        *examples,
    )


def load_packaged(
    name: str, *, seed: int = 0, sizes: Sequence[int] | None = None
) -> Task | ImageTask:
    """Load a task whose data lies in a package; docs/data.md lists them.

    No text or picture is in two splits, and all classes are equally large in a split, up to one
    example.

    Args:
        name: the task's name.
        seed: decides which examples are in which split, and which are drawn.
        sizes: largest number of train, validation and test examples, by default 1600, 96, 400.

    Raises:
        TalosOSError: the package is not on this machine; the message says how to get it.
        TalosTypeError: one of `sizes` is not an integer.
        TalosValueError: there is no such task, or the package holds something else. Or `seed` is
            not an integer, or `sizes` are not three numbers of at least one example per class.
    """
    known = {task.name: task for task in PACKAGED}
    if name not in known:
        raise TalosValueError(
            f"name must be a known task, got {name!r}{did_you_mean(name, known)}; known are "
            f"{', '.join(known)}"
        )
    task = known[name]
    wanted = checked_sizes(sizes, len(task.classes), name)
    integer("seed", seed, 0)
    path = task.package.find(name)
    try:
        found: Sequence[Candidate | Picture] = task.build(path)
        splits = split_groups(found, len(task.classes), seed, wanted)
        if not all(splits):
            raise LookupError("too few examples")
        examples = [[_example(each) for each in split] for split in splits]
    except TalosRuntimeError:  # a package that reads the data is not installed
        raise
    except Exception as error:  # the readers raise any error over a damaged file
        raise _damaged(task, path, str(error) or type(error).__name__) from error
    kind: Any = ImageTask if isinstance(examples[0][0], ImageExample) else Task
    about = (name, task.description, tuple(task.classes), tuple(task.classes.values()))
    made: Task | ImageTask = kind(*about, *examples)
    return made


def _example(found: Candidate | Picture) -> Example | ImageExample:
    if isinstance(found, Picture):
        return ImageExample(found.pixels(), found.label)
    return Example(found.text, found.label, found.origin)


def _damaged(task: PackagedTask, path: Path, found: str) -> TalosValueError:
    return TalosValueError(
        f"data must be {task.package.name} as it was published, got {path} without the data of "
        f"{task.name} ({found:.200}); remove it and run: {task.package.command()}"
    )


def checked_sizes(sizes: Sequence[int] | None, n_classes: int, data: str) -> tuple[int, int, int]:
    """Return the sizes of the splits, by default 1600, 96, 400.

    Args:
        sizes: as of `load_task`.
        n_classes: number of classes.
        data: the data's name, for messages.

    Raises:
        TalosTypeError: one of `sizes` is not an integer.
        TalosValueError: they are not three numbers of at least `n_classes`.
    """
    given = DEFAULT_SIZES if sizes is None else tuple(sizes)
    if not all(isinstance(size, int) for size in given):
        raise TalosTypeError(f"sizes must be three integers, got {given!r}")
    if len(given) != len(SPLITS) or min(given) < n_classes:
        raise TalosValueError(
            f"sizes must be three numbers of at least {n_classes}, one example per class of "
            f"{data}, got {given}; the order is train, validation, test"
        )
    return given[0], given[1], given[2]


@functools.cache
def _candidates(name: str) -> list[Candidate]:
    return _BY_NAME[name].build(library_folder())


def _lacking(task: TaskSource) -> str | None:
    """Return why a task cannot be made, or None."""
    counts = Counter(candidate.label for candidate in _candidates(task.name))
    if all(counts[label] >= MIN_TEXTS for label in range(len(task.classes))):
        return None
    found = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(task.classes))
    return (
        f"name must be a task with at least {MIN_TEXTS} texts of each class in the standard "
        f"library, got {task.name} with {found} in {library_folder()}; install the library's "
        "sources and tests (Debian: the packages libpython3-stdlib and libpython3-testsuite)"
    )
