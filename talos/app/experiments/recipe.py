"""The recipe of an experiment: a TOML file of models, tasks, methods and settings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from talos.app.experiments.settings import (
    Calibration,
    Evaluation,
    Training,
    check_choice,
    check_differ,
    check_params,
    check_text,
)
from talos.app.nearest import beside, did_you_mean
from talos.app.tasks.files import SUFFIXES
from talos.app.tasks.hub import PREFIX
from talos.app.tasks.load import load_any
from talos.app.toml_files import read_toml
from talos.errors import TalosOSError, TalosTypeError, TalosValueError
from talos.options import integer, positive

__all__ = [
    "TITLES",
    "ModelEntry",
    "Recipe",
    "Row",
    "TaskEntry",
    "read_content",
    "read_recipe",
    "recipe_names",
    "recipe_of",
    "takes_density",
]

T = TypeVar("T", Calibration, Training, Evaluation)

TITLES = {
    "talos": "TaLoS",
    "nonlinear": "non-linear fine-tuning",
    "linearized": "linearized fine-tuning",
    "l_lora": "L-LoRA",
    "lota": "LoTA",
    "attention_only": "attention only",
    "random": "random mask",
    "magnitude": "magnitude mask",
}
"""Every method that an experiment can compare, with its usual title."""

_FOLDER = Path(__file__).parent.parent / "recipes"
_OF_TRAINING = ("steps", "weight_decay", "warmup", "accumulate")
_OF_TASKS = tuple(each for each in signature(load_any).parameters if each != "sizes")


@dataclass(frozen=True)
class ModelEntry:
    """A model.

    Attributes:
        source: as `talos.app.models.load_encoder` takes it.
        name: its name in tables and files.
    """

    source: str
    name: str


@dataclass(frozen=True)
class TaskEntry:
    """A task.

    Attributes:
        data: as --data takes it.
        name: its name in tables and files; None: the name that the data has.
        settings: further keys of the entry: how the data is read.
    """

    data: str
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The task's name, as far as the recipe alone knows it."""
        return self.name or Path(self.data).stem


@dataclass(frozen=True)
class Row:
    """A row of the tables: a method with one value of each setting.

    Attributes:
        row: its name in files, different in each row.
        title: its name in tables.
        method: one of `talos.methods.METHODS`.
        settings: the method's own settings by name, without `seed`: the run's seed is taken.
        calibration: of a method that needs a mask, else None.
        training: how its vectors are trained.
        lr: the learning rates to try, from the smallest to the largest.
        merge: `method` of `talos.merging` and its settings.
    """

    row: str
    title: str
    method: str
    settings: Mapping[str, Any]
    calibration: Calibration | None
    training: Training
    lr: tuple[float, ...]
    merge: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """An experiment: everything that decides its numbers.

    Attributes:
        title: the title of its report.
        seeds: a run for each; rates are tried with the first one only.
        models: the models.
        tasks: the tasks.
        rows: the methods to compare; the others are compared with the first.
        training: how vectors are trained, where a row does not differ.
        evaluation: what is measured.
    """

    title: str
    seeds: tuple[int, ...]
    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    rows: tuple[Row, ...]
    training: Training
    evaluation: Evaluation

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        names = [task.title for task in self.tasks]
        check_differ("tasks", names)
        measures = self.evaluation.measures
        if len(names) < 2 and measures:
            raise TalosValueError(
                f"tasks must be at least two, got {names[0]}; {measures[0]} compares tasks"
            )
        for name in self.evaluation.pair:
            check_choice("pair", name, names)

    def plain(self) -> dict[str, Any]:
        """Return the recipe as dictionaries, lists, texts and numbers, defaults filled in."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


def recipe_names() -> list[str]:
    """List the recipes that come with the package.

    Example:
        >>> "demo" in recipe_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_recipe(source: str | Path) -> Recipe:
    """Read a recipe and check all of it but the data and models that it names.

    Args:
        source: a file, or the name of a recipe that comes with the package. Files that a recipe
            names are relative to its folder.

    Raises:
        TalosOSError: the file, or one that the recipe names, cannot be found or read.
        TalosValueError: it is not TOML, a key is unknown or missing, or a value is out of range.

    Example:
        >>> [row.title for row in read_recipe("demo").rows]
        ['TaLoS', 'non-linear fine-tuning']
    """
    content, path = read_content(source)
    return recipe_of(content, path)


def read_content(source: str | Path) -> tuple[dict[str, Any], Path]:
    """Return a recipe's keys as they stand in the file, and the file.

    Args:
        source: as of `read_recipe`.

    Raises:
        TalosOSError: the file cannot be found or read.
        TalosValueError: it is not TOML.
    """
    path = Path(source)
    if str(source) in recipe_names() and not path.is_file():
        path = _FOLDER / f"{source}.toml"
    if not path.is_file():
        near = "" if path.exists() else did_you_mean(str(source), [*recipe_names(), *beside(path)])
        raise TalosOSError(
            f"RECIPE must be a TOML file or one of {', '.join(recipe_names())}, got {source}{near}"
        )
    return read_toml(path), path


