"""Runs to compare: what `talos eval --json` and `talos experiment` wrote.

The JSON of `talos eval`, version 1. Estimates are those of `talos.app.report.results`.

schema, schema_version  "talos-eval", 1
created, versions, model, linearized, seed  when and how it was made
tasks      task -> data (the option --data), examples (number of test examples), fingerprint (of
           texts or images, and labels), max_length (tokens of a text; null of images)
vectors    list of file, task (whose own vector it is, or null), entries, metadata
scaling_coef  of the edit: of the one vector, or of the sum of several; negative if it forgets a
           task; null without a vector
outcomes   model -> task -> the right answers as bits, hexadecimal, in the order of the task's
           examples: `pretrained`, `edited` (the edit), `single` (each task's own vector alone, at
           the coefficient 1); the names in `metrics` mean the same
metrics    metric -> what it found
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talos.app.report.results import SCHEMA, check_results, read_json
from talos.errors import TalosValueError
from talos.evaluation import Bootstrap, Estimate

__all__ = [
    "EVAL_SCHEMA",
    "EVAL_SCHEMA_VERSION",
    "Row",
    "Run",
    "compare",
    "from_hex",
    "load_runs",
    "to_hex",
]

EVAL_SCHEMA = "talos-eval"
EVAL_SCHEMA_VERSION = 1

_WHAT = "the JSON of `talos eval --json` or the results.json of `talos experiment`"


@dataclass(frozen=True)
class Run:
    """One edit of one file: with its answers, or with estimates only.

    Attributes:
        path: the file.
        tasks: in the order of the file.
        outcomes: bool [n] of each task, the right answers; of an experiment none.
        single: the same of each task's own vector alone, where they were evaluated.
        fingerprints: of each task's test examples, where there are answers.
        estimates: accuracies by task, and their mean under None, where there are no answers.
        normalised: estimate of the normalised accuracy, where there are no answers.
        label: of an experiment: the row, and the model and the seed where there are several.
        scaling_coef: of the edit, where there is one.
        linearized: whether the model's first-order expansion was evaluated.
        model: the option --model, where it is known.
        data: the options --data, where they are known.
        max_length: tokens of a text of each task, where they are known.
    """

    path: Path
    tasks: list[str]
    outcomes: dict[str, Tensor] | None = None
    single: dict[str, Tensor] | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    estimates: dict[str | None, Estimate] = field(default_factory=dict)
    normalised: Estimate | None = None
    label: str | None = None
    scaling_coef: float | None = None
    linearized: bool = False
    model: str | None = None
    data: list[str] = field(default_factory=list)
    max_length: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file, with the row of an experiment, or with the kind of an expansion."""
        return self._named(str(self.path))

    @property
    def short_name(self) -> str:
        """The same, the file without folder and suffix; of an experiment its folder."""
        folder = self.path.absolute().parent.name
        return self._named(self.path.stem if self.label is None else folder)

    def _named(self, name: str) -> str:
        kind = "(linearized)" if self.linearized else self.label
        return name if kind is None else f"{name} {kind}"


@dataclass(frozen=True)
class Row:
    """One edit beside the first one.

    Attributes:
        task: the task; None: the mean over the tasks.
        run: the name of the run.
        accuracy: of the edit.
        difference: from the first run's accuracy, paired; None: of the first run, or not known.
        normalised: mean ratio to the single-task models, for the mean over the tasks.
        normalised_difference: from that of the first run, paired.
        scaling_coef: of the edit.
    """

    task: str | None
    run: str
    accuracy: Estimate
    difference: Estimate | None = None
    normalised: Estimate | None = None
    normalised_difference: Estimate | None = None
    scaling_coef: float | None = None


def to_hex(outcomes: Tensor) -> str:
    """Return bool [n] as hexadecimal digits, the first example in the highest bit.

    Example:
        >>> to_hex(torch.tensor([True, False, False, False, True]))
        '88'
    """
    return np.packbits(outcomes.numpy()).tobytes().hex()


