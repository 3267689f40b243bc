"""Where the command line writes: results to stdout, progress to stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bars", "Interrupted", "keeping", "next_step", "per_second", "say", "stdout"]


class Interrupted(Exception):
    """Ctrl-C, with a word on what is kept."""


@contextmanager
def keeping(what: str | Callable[[], str]) -> Iterator[None]:
    """Turns Ctrl-C inside the block into `Interrupted`.

    Args:
        what: a word on what is kept, or what makes it at that moment.

    Yields:
        Nothing.

    Raises:
        Interrupted: Ctrl-C was pressed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(what if isinstance(what, str) else what()) from None


def stdout() -> Console:
    """Makes a console for results.

    Returns:
        A console on the present stdout; without a terminal it is 100 columns wide.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console


def say(console: Console, text: str) -> None:
    """Prints a line as it is: no markup, no line breaks of ours.

    Args:
        console: where to.
        text: the line; it may hold names that a user chose.
    """
    console.print(text, markup=False, soft_wrap=True)


def next_step(console: Console, *commands: str) -> None:
    """Ends a command with what one would do next.

    Args:
        console: where to.
        *commands: command lines.
    """
    console.print("\n[bold]next[/bold]")
    for command in commands:
        say(console, f"  {command}")


class Bars:
    """A progress bar a phase, on stderr, with loss or speed and time left.

    Each finished phase leaves one line with its seconds; bars move on a terminal only.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._since = 0.0

    def __enter__(self) -> Self:
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops drawing; what was drawn stays."""
        self._progress.stop()

    def show(
        self,
        label: str,
        done: int,
        total: int,
        loss: float | None = None,
        unit: str | None = None,
    ) -> None:
        """Moves the bar of a phase; a new label begins a new bar.

        A finished bar gives way to a line: so many phases stacked would not fit on a screen.

        Args:
            label: names the phase.
            done: steps done.
            total: all steps.
            loss: the step's loss.
            unit: what the steps are; where it is given, the bar tells how many are done a second.
        """
        if self._bar is None:
            self._bar = self._progress.add_task(label, total=total, note="")
            self._since = time.monotonic()
        passed = time.monotonic() - self._since
        notes = [] if loss is None else [f"loss {loss:.3f}"]
        if unit is not None and done:
            notes.append(f"{per_second(done, passed)} {unit}/s")
        text = ", ".join(notes)
        self._progress.update(self._bar, description=label, completed=done, total=total, note=text)
        if done >= total:
            self._progress.remove_task(self._bar)
            self._bar = None
            self._console.print(f"{passed:6.1f} s  {label}  {text}".rstrip(), markup=False)


def per_second(count: int, seconds: float) -> str:
    """Writes a speed with three digits.

    Args:
        count: how many were done.
        seconds: in which time.

    Returns:
        For example "12.3" or "1,450".
    """
    speed = count / max(seconds, 1e-9)
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
