"""What of the rows of a data set is the text or picture, the label and the answers."""

import functools
import hashlib
import re
from collections import Counter
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

__all__ = ["Columns", "Reader"]

Reader = Callable[[Any, int, int], tuple[bytes, Any] | None]

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
        TalosValueError: a column is missing or not the same in all splits, its labels are lists,
            or there are fewer than two classes.
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
        values = {name: self._values(name, split, names) for name, split in self.splits.items()}
        if names is None:
            found = {v for split in values.values() for v in split if v is not None}
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
        self.labels = {name: [places.get(v) for v in split] for name, split in values.items()}

    def _values(self, name: str, split: Any, names: Sequence[str] | None) -> list[Any]:
        """Return the labels of a split, None where a row has none."""
        feature = split.features.get(self.label)
        if feature is None or getattr(feature, "names", None) != names:
            raise TalosValueError(
                f"label must be the same column in each split of {self.data}, got "
                f"{'none' if feature is None else 'other classes'} in {name}; make the splits alike"
            )
        found = [*split[self.label]]
        if any(isinstance(value, list | dict) for value in found):
            raise TalosValueError(
                f"label must be a column of single values, got lists in {self.label} of "
                f"{self.data}; name another column"
            )
        hidden = names is not None or set(found) == {-1}  # else -1 is a class like others
        none = (None, "", -1) if hidden else (None, "")
        return [None if value in none or value != value else value for value in found]

    def class_texts(self, answers: str | Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
        """Return the text of each class.

        Args:
            answers: as of `load_hub`.
            given: one text per class; empty: the answers, or the names.

        Raises:
            TalosValueError: there are not as many as classes, two are the same, or a template has
                no field.
        """
        given = _strings("class_texts", given)
        shared = [] if isinstance(answers, str) or any(map(_FIELD.search, answers)) else answers
        texts = given or list(shared) or self._short_names()
        if len(texts) != len(self.classes):
            which = "class_texts" if given else "answers"
            raise TalosValueError(
                f"{which} must be one for each of the {len(self.classes)} classes of {self.data} "
                f"({several(self.classes)}), got {len(texts)}"
            )
        if twice := [text for text, count in Counter(texts).items() if count > 1]:
            raise TalosValueError(
                f"{'class_texts' if given or not shared else 'answers'} must differ from class to "
                f"class of {self.data}, got {twice[0]!r} twice; give class_texts"
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

    def _short_names(self) -> list[str]:
        """Return the first of the names of each class, or all where two classes share the first."""
        short = [words(name.split(",")[0]) for name in self.classes]
        count = Counter(name.casefold() for name in short)
        return [
            words(name) if count[each.casefold()] > 1 else each
            for each, name in zip(short, self.classes, strict=True)
        ]

    def reader(self, answers: str | Sequence[str]) -> Reader:
        """Return what makes an example of a split's rows, a place and a label: with its key.

        It returns None for a row without a text or picture, or without one of its fields.

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

        def make(rows: Any, place: int, label: int) -> tuple[bytes, Example] | None:
            row = rows[place]
            text = self._filled("template", way, row)
            if isinstance(own, str):
                found = self._listed(own, row)
            else:
                found = [self._filled("answers", each, row) for each in own]
            if not text or None in found:
                return None
            if found and len(found) != len(self.classes):
                raise TalosValueError(
                    f"answers must be one for each of {len(self.classes)} classes "
                    f"({several(self.classes)}), got {len(found)} in row {place} of {self.data}"
                )
            key = " ".join(text.casefold().split()).encode()
            return key, Example(text, label, "", tuple(map(str, found)))

        return make

    def _filled(self, key: str, way: str, row: Mapping[str, Any]) -> str | None:
        """Return a template with the row's fields; None where the row lacks one."""
        fields = {path: self._field(key, path, row) for path in _FIELD.findall(way)}
        if None in fields.values():
            return None
        return _FIELD.sub(lambda match: str(fields[match[1]]), way).strip()

    def _listed(self, path: str, row: Mapping[str, Any]) -> Sequence[Any]:
        """Return the answers of a row in the order of the classes, where it names their labels."""
        found = self._field("answers", path, row)
        if not isinstance(found, list):
            raise TalosValueError(
                f"answers must be a column of lists, got {found!r:.60} in {path} of {self.data}; "
                "name another column, or write it as a field"
            )
        for part in path.split(".")[:-1]:
            row = row[part]
        labels = [str(each) for each in row.get("label") or ()] if "." in path else []
        if sorted(labels) == sorted(self.classes) and len(labels) == len(found):
            return [found[labels.index(name)] for name in self.classes]
        return found

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


def _picture(column: str, rows: Any, place: int, label: int) -> tuple[bytes, ImageExample] | None:
    if rows[place][column] is None:
        return None
    picture = _Picture(rows, place, column)
    return picture.key, ImageExample(picture, label)


def _strings(key: str, given: str | Sequence[str]) -> Sequence[str]:
    """Return texts of a setting, of which one may stand alone."""
    found = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(each, str) for each in found):
        raise TalosTypeError(f"{key} must be a text or a list of texts, got {given!r:.80}")
    return found