def recipe_of(content: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """Return the recipe of a file's keys; see `read_recipe`.

    Args:
        content: the keys, as `read_content` returns them, or changed.
        path: the recipe's file, for messages and as the place of the files that it names; None:
            they are relative to the current folder.

    Raises:
        TalosOSError: a file that the recipe names is missing.
        TalosValueError: a key is unknown or missing, or a value is out of range.
    """
    try:
        return _read(content, path.parent if path else Path())
    except (TalosValueError, TalosOSError) as error:
        raise type(error)(f"{path}: {error}" if path else str(error)) from None


def _read(content: Mapping[str, Any], folder: Path) -> Recipe:
    known = ("title", "seeds", "models", "tasks", "calibration", "training", "evaluation")
    check_keys("the recipe", content, (*known, "methods"))
    calibration: Calibration = _table(Calibration, content, "calibration")
    training: Training = _table(Training, content, "training")
    evaluation: Evaluation = _table(Evaluation, content, "evaluation")
    seeds = _several(content, "seeds", [0])
    for seed in seeds:
        integer("seeds", seed, 0, "integers from 0 to 2**64 - 1", most=2**64 - 1)
    check_differ("seeds", seeds)
    models = tuple(_model(entry, folder) for entry in _several(content, "models"))
    check_differ("models", [each.name for each in models])
    tasks = tuple(_task(entry, folder) for entry in _several(content, "tasks"))
    rows: list[Row] = []
    for number, entry in enumerate(_several(content, "methods"), 1):
        try:
            rows += _rows(entry, calibration, training)
        except (TalosValueError, TalosTypeError) as error:
            raise type(error)(f"{error}; it is in [[methods]] number {number}") from None
    _check_rows(rows)
    return Recipe(
        check_text("title", content.get("title", "An experiment")),
        tuple(seeds),
        models,
        tasks,
        tuple(rows),
        training,
        evaluation,
    )


def _model(entry: Any, folder: Path) -> ModelEntry:
    table = _entry("models", entry, "source")
    check_keys("models", table, ("source", "name"))
    name = table.get("name", Path(table["source"]).name)
    return ModelEntry(_beside_recipe(table["source"], folder), check_text("name", name))


def _task(entry: Any, folder: Path) -> TaskEntry:
    table = _entry("tasks", entry, "data")
    check_keys("tasks", table, _OF_TASKS)
    settings = {key: value for key, value in table.items() if key not in ("data", "name")}
    name = table.get("name")
    data = _beside_recipe(table["data"], folder)
    return TaskEntry(data, None if name is None else check_text("name", name), settings)


def _beside_recipe(name: str, folder: Path) -> str:
    """Return a file or folder that a recipe names, found from the recipe's folder; else a name."""
    path = folder / Path(name.removeprefix(PREFIX)).expanduser()
    if path.exists():
        return PREFIX * name.startswith(PREFIX) + str(path)
    if path.suffix.lower() in SUFFIXES:
        near = did_you_mean(str(path), beside(path))
        raise TalosOSError(f"tasks must be files that exist, got {path}{near}")
    return name


def _rows(entry: Any, calibration: Calibration, training: Training) -> Iterator[Row]:
    """Yield a row for each combination of the values of a [[methods]] entry's lists."""
    from talos.methods import METHODS

    table = _entry("[[methods]]", entry, "method")
    method = table["method"]
    check_choice("method", method, METHODS)
    known = ("method", "title", "lr", "merge", *_OF_TRAINING, *_settings_of(method))
    check_keys(f"[[methods]] with the method {method}", table, known)
    rates = _rates(table.get("lr", METHODS[method].usual_lr))
    title = check_text("title", table.get("title", TITLES[method]))
    given = {key: _values(key, each) for key, each in table.items() if key not in known[:3]}
    for combination in product(*given.values()):
        chosen = dict(zip(given, combination, strict=True))
        shown = [key for key in given if "title" not in table or isinstance(table[key], list)]
        words = [f"{key} {_word(chosen[key], ' ')}".replace("_", " ") for key in shown]
        names = [f"{key}-{_word(each, '-')}" for key, each in chosen.items()]
        merge = _merge(chosen.pop("merge", "task_arithmetic"))
        differing = {key: chosen.pop(key) for key in _OF_TRAINING if key in chosen}
        masked = method == "talos"
        disjoint = masked and chosen.get("disjoint", calibration.disjoint)
        if disjoint and chosen.setdefault("rounds", 1) != 1:
            raise TalosValueError(
                f"rounds must be 1 with disjoint, got {chosen['rounds']}; leave it out"
            )
        yield Row(
            re.sub(r"[^\w.+-]+", "-", "-".join([method, *names])),
            ", ".join([title, *words]),
            method,
            {} if masked else _method_settings(method, chosen, calibration),
            replace(calibration, **chosen) if masked else None,
            replace(training, **differing),
            rates,
            merge,
        )


def takes_density(method: str) -> bool:
    """Return whether rows of a method may differ in density; False for an unknown one.

    Example:
        >>> takes_density("talos"), takes_density("nonlinear")
        (True, False)
    """
    return method in TITLES and "density" in _settings_of(method)


def _settings_of(method: str) -> list[str]:
    """Return the names of the settings that a method has in a recipe.

    The runs give the seed. A seed of `random` itself is that of one mask, for all tasks and runs.
    """
    from talos.methods import METHODS

    if method == "talos":
        return [each.name for each in fields(Calibration) if each.name != "batch_size"]
    names = [each.name for each in fields(METHODS[method])]
    return [name for name in names if name != "seed" or method == "random"]


def _method_settings(
    method: str, chosen: Mapping[str, Any], calibration: Calibration
) -> dict[str, Any]:
    """Return all settings of a method; density and candidates are the calibration's by default."""
    from talos.methods import METHODS

    own = _settings_of(method)
    shared: dict[str, Any] = {
        key: getattr(calibration, key)
        for key in ("density", "params")
        if key in own and key not in chosen
    }
    if "params" in chosen:
        check_params(chosen["params"])
    made = METHODS[method](**shared, **chosen)
    given = [key for key in own if key != "seed" or key in chosen]
    return {key: value for key in given if (value := getattr(made, key)) is not None}


def _merge(given: Any) -> dict[str, Any]:
    """Return the method of a merge and the settings that the recipe gives it."""
    from talos.merging import METHODS, merge_of

    table = {"method": given} if isinstance(given, str) else given
    if not isinstance(table, dict) or not isinstance(table.get("method"), str):
        raise TalosValueError(
            f'merge must be a name or a table such as {{method = "ties", density = 0.2}}, got '
            f"{given!r}"
        )
    check_choice("merge", table["method"], METHODS)
    if taken := [key for key in table if key.startswith("scaling_coef")]:
        raise TalosValueError(
            f"merge must have no {taken[0]}, got {table[taken[0]]!r}; the coefficient is chosen on "
            "validation data"
        )
    try:
        merge_of(table["method"], {key: each for key, each in table.items() if key != "method"})
    except (TalosValueError, TalosTypeError) as error:
        raise TalosValueError(f"merge: {error}") from None
    return table


def _rates(given: Any) -> tuple[float, ...]:
    rates = [positive("lr", each) for each in _values("lr", given)]
    return tuple(sorted(rates))


def _values(key: str, given: Any) -> list[Any]:
    """Return the values of a setting: those of a list, or the one that is given."""
    if isinstance(given, list):
        if not given:
            raise TalosValueError(f"{key} must hold at least one value, got an empty list")
        check_differ(key, given)
        return given
    return [given]


def _word(value: Any, between: str) -> str:
    """Return a setting's value for titles, in words, and for names of files, with hyphens."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return between.join(
            _word(each, between) if key == "method" else f"{key}{between}{_word(each, between)}"
            for key, each in value.items()
        )
    return str(value)


def _table(kind: type[T], content: Mapping[str, Any], name: str) -> T:
    """Read a table of settings into its class."""
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise TalosValueError(f"{name} must be a table [{name}], got {table!r}")
    check_keys(f"[{name}]", table, [each.name for each in fields(kind)])
    try:
        return kind(**table)
    except TalosValueError as error:
        raise TalosValueError(f"[{name}] {error}") from None


def _several(content: Mapping[str, Any], key: str, default: Any = None) -> list[Any]:
    """Return a list of the recipe that holds something."""
    value = content.get(key, default)
    if not isinstance(value, list) or not value:
        raise TalosValueError(f"{key} must be a list of at least one entry, got {value!r}")
    return value


def _entry(where: str, entry: Any, key: str) -> dict[str, Any]:
    """Return an entry of a list as a table: a text alone stands for its main key."""
    table = {key: entry} if isinstance(entry, str) else entry
    if not isinstance(table, dict) or key not in table:
        raise TalosValueError(f"{where} must hold texts or tables with {key}, got {entry!r}")
    check_text(key, table[key])
    return table


def check_keys(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that is not known; the message proposes the nearest one."""
    for key in table:
        if key not in known:
            raise TalosValueError(
                f"keys of {where} must be among {', '.join(known)}, got "
                f"{key}{did_you_mean(key, known)}"
            )


def _check_rows(rows: Sequence[Row]) -> None:
    """Refuse rows of one name, one title or the same settings."""
    check_differ("[[methods]]", [row.row for row in rows])
    check_differ("the titles of [[methods]]", [row.title for row in rows])
    for place, row in enumerate(rows):
        for other in rows[:place]:
            if replace(row, row=other.row, title=other.title, lr=other.lr) == other:
                raise TalosValueError(
                    f"[[methods]] must differ, got {other.row} and {row.row} with the same "
                    "settings; put learning rates into one list, lr = [1e-4, 1e-3]"
                )


def _plain(value: Any) -> Any:
    """Return a value with lists in the place of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
