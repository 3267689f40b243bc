"""What of the rows of a data set is the text or picture, the label and the answers."""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talos.app.extras import import_package
from talos.app.nearest import did_you_mean, several
from talos.app.tasks.images import ImageExample, Stored
from talos.app.tasks.splits import words
from talos.app.tasks.task import Example
from talos.errors import TalosTypeError, TalosValueError

__all__ = ["Columns"]

_FIELD = re.compile(r"\{([\w.]+)\}")


class _Picture(Stored):
    """An encoded picture of a data set, which is read when it is opened."""

    def __init__(self, rows: Any, place: int, column: str) -> None:
        self._at = rows, place, column
        self.key = hashlib.sha256(self.read()).digest()

    def read(self) -> bytes:
        """Return the encoded picture."""
        rows, place, column = self._at
        found = rows[place][column]
        content: bytes = found["bytes"] or Path(found["path"]).read_bytes()
        return content

    def __str__(self) -> str:
        return f"row {self._at[1]} of the data set"


@dataclass
class Columns:
    """The splits of a data set, with what is to be read of them.

    Args:
        splits: as `datasets` loads them.
        data: the name of the set, for messages.
        text: the column of the texts; "": the pictures of a set that has some, else "text".
        label: the column of the labels.
        template: texts with fields, as of `load_hub`.

    Attributes:
        image: the column of the pictures; "" of a set of texts.
        classes: the labels, in their order.
        labels: of each split the class of each row; None where it has none.

    Raises:
        TalosValueError: a column is missing, or there are fewer than two classes.
    """

    splits: Mapping[str, Any]
    data: str
    text: str
    label: str
    template: str | Sequence[str]

    def __post_init__(self) -> None:
        """Find the columns and the classes; refuse a set without them."""
        self.template = _strings("template", self.template)
        datasets = import_package("datasets")
        features = next(iter(self.splits.values())).features
        pictures = [name for name, each in features.items() if isinstance(each, datasets.Image)]
        self.image = "" if self.text or not pictures else pictures[0]
        if self.image:
            column, plain = self.image, datasets.Image(decode=False)
            self.splits = {name: s.cast_column(column, plain) for name, s in self.splits.items()}
        elif not self.template:
            self.text = self.text or "text"
        self.columns = list(features)
        for key, column in (("label", self.label), ("text", self.text)):
            if column and column not in self.columns:
                raise TalosValueError(
                    f"{key} must be a column of {self.data}, got {column!r}"
                    f"{did_you_mean(column, self.columns)}; its columns are {several(self.columns)}"
                )
        names = getattr(features[self.label], "names", None)
        values = {name: [*split[self.label]] for name, split in self.splits.items()}
        if names is None:
            found = {v for split in values.values() for v in split if not _missing(v)}
            numbers = all(re.fullmatch(r"-?\d{1,18}", str(v)) for v in found)
            ordered = sorted(found, key=lambda v: (int(v) if numbers else 0, str(v)))
        else:
            ordered = list(range(len(names)))
        self.classes = tuple(map(str, ordered if names is None else names))
        if len(self.classes) < 2:
            raise TalosValueError(
                f"label must be a column with two classes or more, got {len(self.classes)} in "
                f"{self.label} of {self.data}; name another column"
            )
        places = {value: place for place, value in enumerate(ordered)}
        self.labels = {
            name: [None if _missing(v) else places.get(v) for v in split]
            for name, split in values.items()
        }

    def class_texts(self, answers: str | Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
        """Return the text of each class.

        Args:
            answers: as of `load_hub`.
            given: one text per class; empty: the answers, or the names.

        Raises:
            TalosValueError: there are not as many as classes, or a template has no field.
        """
        given = _strings("class_texts", given)
        shared = [] if isinstance(answers, str) or any(map(_FIELD.search, answers)) else answers
        texts = given or list(shared) or [words(name.split(",")[0]) for name in self.classes]
        if len(texts) != len(self.classes):
            which = "class_texts" if given else "answers"
            raise TalosValueError(
                f"{which} must be one for each of the {len(self.classes)} classes of {self.data} "
                f"({several(self.classes)}), got {len(texts)}"
            )
        if not self.image:
            return tuple(texts)
        ways = self.template or ["a photo of a {label}"]
        if not all("{label}" in way for way in ways):
            raise TalosValueError(
                f"template must hold {{label}} for pictures, got {several(list(ways))}; as in "
                "'a photo of a {label}.'"
            )
        return tuple("\n".join(way.replace("{label}", text) for way in ways) for text in texts)

    def reader(self, answers: str | Sequence[str]) -> Callable[[Any, int, int], tuple[bytes, Any]]:
        """Return what makes an example of a split's rows, a place and a label: with its key.

        Args:
            answers: as of `load_hub`.

        Raises:
            TalosValueError: the settings do not fit the kind of examples.
        """
        if self.image:
            if answers:
                raise TalosValueError(
                    f"answers must be left out with pictures, got {answers!r:.80}; give class_texts"
                )
            return functools.partial(_picture, self.image)
        if len(self.template) > 1:
            raise TalosValueError(
                f"template must be one text, got {len(self.template)}; several are for pictures"
            )
        way = self.template[0] if self.template else f"{{{self.text}}}"
        own: str | Sequence[str] = ()
        if isinstance(answers, str) or any(map(_FIELD.search, answers)):
            own = answers

        def make(rows: Any, place: int, label: int) -> tuple[bytes, Example]:
            row = rows[place]
            text = self._filled("template", way, row).strip()
            if isinstance(own, str):
                found = tuple(map(str, self._field("answers", own, row)))
            else:
                found = tuple(self._filled("answers", each, row) for each in own)
            if found and len(found) != len(self.classes):
                raise TalosValueError(
                    f"answers must be one for each of {len(self.classes)} classes "
                    f"({several(self.classes)}), got {len(found)} in row {place} of {self.data}"
                )
            return "\0".join((text, *found)).encode(), Example(text, label, "", found)

        return make

    def _filled(self, key: str, way: str, row: Mapping[str, Any]) -> str:
        return _FIELD.sub(lambda match: str(self._field(key, match[1], row)), way)

    def _field(self, key: str, path: str, row: Mapping[str, Any]) -> Any:
        """Return a column of a row, or a part of it: `choices.text`."""
        found: Any = row
        for part in path.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise TalosValueError(
                    f"{key} must name columns of {self.data}, got {path!r}"
                    f"{did_you_mean(path, self.columns)}; its columns are {several(self.columns)}"
                )
            found = found[part]
        return found


def _picture(column: str, rows: Any, place: int, label: int) -> tuple[bytes, ImageExample]:
    picture = _Picture(rows, place, column)
    return picture.key, ImageExample(picture, label)


def _missing(value: Any) -> bool:
    return value is None or value == "" or value == -1


def _strings(key: str, given: str | Sequence[str]) -> Sequence[str]:
    """Return texts of a setting, of which one may stand alone."""
    found = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(each, str) for each in found):
        raise TalosTypeError(f"{key} must be a text or a list of texts, got {given!r:.80}")
    return found
