"""Tasks of Hugging Face data sets: of the hub, or of a folder that `datasets` can load.

A set's own test split is the test data where it has labels. Where a split is missing, or two are
taken of one, the rows are divided by content: no text or picture is in two splits.

The data sets of the paper are a table in paper.toml, in the same keys as `load_hub` and a recipe.
"""

import contextlib
import functools
import hashlib
import logging
import random
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from talos.app.extras import import_package
from talos.app.nearest import did_you_mean, several
from talos.app.tasks.images import ImageExample, ImageTask, Stored
from talos.app.tasks.splits import SPLITS, words
from talos.app.tasks.task import Example, Task
from talos.errors import TalosOSError, TalosTypeError, TalosValueError

__all__ = ["PAPER", "PREFIX", "load_hub", "paper_sets"]

PREFIX = "hf:"
PAPER = "paper:"
_TEST = ("test", "validation", "valid", "val", "dev", "eval")  # the first with labels is taken
_SHARES = {"train": 8, "validation": 1, "test": 1}  # of a split that several are taken of
_FIELD = re.compile(r"\{([\w.]+)\}")
_SEED = "talos 0"  # as of every data, the splits are the same in every command


@functools.cache
def paper_sets() -> dict[str, dict[str, Any]]:
    """Return the data sets of the paper: by name, what `load_hub` takes.

    Example:
        >>> paper_sets()["mnist"]["data"]
        'hf:ylecun/mnist'
    """
    content = Path(__file__).with_name("paper.toml").read_text(encoding="utf-8")
    return tomllib.loads(content)


def load_hub(
    data: str,
    sizes: Sequence[int] | None = None,
    *,
    text: str = "",
    label: str = "label",
    train: str = "",
    validation: str = "",
    test: str = "",
    template: str | Sequence[str] = (),
    answers: str | Sequence[str] = (),
    class_texts: Sequence[str] = (),
    revision: str | None = None,
) -> Task | ImageTask:
    """Load a classification task of a Hugging Face data set.

    Args:
        data: "hf:OWNER/NAME" or "hf:OWNER/NAME/CONFIG" of the hub; "hf:FOLDER" of what
            `save_to_disk` wrote, or of files that `datasets.load_dataset` reads; or "paper:NAME",
            one of `paper_sets()`.
        sizes: largest number of train, validation and test examples; None takes all.
        text: the column of the texts; "": the pictures of a set that has some, else "text".
        label: the column of the labels. A row without one is left out.
        train: the set's split to train on; "": the one that is left.
        validation: the set's split to choose scaling coefficients on; "": of its own, or a part
            of the training data.
        test: the set's split to report; "": of its own, or a part of the training data.
        template: a text with fields such as `{premise}`, one for each column. For pictures, the
            text of a class with the field `{label}`; the head averages over several such texts.
        answers: for a language model: one answer per class, in the order of the labels. Where they
            have fields, each text has answers of its own; so it has where a column is named that
            holds a list of them, such as `choices.text`.
        class_texts: one text per class, in the order of the labels, in place of their names.
        revision: of the set on the hub.

    Returns:
        The task, named like the set.

    Raises:
        TalosRuntimeError: the package datasets is not installed.
        TalosOSError: the set cannot be found or downloaded.
        TalosTypeError: `sizes` are no integers.
        TalosValueError: a column, split or field is missing, there are fewer than two classes, or
            there are not as many answers or texts as classes.
    """
    if data.startswith(PAPER):
        return _load_paper(data, sizes)
    given = {"train": train, "validation": validation, "test": test}
    source = _Source(_open(data, revision), data, text, label, _strings("template", template))
    most = _checked_sizes(sizes)
    splits, repeats = _divided(source, given, most, source.reader(answers))
    name, place = _name(data), data.removeprefix(PREFIX)
    origin = name if Path(place).expanduser().is_dir() else place
    about = f"Rows of {origin}; no text or picture is in two splits."
    texts = source.class_texts(answers, _strings("class_texts", class_texts))
    kind: Callable[..., Task | ImageTask] = ImageTask if source.image else Task
    return kind(name, about, source.classes, texts, *splits, source=origin, repeats=repeats)


def _load_paper(data: str, sizes: Sequence[int] | None) -> Task | ImageTask:
    name = data.removeprefix(PAPER)
    known = paper_sets()
    if name not in known:
        raise TalosValueError(
            f"data must be one of the paper's sets, got {data}{did_you_mean(name, known)}; known "
            f"are {', '.join(PAPER + each for each in known)}"
        )
    return replace(load_hub(sizes=sizes, **known[name]), name=name)


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
class _Source:
    """The splits of a data set, with what is to be read of them."""

    splits: Mapping[str, Any]
    data: str
    text: str
    label: str
    template: Sequence[str]

    def __post_init__(self) -> None:
        """Find the columns and the classes; refuse a set without them."""
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
        """Return the text of each class."""
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
        """Return what makes an example of a split's rows, a place and a label: with its key."""
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


