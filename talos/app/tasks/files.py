"""Tasks from a user's file: CSV or JSON lines with a text and a label in each row."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from talos.app.nearest import several
from talos.app.tasks.splits import MIN_CLASS, split_classes, words
from talos.app.tasks.task import Example, Task
from talos.errors import TalosOSError, TalosValueError

SUFFIXES = (".csv", ".tsv", ".jsonl")
COLUMNS = ("text", "label")
LABEL_TEXT = "label_text"  # a column that may be left out
_WHOLE = re.compile(r"-?\d{1,600}")  # Python reads no number of thousands of digits
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def load_file(
    path: str | Path,
    *,
    class_texts: Mapping[str, str] | None = None,
    seed: int = 0,
    text: str = "text",
    label: str = "label",
) -> Task:
    r"""Load a task from a file and split it 80/10/10 within each class.

    A `.csv` or `.tsv` file has a header row with the columns `text` and `label`, which commas,
    semicolons or tabs divide. Each line of a `.jsonl` file is an object with these
    keys. All are UTF-8. A row that repeats a text with the same label is
    dropped, so that no text is in two splits. The zero-shot head is made of the labels, with
    spaces for underscores and hyphens. A third column, `label_text`, describes a label in better
    words; one row of each label is enough, and the others may be empty. Other columns are ignored.

    Args:
        path: the file.
        class_texts: the text of each label that it names, in place of the file's.
        seed: decides which rows are in which split.
        text: the column of the texts, if it has another name.
        label: the column of the labels, if it has another name.

    Returns:
        The task, named like the file without its suffix. Its classes are the labels, sorted; by
        value where all are whole numbers.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: the file has another suffix, is not what its suffix says, lacks a column
            or has no rows. Or a text or label is empty, a text has two labels, there are fewer
            than two classes, a class has fewer than three texts, or `seed` is not an integer. Or a
            label has two texts, or `class_texts` names one that is not in the file.

    Example:
        >>> import pathlib, tempfile
        >>> rows = [f"{w} {i},{w}" for w in ("cat", "dog") for i in range(10)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "pets.csv")
        ...     _ = path.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
        ...     task = load_file(path)
        >>> task.class_names, len(task.train), len(task.validation), len(task.test)
        (('cat', 'dog'), 16, 2, 2)
    """
    path = Path(path)
    columns = text, label
    if LABEL_TEXT in columns or text == label:
        raise TalosValueError(
            f"text and label must be two columns, none of them {LABEL_TEXT}, got {text!r} and "
            f"{label!r}"
        )
    found = _unique(path, _read(path, columns, columns))
    rows = found.labels
    counts = Counter(rows.values())
    if len(counts) < 2:
        raise TalosValueError(
            f"path must hold at least two classes, got {len(counts)} ({', '.join(counts)}) in "
            f"{path}; add rows with another label"
        )
    small = [f"{name!r} {count}" for name, count in counts.items() if count < MIN_CLASS]
    if small:
        raise TalosValueError(
            f"path must hold at least {MIN_CLASS} different texts of each class, one for each "
            f"split, got {several(small)} in {path}; add rows or leave these classes out"
        )
    if unknown := [name for name in class_texts or () if name not in counts]:
        raise TalosValueError(
            f"class_texts must name labels of {path}, got {unknown[0]!r}; its labels are "
            f"{several(sorted(counts), unknown[0])}"
        )
    texts = found.label_texts | dict(class_texts or {})
    whole = all(_WHOLE.fullmatch(name) for name in counts)
    names = sorted(counts, key=lambda name: (int(name) if whole else 0, name))
    classes = [
        [Example(row, number) for row, found in rows.items() if found == name]
        for number, name in enumerate(names)
    ]
    return Task(
        path.stem,
        f"Rows of {path.name}, split 80/10/10 within each class.",
        tuple(names),
        tuple(texts.get(name) or words(name) for name in names),
        *split_classes(classes, seed),
        source=path.name,
        repeats=found.rows - len(rows),
    )


@dataclass
class _Found:
    """What a file holds: the label of each text in its order, each label's text, all rows."""

    labels: dict[str, str] = field(default_factory=dict)
    label_texts: dict[str, str] = field(default_factory=dict)
    rows: int = 0


def _unique(path: Path, rows: Iterator[tuple[int, str, str, str]]) -> _Found:
    """Collect the rows of a file, each text once."""
    found = _Found()
    first: dict[str, int] = {}
    for line, text, label, label_text in rows:
        found.rows += 1
        if found.labels.setdefault(text, label) != label:
            raise TalosValueError(
                f"path must give each text one label, got {found.labels[text]!r} in line "
                f"{first[text]} and {label!r} in line {line} of {path}; remove one of the rows"
            )
        first.setdefault(text, line)
        if label_text and found.label_texts.setdefault(label, label_text) != label_text:
            raise TalosValueError(
                f"path must give each label one {LABEL_TEXT}, got {found.label_texts[label]!r} and "
                f"{label_text!r} for {label!r} in line {line} of {path}; keep one of them"
            )
    if not found.labels:
        raise TalosValueError(f"path must hold at least one row, got an empty {path}")
    return found


def read_texts(path: Path) -> list[tuple[str, str]]:
    """Read the texts of a file, each with its label, or with "" where the file has none.

    Args:
        path: a file as `load_file` takes it, in which labels may be missing.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: it is not what its suffix says, lacks the column text or has no rows.
    """
    rows = [(text, label) for _, text, label, _ in _read(path, COLUMNS, ("text",))]
    if not rows:
        raise TalosValueError(f"path must hold at least one row, got an empty {path}")
    return rows


