"""The output of the command line: results on stdout; progress, notes and next steps on stderr."""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table

__all__ = [
    "Bars",
    "Interrupted",
    "command",
    "next_step",
    "note",
    "on_interrupt",
    "per_second",
    "print_line",
    "printable",
    "stdout",
    "table",
    "unused",
]

T = TypeVar("T")

_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")  # not tab and line feed


def printable(text: str) -> str:
    r"""Return a text without control characters: a name in a file may hold orders to a terminal.

    Example:
        >>> printable("a\x1b[2Jb")
        'a�[2Jb'
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class _Console(Console):
    """A console that shows every text as `printable` returns it."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


class Interrupted(Exception):
    """Ctrl-C, with a message on what was written."""


@contextmanager
def on_interrupt(message: str | Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted` with this message, or with what the function returns."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message if isinstance(message, str) else message()) from None


def stdout(json: str | None = None) -> Console:
    """Return a console for results; without a terminal it is wide enough for any table.

    Args:
        json: the option --json; a console for "-" prints nothing, because the JSON is on stdout.
    """
    console = _Console(highlight=False, quiet=json == "-")
    if not console.is_terminal:
        console.width = max(console.width, 200)
    return console


def print_line(console: Console, text: str) -> None:
    """Print a line without markup and without line breaks; it may hold a user's names."""
    console.print(text, markup=False, soft_wrap=True)


def command(*words: object) -> str:
    """Return a command line of `talos`, quoted for a shell; its --out is a file that is not there.

    Example:
        >>> command("inspect", "a mask.safetensors")
        "talos inspect 'a mask.safetensors'"
    """
    after_out = zip(words, ("", *words), strict=False)
    new = [unused(Path(str(word))) if before == "--out" else word for word, before in after_out]
    return shlex.join(["talos", *map(str, new)])


def unused(path: Path) -> Path:
    """Return a path where nothing is yet: this one, or with the first number that is free."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(each for each in chain([path], numbered) if not os.path.lexists(each))


def note(text: str) -> None:
    """Print a line that is no result, on stderr: a warning, or what was read or left out."""
    print_line(_stderr(), text)


def next_step(*commands: str) -> None:
    """Print the commands that a user would run next, on stderr."""
    _stderr().print("\n[bold]next[/bold]")
    for command in commands:
        note(f"  {command}")


def _stderr() -> Console:
    return _Console(stderr=True, highlight=False)


class Bars:
    """A progress bar for each phase, on stderr, with loss or speed and the time left.

    A finished phase leaves one line with its seconds. Bars are drawn on a terminal only.
    """

    def __init__(self) -> None:
        self._console = _stderr()
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
        self._first = 0

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._progress.stop()

    def show(
        self,
        label: str,
        done: int,
        total: int,
        loss: float | None = None,
        unit: str | None = None,
    ) -> None:
        """Update the bar of a phase; a new label begins a new bar.

        Args:
            label: the name of the phase.
            done: steps done.
            total: all steps.
            loss: the loss of the step.
            unit: the unit of the steps, for a speed per second.
        """
        if self._bar is None:
            self._bar = self._progress.add_task(label, total=total, note="")
            self._since, self._first = time.monotonic(), done
        passed = time.monotonic() - self._since
        notes = [] if loss is None else [f"loss {loss:.3f}"]
        if unit is not None and done > self._first:
            notes.append(f"{per_second(done - self._first, passed)} {unit}/s")
        text = ", ".join(notes)
        self._progress.update(self._bar, description=label, completed=done, total=total, note=text)
        if done >= total:
            self._progress.remove_task(self._bar)
            self._bar = None
            print_line(self._console, f"{passed:6.1f} s  {label}  {text}".rstrip())

    def each(self, label: str, items: Sequence[T]) -> Iterator[T]:
        """Yield the items of a phase, and update its bar after each."""
        self.show(label, 0, len(items))
        for done, item in enumerate(items, 1):
            yield item
            self.show(label, done, len(items))


def table(left: Sequence[str], right: Sequence[str]) -> Table:
    """Return a table without a box: columns of text, then columns of numbers."""
    made = Table(box=None, header_style="bold")
    for column in left:
        made.add_column(column)
    for column in right:
        made.add_column(column, justify="right")
    return made


def per_second(count: int, seconds: float) -> str:
    """Format a speed with three digits, for example "12.3" or "1,450"."""
    speed = count / max(seconds, 1e-9)
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