def _divided(
    source: _Source,
    given: Mapping[str, str],
    sizes: Sequence[int | None],
    make: Callable[[Any, int, int], tuple[bytes, Any]],
) -> tuple[list[list[Any]], int]:
    """Return the examples of the three splits, and how many repeat another one.

    Test data are taken first, then validation data: what repeats an example is left out of the
    later split.
    """
    taken_of = _roles(source, given)
    draw = random.Random(_SEED)
    seen: set[bytes] = set()
    found: dict[str, list[Any]] = {}
    repeats = 0
    for role in reversed(SPLITS):
        rows, size = source.splits[taken_of[role]], sizes[SPLITS.index(role)]
        found[role] = []
        for place, label in _share(source.labels[taken_of[role]], role, taken_of, draw, size):
            if len(found[role]) == size:
                break
            key, example = make(rows, place, label)
            if key in seen:
                repeats += 1
                continue
            seen.add(key)
            found[role].append(example)
        if not found[role]:
            raise TalosValueError(
                f"{role} must have rows with labels, got none in {taken_of[role]} of {source.data} "
                "that is not in another split; name other splits"
            )
    return [found[role] for role in SPLITS], repeats


def _roles(source: _Source, given: Mapping[str, str]) -> dict[str, str]:
    """Return which split of the set each of the three is taken of."""
    labelled = [
        name for name, split in source.labels.items() if any(each is not None for each in split)
    ]
    for role, name in given.items():
        if name and name not in labelled:
            wrong = "has no labels" if name in source.splits else "is no split of it"
            raise TalosValueError(
                f"{role} must be a split of {source.data} with labels, got {name!r}, which "
                f"{wrong}{did_you_mean(name, labelled)}; there are {several(labelled) or 'none'}"
            )
    if not labelled:
        raise TalosValueError(
            f"label must be a column with labels, got none in {source.label} of {source.data}; "
            "name another column"
        )
    free = [name for name in labelled if name not in given.values()]
    train = given["train"] or ("train" if "train" in free else "")
    named = [name for name in _TEST if name in free and name != train]
    train = train or next((name for name in free if name not in named), "")
    if not train:  # of a set with a test split alone, or of what is left
        train = named.pop() if named else given["validation"] or given["test"]
    test = given["test"] or (named.pop(0) if named else train)
    validation = given["validation"] or (named.pop(0) if named else train)
    return {"train": train, "validation": validation, "test": test}


def _share(
    labels: Sequence[int | None],
    role: str,
    taken_of: Mapping[str, str],
    draw: random.Random,
    size: int | None,
) -> list[tuple[int, int]]:
    """Return the places and labels of a split's rows: its share within each class, shuffled.

    Where a size is given, the rows of the classes take turns, so that the first ones hold all
    classes alike.
    """
    own = taken_of[role]
    sharing = [each for each in SPLITS if taken_of[each] == own]
    classes: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        if label is not None:
            classes[label].append(place)
    total = sum(_SHARES[each] for each in sharing)
    rows: list[tuple[int, int]] = []
    for label, places in sorted(classes.items()):
        random.Random(f"{_SEED} {own} {label}").shuffle(places)
        count = len(places)
        for each in reversed(sharing):
            part = max(1, round(count * _SHARES[each] / total))
            kept = len(places) if each == sharing[0] else min(part, len(places))
            drawn, places = places[:kept], places[kept:]
            if each == role:
                rows += [(place, label) for place in drawn]
    draw.shuffle(rows)
    if size is not None:
        turns = Counter[int]()
        ranks = []
        for _, label in rows:
            ranks.append(turns[label])
            turns[label] += 1
        rows = [rows[at] for at in sorted(range(len(rows)), key=lambda at: ranks[at])]
    return rows


def _open(data: str, revision: str | None) -> Mapping[str, Any]:
    """Return the splits of a set, by name."""
    datasets = import_package("datasets")
    name = data.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    try:
        with _quiet(datasets):
            if folder.is_dir():
                saved = any((folder / each).exists() for each in _SAVED)
                load = datasets.load_from_disk if saved else datasets.load_dataset
                found = load(str(folder))
            else:
                parts = name.split("/")
                config = parts[2] if len(parts) > 2 else None
                path = "/".join(parts[:2])
                found = datasets.load_dataset(path, config, revision=revision)
    except OSError as error:
        raise _not_there(data, error, TalosOSError) from error
    except Exception as error:  # of the files, the cache or the hub, by version
        raise _not_there(data, error, TalosValueError) from error
    return found if isinstance(found, Mapping) else {"train": found}


_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes


def _not_there(data: str, error: Exception, kind: type[Exception]) -> Exception:
    lines = str(error).strip().splitlines()
    return kind(
        f"data must be a Hugging Face data set, hf:OWNER/NAME[/CONFIG] or hf:FOLDER, got {data}, "
        f"which could not be loaded ({lines[0] if lines else type(error).__name__:.200}); check "
        "the name and the network, or save the set with save_to_disk where there is one"
    )


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Switch off the progress bars and logs of datasets for a while."""
    shown = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _name(data: str) -> str:
    """Return the name of a task: of a folder its own, else that of the set and its config."""
    name = data.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else "-".join(name.split("/")[1:] or [name])


def _missing(value: Any) -> bool:
    return value is None or value == "" or value == -1


def _strings(key: str, given: str | Sequence[str]) -> Sequence[str]:
    """Return texts of a setting, of which one may stand alone."""
    found = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(each, str) for each in found):
        raise TalosTypeError(f"{key} must be a text or a list of texts, got {given!r:.80}")
    return found


def _checked_sizes(sizes: Sequence[int] | None) -> Sequence[int | None]:
    """Return the three sizes, or three times None."""
    if sizes is None:
        return (None,) * len(SPLITS)
    if not all(isinstance(size, int) for size in sizes):
        raise TalosTypeError(f"sizes must be three integers, got {sizes!r}")
    if len(sizes) != len(SPLITS) or min(sizes) < 1:
        raise TalosValueError(f"sizes must be three numbers of at least 1, got {tuple(sizes)}")
    return sizes