def _read(
    path: Path, columns: tuple[str, str], needed: Sequence[str]
) -> Iterator[tuple[int, str, str, str]]:
    """Yield line number, text, label and the label's text of each row.

    Args:
        path: the file.
        columns: those of the texts and labels.
        needed: those of them that must be there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise TalosValueError(
            f"path must end in {' or '.join(SUFFIXES)}, got {path}; save the rows in one of "
            "these forms"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TalosOSError(
            f"path must be a file that can be read, got {path} ({error.strerror})"
        ) from error
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TalosValueError(
            f"path must hold UTF-8 text, got byte {content[error.start]:#04x} at position "
            f"{error.start} of {path}; save the file as UTF-8"
        ) from error
    read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv
    for line, row in read(path, decoded, columns, needed):
        for column in needed:
            if not row[column].strip():
                raise TalosValueError(
                    f"path must give each row a {column}, got an empty one in line {line} of "
                    f"{path}; fill it in or remove the row"
                )
        text, label, label_text = (row.get(key, "").strip() for key in (*columns, LABEL_TEXT))
        try:
            f"{text}{label}{label_text}".encode()
        except UnicodeEncodeError as error:  # "\\ud800" in JSON is half a character
            raise TalosValueError(
                f"path must hold valid Unicode, got {error.object[error.start]!a} in line {line} "
                f"of {path}; replace it"
            ) from error
        yield line, text, label, label_text


def _missing(path: Path, line: int, found: list[str], needed: Sequence[str]) -> TalosValueError:
    nearly = {name.strip().casefold(): name for name in found}
    wrong = [f"{nearly[each]!r} to {each}" for each in needed if nearly.get(each, each) != each]
    absent = [each for each in needed if each not in found]
    remedy = "rename the columns" if len(absent) == len(needed) else f"add the column {absent[0]}"
    remedy = f"rename {' and '.join(wrong)}" if wrong else remedy
    remedy += ", or name others in a recipe" if len(needed) > 1 else ""
    own = {"text", "label"}
    if not wrong and absent[0] in own and not own.issuperset(needed):  # a recipe names columns
        others = [name for name in found if name not in needed] or ["..."]
        remedy = f'say which one it is, such as {absent[0]} = "{others[0]}"'
    columns = f"the column{'s' * (len(needed) - 1)} {' and '.join(needed)}"
    return TalosValueError(
        f"path must have {columns}, got {several(found) or 'none'} in line {line} of {path}; "
        f"{remedy}"
    )


def _check_once(path: Path, line: int, found: list[str], columns: tuple[str, str]) -> None:
    """Refuse a header that names a column twice, which of two would be a guess."""
    if twice := [each for each in (*columns, LABEL_TEXT) if found.count(each) > 1]:
        raise TalosValueError(
            f"path must have the column {twice[0]} once, got it {found.count(twice[0])} times in "
            f"line {line} of {path}; rename the others"
        )


def _read_csv(
    path: Path, content: str, columns: tuple[str, str], needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows, divided by what divides the needed columns in the header."""
    if not content.strip():
        return
    blank = re.match(r"(?: *\r?\n)*", content)
    first = 1 + (blank[0].count("\n") if blank else 0)
    content = content[blank.end() if blank else 0 :]
    limit = csv.field_size_limit(len(content))  # as it is, a text of 128 KiB is a fault
    headers: list[list[str]] = []
    try:
        for delimiter in _DELIMITERS:
            # Not splitlines(): texts may hold other line ends, such as U+2028, unquoted.
            lines = io.StringIO(content, newline="")
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            headers.append(list(reader.fieldnames or ()))
            if set(needed) <= set(headers[-1]):
                _check_once(path, first, headers[-1], columns)
                rows = [(reader.line_num + first - 1, row) for row in reader]
                break
        else:
            raise _missing(path, first, max(headers, key=len), needed)
    except csv.Error as error:
        raise TalosValueError(
            f"path must be a CSV file, got {path} with a fault in line "
            f"{reader.line_num + first - 1}: {error}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    for line, row in rows:
        if None in row or None in row.values():
            raise TalosValueError(
                f"path must have as many columns in each row as in its header, {len(headers[-1])}, "
                f"got another number in line {line} of {path}; put texts with "
                f"{_DELIMITERS[delimiter]} into quotes"
            )
        yield line, row


def _read_jsonl(
    path: Path, content: str, columns: tuple[str, str], needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    # Not splitlines(): JSON texts may hold other line ends, such as U+2028, unescaped.
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TalosValueError(
                f"path must hold one JSON object per line, got a fault in line {line} of "
                f"{path}: {error}"
            ) from error
        if not isinstance(row, dict):
            raise TalosValueError(
                f"path must hold one JSON object per line, got {type(row).__name__} in line "
                f"{line} of {path}"
            )
        if not set(needed) <= set(row):
            raise _missing(path, line, list(row), needed)
        content, label = row[columns[0]], row.get(columns[1], "")
        label_text = row.get(LABEL_TEXT) or ""
        if columns[1] not in needed:  # then it may be anything
            label = "" if label is None else str(label)
        strings = isinstance(content, str) and isinstance(label_text, str)
        if not strings or isinstance(label, bool | float | list | dict | None):
            raise TalosValueError(
                f"path must hold texts and labels that are strings (labels may be whole "
                f"numbers), got {content!r:.60} and {label!r:.60} in line {line} of {path}"
            )
        yield line, {columns[0]: content, columns[1]: str(label), LABEL_TEXT: label_text}
