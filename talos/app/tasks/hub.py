"""Tasks of Hugging Face data sets: of the hub, or of a folder that `datasets` can load.

A set's own test split is the test data where it has labels. Where a split is missing, or two are
taken of one, the rows are divided by content: no text or picture is in two splits. Texts count as
one where they differ in case or spaces alone.

The data sets of the paper are a table in paper.toml, in the same keys as `load_hub` and a recipe.
"""

import contextlib
import functools
import logging
import random
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from talos.app.extras import import_package
from talos.app.nearest import did_you_mean, several
from talos.app.tasks.columns import Columns, Reader
from talos.app.tasks.images import ImageTask
from talos.app.tasks.registry import checked_sizes
from talos.app.tasks.splits import SPLITS, by_turns
from talos.app.tasks.task import Task
from talos.errors import TalosOSError, TalosValueError

__all__ = ["PAPER", "PREFIX", "load_hub", "paper_sets"]

PREFIX = "hf:"
PAPER = "paper:"
_TEST = ("test", "validation", "valid", "val", "dev", "eval")  # the first with labels is taken
_SHARES = {"train": 8, "validation": 1, "test": 1}  # of a split that several are taken of
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
        label: the column of the labels. A row without one is left out, and so is one whose text
            or picture is missing.
        train: the set's split to train on; "": the one that is left.
        validation: the set's split to choose scaling coefficients on; "": of its own, or a part
            of the training data.
        test: the set's split to report; "": of its own, or a part of the training data.
        template: a text with fields such as `{premise}`, one for each column. For pictures, the
            text of a class with the field `{label}`; the head averages over several such texts.
        answers: for a language model: one answer per class, in the order of the labels. Where they
            have fields, each text has answers of its own; so it has where a column is named that
            holds a list of them, such as `choices.text`. They are in the order of the labels, or
            of `choices.label` beside them.
        class_texts: one text per class, in the order of the labels, in place of their names.
        revision: of the set on the hub.

    Returns:
        The task, named like the set.

    Raises:
        TalosRuntimeError: the package datasets is not installed.
        TalosOSError: the set cannot be found or downloaded.
        TalosTypeError: `sizes` are no integers.
        TalosValueError: a column, split or field is missing, there are fewer than two classes, or
            there are not as many answers or texts as classes. Or two of them are the same, or the
            labels are not the same in all splits.
    """
    if data.startswith(PAPER):
        return _load_paper(data, sizes)
    given = {"train": train, "validation": validation, "test": test}
    source = Columns(_open(data, revision), data, text, label, template)
    most = (None,) * len(SPLITS) if sizes is None else checked_sizes(sizes, 1, data)
    splits, repeats = _divided(source, given, most, source.reader(answers))
    name, place = _name(data), data.removeprefix(PREFIX)
    origin = name if Path(place).expanduser().is_dir() else place
    about = f"Rows of {origin}; no text or picture is in two splits."
    texts = source.class_texts(answers, class_texts)
    kind: Callable[..., Task | ImageTask] = ImageTask if source.image else Task
    return kind(name, about, source.classes, texts, *splits, source=origin, repeats=repeats)


def _load_paper(data: str, sizes: Sequence[int] | None) -> Task | ImageTask:
    name = data.removeprefix(PAPER)
    known = paper_sets()
    if name not in known:
        names = [PAPER + each for each in known]
        raise TalosValueError(
            f"data must be one of the paper's sets, got {data}"
            f"{did_you_mean(data, names)}; known are {', '.join(names)}"
        )
    return replace(load_hub(sizes=sizes, **known[name]), name=name)


def _divided(
    source: Columns,
    given: Mapping[str, str],
    sizes: Sequence[int | None],
    make: Reader,
) -> tuple[list[list[Any]], int]:
    """Return the examples of the three splits, and how many repeat another one.

    Test data are taken first, then validation data: what repeats an example is left out of the
    later split. Of equal rows of a split the first is kept, or none if their labels differ. Test
    and validation data are read whole, so that what is drawn of them does not change what is not
    in the training data.
    """
    taken_of = _roles(source, given)
    draw = random.Random(_SEED)
    seen: set[bytes] = set()
    found: list[list[Any]] = []
    repeats = 0
    for role in reversed(SPLITS):
        rows, size = source.splits[taken_of[role]], sizes[SPLITS.index(role)]
        own: dict[bytes, Any] = {}
        unclear: set[bytes] = set()
        for place, label in _share(source.labels[taken_of[role]], role, taken_of, draw, size):
            if role == "train" and len(own) - len(unclear) == size:
                break
            made = make(rows, place, label)
            if made is None:
                continue
            key, example = made
            if key in seen or key in own:
                repeats += 1
                if key in own and own[key].label != label and not getattr(example, "answers", ()):
                    unclear.add(key)
                continue
            own[key] = example
        seen |= own.keys()
        found.insert(0, [each for key, each in own.items() if key not in unclear][:size])
        if not found[0]:
            raise TalosValueError(
                f"{role} must have rows with labels, got none in {taken_of[role]} of {source.data} "
                "that is not in another split; name other splits"
            )
    return found, repeats


def _roles(source: Columns, given: Mapping[str, str]) -> dict[str, str]:
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
    return rows if size is None else [rows[at] for at in by_turns([label for _, label in rows])]


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