def from_hex(digits: str, count: int) -> Tensor:
    """Return the bool [count] of which `to_hex` made the digits.

    Raises:
        TalosValueError: they are no hexadecimal digits of so many outcomes.

    Example:
        >>> from_hex("88", 5).tolist()
        [True, False, False, False, True]
    """
    try:
        packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    except (ValueError, TypeError) as error:
        raise TalosValueError(f"outcomes must be hexadecimal digits, got {digits!r:.40}") from error
    bits = np.unpackbits(packed)
    if len(packed) != -(-count // 8) or bits[count:].any():
        raise TalosValueError(f"outcomes must be {count} bits, got {len(packed)} bytes")
    return torch.from_numpy(bits[:count].astype(bool))


def load_runs(path: Path) -> list[Run]:
    """Read the edits of a file: one of `talos eval`, the merged model of each run of an experiment.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: it is something else, of another version, or damaged.
    """
    results = read_json(path, _WHAT)
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema == SCHEMA:
        check_results(results, str(path))
        with _undamaged(path, "the accuracies of each run", "talos experiment"):
            return list(_of_experiment(results, path))
    if schema != EVAL_SCHEMA:
        raise TalosValueError(f"{path} must be {_WHAT}, got another file")
    if results.get("schema_version") != EVAL_SCHEMA_VERSION:
        raise TalosValueError(
            f"{path} must have schema_version {EVAL_SCHEMA_VERSION}, got "
            f"{results.get('schema_version')!r}; make it again with this version's `talos eval`"
        )
    with _undamaged(path, "the right answers of each task", "talos eval --json"):
        run = _read_run(results, path)
    if run.outcomes is None:
        raise TalosValueError(
            f"{path} must hold one edit of all tasks, got several vectors without their sum; "
            "evaluate them with --metric addition"
        )
    return [run]


def compare(runs: Sequence[Run], *, resamples: int = 2000, seed: int = 0) -> list[Row]:
    """Compare edits with the first one, on the same resamples of the same examples.

    Args:
        runs: at least two, of the same tasks and test examples.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row for each run: first for the mean over the tasks, then for each task if there are
        several. A run without outcomes has its own estimates and no differences.

    Raises:
        TalosValueError: there are fewer than two runs, or their tasks or examples differ.
    """
    if len(runs) < 2:
        raise TalosValueError(f"RUN must be given for at least two edits, got {len(runs)}")
    _check_alike(runs)
    known = next((run.outcomes for run in runs if run.outcomes is not None), {})
    examples = {task: len(each) for task, each in known.items()}
    bootstrap = Bootstrap(examples, resamples=resamples, seed=seed)
    short = [run.short_name for run in runs]
    names = short if len(set(short)) == len(runs) else [run.name for run in runs]
    rows = [_mean_row(bootstrap, *each, runs[0]) for each in zip(names, runs, strict=True)]
    for task in runs[0].tasks if len(runs[0].tasks) > 1 else ():
        rows += [
            Row(
                task,
                name,
                *_accuracy(bootstrap, task, run, runs[0]),
                scaling_coef=run.scaling_coef,
            )
            for name, run in zip(names, runs, strict=True)
        ]
    return rows


def _mean_row(bootstrap: Bootstrap, name: str, run: Run, first: Run) -> Row:
    accuracy, difference = _accuracy(bootstrap, None, run, first)
    if run.outcomes is None or run.single is None:
        return Row(None, name, accuracy, difference, run.normalised, scaling_coef=run.scaling_coef)
    normalised, gap = bootstrap.normalised(run.outcomes, run.single), None
    if run is not first and first.outcomes is not None and first.single is not None:
        pair = (run.outcomes, run.single), (first.outcomes, first.single)
        gap = bootstrap.normalised_gain(*pair)
    return Row(None, name, accuracy, difference, normalised, gap, run.scaling_coef)


def _accuracy(
    bootstrap: Bootstrap, task: str | None, run: Run, first: Run
) -> tuple[Estimate, Estimate | None]:
    """Estimate a run's accuracy and its difference from the first run's, of a task or the mean."""
    if run.outcomes is None:
        return run.estimates[task], None
    tasks = run.tasks if task is None else [task]
    own = {each: run.outcomes[each] for each in tasks}
    if run is first or first.outcomes is None:
        return bootstrap.mean(own), None
    return bootstrap.mean(own), bootstrap.gain(own, {t: first.outcomes[t] for t in tasks})


def _check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs of different tasks or examples."""
    first = runs[0]
    known: dict[str, tuple[str, str]] = {}  # of each task, and the run that it is from
    for run in runs:
        if set(run.tasks) != set(first.tasks):
            raise TalosValueError(
                f"RUN must be of the same tasks, got {', '.join(first.tasks)} in {first.name} and "
                f"{', '.join(run.tasks)} in {run.name}; evaluate both with the same --data"
            )
        for task, fingerprint in run.fingerprints.items():
            other, name = known.setdefault(task, (fingerprint, run.name))
            if other != fingerprint:
                raise TalosValueError(
                    f"RUN must be of the same test examples, got others of {task} in {name} and "
                    f"{run.name}; evaluate both with the same --data"
                )


@contextmanager
def _undamaged(path: Path, what: str, command: str) -> Iterator[None]:
    """Explain what reading a file of another structure raises."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise TalosValueError(
            f"{path} must hold {what}, got a damaged file ({error}); make it again with `{command}`"
        ) from error


def _read_run(results: Mapping[str, Any], path: Path) -> Run:
    tasks: dict[str, Any] = results["tasks"]
    scale, model = results.get("scaling_coef"), results.get("model")
    answers = {
        kind: {task: from_hex(own[task], int(each["examples"])) for task, each in tasks.items()}
        for kind, own in results["outcomes"].items()
        if set(own) == set(tasks)  # a task may have no vector of its own
    }
    return Run(
        path,
        list(tasks),
        outcomes=answers.get("edited") if results["vectors"] else answers["pretrained"],
        single=answers.get("single"),
        fingerprints={task: str(each["fingerprint"]) for task, each in tasks.items()},
        scaling_coef=None if scale is None else float(scale),
        linearized=bool(results.get("linearized")),
        model=None if model is None else str(model),
        data=[str(each["data"]) for each in tasks.values() if "data" in each],
        max_length={
            task: int(each["max_length"]) for task, each in tasks.items() if each.get("max_length")
        },
    )


def _of_experiment(results: Mapping[str, Any], path: Path) -> Iterator[Run]:
    """Yield the merged model of each run."""
    sources = {str(model["name"]): str(model["source"]) for model in results["models"]}
    seeds = {run["seed"] for run in results["runs"]}
    for run in results["runs"]:
        added = run["addition"]
        label = [str(run["row"])]
        label += [run["model"]] if len(sources) > 1 else []
        label += [f"seed {run['seed']}"] if len(seeds) > 1 else []
        yield Run(
            path,
            list(added["tasks"]),
            estimates={
                **{task: _read_estimate(each) for task, each in added["tasks"].items()},
                None: _read_estimate(added["absolute"]),
            },
            normalised=_read_estimate(added["normalised"]),
            label=", ".join(label),
            scaling_coef=float(added["scaling_coef"]),
            model=sources[run["model"]],
        )


def _read_estimate(entry: Mapping[str, Any]) -> Estimate:
    value, low, high = (float(entry[key]) for key in ("value", "low", "high"))
    return {"value": value, "low": low, "high": high, "n": int(entry["n"])}
