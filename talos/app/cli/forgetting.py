"""`talos eval --forget`: which task is forgotten, and which ones are kept."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talos.app.cli.options import as_options
from talos.app.cli.suggestions import subtracts
from talos.errors import TalosValueError
from talos.options import fraction

if TYPE_CHECKING:
    from talos.app.tasks import ImageTask, Task

__all__ = ["KEEP", "Forgetting", "check_forget", "check_sign", "forgetting"]

KEEP = 0.95  # of the control's accuracy, as the paper does


@dataclass(frozen=True)
class Forgetting:
    """A task to forget.

    Attributes:
        target: its name.
        control: the names of the tasks to keep.
        keep: the share of their accuracy to keep.
    """

    target: str
    control: list[str]
    keep: float


def check_forget(
    forget: str | None,
    control: Sequence[str],
    keep: float | None,
    vectors: Sequence[Path],
    others: Mapping[str, object],
) -> None:
    """Refuse options that do not fit --forget, before anything is loaded.

    Args:
        forget: --forget.
        control: each --control.
        keep: --keep.
        vectors: each --vector.
        others: options that --forget replaces, with their values.

    Raises:
        TalosValueError: there is no --forget, it lacks one vector, or another option contradicts.
    """
    if forget is None:
        if control or keep is not None:
            raise TalosValueError(
                f"--forget must be given with {'--control' if control else '--keep'}, got none; "
                "name the task to forget"
            )
        return
    if len(vectors) != 1:
        raise TalosValueError(
            f"--vector must be given once with --forget, that of the task to forget, got "
            f"{len(vectors)}"
        )
    for name, value in others.items():
        if value:
            raise TalosValueError(f"{name} must be left out with --forget, got {value}")
    if keep is not None:
        fraction("--keep", keep)


def check_sign(path: Path, metadata: Mapping[str, Any], search: str | None) -> None:
    """Refuse to search a coefficient of a file that subtracts a vector.

    Args:
        path: the file.
        metadata: of its vector.
        search: the option that asks for the search; None: there is none.

    Raises:
        TalosValueError: the highest accuracy would undo what the file subtracts.
    """
    if search == "--forget" and subtracts(metadata):
        raise TalosValueError(
            f"--vector must be the vector of the task to forget, got {path}, which subtracts one; "
            "pass the vector that it subtracts"
        )
    if search is not None and subtracts(metadata):
        raise TalosValueError(
            f"--scale must be a number for {path}, which subtracts a vector, got grid, which would "
            "undo it: it takes the highest accuracy; to search how much to subtract, pass the "
            "vector that it subtracts, with --forget TASK"
        )


def forgetting(
    forget: str,
    control: Sequence[str],
    keep: float | None,
    data: list[str],
    tasks: "list[Task | ImageTask]",
    load: "Callable[[str], Task | ImageTask]",
) -> Forgetting:
    """Find the tasks that --forget and --control name; add a control that is not among --data.

    Args:
        forget: --forget.
        control: each --control; none: all other tasks.
        keep: --keep.
        data: each --data; what a control adds is added to it.
        tasks: the task of each, in the same way.
        load: loads what --data names.

    Returns:
        The names of the tasks.

    Raises:
        TalosValueError: --forget names no task of --data, or a control is it.
    """

    def named(option: str) -> str | None:
        pairs = list(zip(data, tasks, strict=True))
        paths = {os.path.realpath(given): task.name for given, task in pairs}
        names = {task.name: task.name for _, task in pairs}
        return names.get(option) or paths.get(os.path.realpath(option))

    target = named(forget)
    if target is None:
        known = ", ".join(task.name for task in tasks)
        raise TalosValueError(f"--forget must be a task of --data, {known}, got {forget}")
    for each in control:
        if named(each) is None:
            with as_options({"--data": "--control"}):
                tasks.append(load(each))
            data.append(each)
    names = [str(named(each)) for each in control]
    kept = list(dict.fromkeys(names)) or [t.name for t in tasks if t.name != target]
    if not kept or target in kept:
        raise TalosValueError(
            f"--control must be a task other than {target}, which is forgotten, got "
            f"{', '.join(control) or 'no other --data'}; add --control with a task to keep"
        )
    return Forgetting(target, kept, KEEP if keep is None else keep)
