"""The outcomes of a model and of its edits: each is judged once, with the weights edited in place.

    theta = theta_0 + coef * tau                       no vector, or a coefficient of 0: theta_0

Addition, negation and interference share these outcomes: the pretrained model's and those of each
task's own vector. So they take an `Outcomes` and not a model with its judges.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.evaluation.coefficients import stand_ins
from talos.evaluation.intervals import Bootstrap, Picked, Statistic
from talos.evaluation.judging import ACCURACY, Judge, Metric, Models, ask
from talos.names import check_module
from talos.options import as_real
from talos.task_vectors import ResidentVectors, TaskVector
from talos.task_vectors.editing import touched_weights
from talos.tensors import place

__all__ = [
    "Outcomes",
    "Split",
    "check_shared",
    "checked_vectors",
    "edited_module",
    "module_of_each",
]

Split = Literal["test", "validation", "control"]

_Key = tuple[float, int, str]  # coefficient, the judge's id, task
_EDIT = "edit"


class Outcomes:
    """What judges return of a model and of its edits, each asked once.

    The model is edited in place while a judge runs, and has its own weights bit for bit after every
    call, also after an exception. Its weights must not change while the outcomes are in use.
    Outcomes of a vector are kept as long as the vector lives.

    Args:
        model: one module; or one for each task, with heads of their own around shared weights.
            Edits go on the weights of the first one, and the judge of a task gets the task's.
        test: a judge for each task, of the examples that are reported.
        validation: the same for the examples that coefficients are chosen on.
        control: the same for the tasks that negation must leave alone, while it searches; None:
            those of `validation`. A part of their examples is enough.
        metric: how outcomes become a figure.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Attributes:
        metric: as given.
        edited: the module whose weights are edited: the model, or the first of several.
        modules: the module of each task.

    Raises:
        TalosTypeError: a model is no module, or a judge cannot be called.
        TalosValueError: a split has no judge, or a task no module.

    Example:
        >>> import torch
        >>> from talos import Mask
        >>> from talos.evaluation import right_answers
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> judge = right_answers([(torch.eye(2), torch.tensor([0, 0]))])
        >>> mask = Mask.from_dense({"weight": torch.tensor([[False, True], [False, False]])})
        >>> vector = TaskVector(mask, torch.tensor([4.0]))
        >>> outcomes = Outcomes(model, {"left": judge})
        >>> outcomes.of("test")["left"], outcomes.of("test", vector, 0.5)["left"]
        (tensor([ True, False]), tensor([True, True]))
    """

    def __init__(
        self,
        model: Models,
        test: Mapping[str, Judge],
        validation: Mapping[str, Judge] | None = None,
        control: Mapping[str, Judge] | None = None,
        *,
        metric: Metric = ACCURACY,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.metric = metric
        control = validation if control is None else control
        given = {"test": test, "validation": validation, "control": control}
        self._judges = {
            split: _checked_judges(split, judges)
            for split, judges in given.items()
            if judges is not None
        }
        tasks = {task: None for judges in self._judges.values() for task in judges}
        self.edited = edited_module(model)
        self.modules = module_of_each(model, tasks)
        self._resamples, self._seed = resamples, seed
        self._lengths: dict[tuple[str, str], int] = {}
        self._known: dict[int | None, dict[_Key, Tensor]] = {None: {}}
        self._vectors: dict[int, weakref.ref[TaskVector]] = {}
        self._resident: tuple[TaskVector, ResidentVectors] | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that the test judges know."""
        return list(self._judges["test"])

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """Estimates over the test examples of all tasks."""
        examples = {
            task: self._lengths.get(("test", task)) or len(self.of("test", tasks=[task])[task])
            for task in self.tasks
        }
        return Bootstrap(examples, resamples=self._resamples, seed=self._seed, metric=self.metric)

    def table(
        self, split: Split, found: Sequence[Mapping[str, Tensor]], statistic: Statistic
    ) -> Tensor:
        """Return a statistic of several models' figures, and its values in resamples.

        Args:
            split: the examples that the outcomes are of.
            found: outcomes of each model, as `of` returns them.
            statistic: as of `Bootstrap.table`.

        Returns:
            float64 `[1 + resamples, k]`, for `choose`.
        """
        rows = {task: torch.stack([each[task] for each in found]) for task in found[0]}
        bootstrap = Bootstrap(
            {task: each.shape[1] for task, each in rows.items()},
            resamples=self._resamples,
            seed=self._seed,
            metric=self.metric,
            split=split,
        )
        return bootstrap.table(rows, statistic)

    def picked(
        self, vector: TaskVector, coefs: Sequence[float], places: Tensor, tasks: Iterable[str]
    ) -> dict[str, Picked]:
        """Return the test outcomes at a chosen coefficient, with those that resamples choose.

        At most three coefficients are evaluated: the chosen one, and the ones that 4 % of the
        resamples' choices lie below and above. The nearest one stands for any other.

        Args:
            vector: the edit.
            coefs: the coefficients.
            places: int64 `[1 + resamples]`, as of `choose`.
            tasks: the tasks.

        Returns:
            The outcomes of each task.
        """
        used, rows = stand_ins(coefs, places)
        tasks = list(tasks)
        found = [self.of("test", vector, coefs[i], tasks) for i in used]
        return {
            task: Picked(
                found[used.index(int(places[0]))][task],
                torch.stack([each[task] for each in found]),
                rows,
            )
            for task in tasks
        }

    def of(
        self,
        split: Split,
        vector: TaskVector | None = None,
        coef: float = 1.0,
        tasks: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return outcomes; only what was not asked before is judged now.

        Args:
            split: "test", "validation" or "control".
            vector: the edit; None: the pretrained model.
            coef: the scaling coefficient; 0: the pretrained model.
            tasks: None: all tasks of the split.

        Returns:
            `[n]` of each task, on the CPU.

        Raises:
            TalosValueError: the split has no judges, a task is unknown, the vector does not fit the
                model, or a judge returns NaN or another number of outcomes than before.
        """
        if split not in self._judges:
            raise TalosValueError(
                f"{split} must be given, a judge for each task, got none; pass {split}= to Outcomes"
            )
        judges = self._judges[split]
        chosen = list(judges) if tasks is None else list(tasks)
        if unknown := [task for task in chosen if task not in judges]:
            raise TalosValueError(
                f"tasks must be among the {split} judges' {', '.join(judges)}, got "
                f"{', '.join(unknown)}"
            )
        number = as_real(coef)
        if number is None:
            raise TalosTypeError(f"coef must be a real number, got {coef!r}")
        if vector is None or number == 0:
            vector, number = None, 0.0
        known = self._known_of(vector)
        keys = {task: (number, id(judges[task]), task) for task in chosen}
        missing = [task for task, key in keys.items() if key not in known]
        if missing:
            with self._put_on(vector, number):
                for task in missing:
                    known[keys[task]] = self._ask(split, task)
        return {task: known[key] for task, key in keys.items()}

    def of_each(self, vectors: Mapping[str, TaskVector], split: Split) -> dict[str, Tensor]:
        """Return the outcomes of single-task models: of each task with its own vector.

        Args:
            vectors: the vector of each task.
            split: "test", "validation" or "control".

        Returns:
            `[n]` of each task.
        """
        return {
            task: self.of(split, vector, tasks=[task])[task] for task, vector in vectors.items()
        }

    def remember(
        self,
        split: Split,
        found: Mapping[str, Tensor],
        vector: TaskVector | None = None,
        coef: float = 1.0,
    ) -> None:
        """Keep outcomes that `of` returned earlier, also in another process.

        Args:
            split: as of `of`.
            found: `[n]` of each task.
            vector: as of `of`.
            coef: as of `of`.
        """
        number = 0.0 if vector is None else coef
        known = self._known_of(None if number == 0 else vector)
        for task, each in found.items():
            self._lengths.setdefault((split, task), len(each))
            known[(number, id(self._judges[split][task]), task)] = each

    def figures(self, outcomes: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the figure of each task.

        Args:
            outcomes: `[n]` of each task, as `of` returns them.

        Returns:
            The metric's figures.
        """
        return {task: self.metric.figure(each) for task, each in outcomes.items()}

    @contextmanager
    def resident(self, vector: TaskVector) -> Iterator[None]:
        """Keep a vector ready on the model's device inside a `with` block: for searches.

        Args:
            vector: the vector that is asked for several times, and no other one inside the block.
        """
        with self._made_resident(vector) as resident:
            before, self._resident = self._resident, (vector, resident)
            try:
                yield
            finally:
                self._resident = before

    def through(self, modules: Mapping[str, nn.Module]) -> "Outcomes":
        """Return outcomes of other modules around the same weights, such as expansions of them.

        Args:
            modules: one for each task, equal to its module as long as no edit is on.

        Returns:
            Outcomes that know those of the pretrained model.
        """
        other = copy(self)
        other.modules = module_of_each(modules, self.modules)
        other._known, other._vectors = {None: self._known[None]}, {}
        return other

    def _known_of(self, vector: TaskVector | None) -> dict[_Key, Tensor]:
        if vector is None:
            return self._known[None]
        key = id(vector)
        if key not in self._known:
            known = self._known

            def forget(_: object) -> None:  # another vector may get the id
                known.pop(key, None)

            self._known[key], self._vectors[key] = {}, weakref.ref(vector, forget)
        return self._known[key]

    @contextmanager
    def _made_resident(self, vector: TaskVector) -> Iterator[ResidentVectors]:
        check_shared(self.edited, self.modules, vector)
        with ResidentVectors(self.edited, {_EDIT: vector}) as resident:
            yield resident

    @contextmanager
    def _put_on(self, vector: TaskVector | None, coef: float) -> Iterator[None]:
        if vector is None:
            yield
            return
        ready = self._resident
        if ready is not None and ready[0] is not vector:
            raise TalosRuntimeError(
                "vector must be the one that is resident, got another; ask for it outside of the "
                "block of resident()"
            )
        made = self._made_resident(vector) if ready is None else nullcontext(ready[1])
        with made as resident:
            resident.swap(_EDIT, coef)
            try:
                yield
            finally:
                resident.swap(None)

    def _ask(self, split: str, task: str) -> Tensor:
        found = ask(self._judges[split][task], self.modules[task], f"{split} judge of {task}")
        before = self._lengths.setdefault((split, task), len(found))
        if len(found) != before:
            raise TalosValueError(
                f"{split} judge of {task} must return as many outcomes at each call, got "
                f"{before}, then {len(found)}; judge the same examples in the same order"
            )
        return found


def edited_module(model: Models) -> nn.Module:
    """Return the module whose weights are edited: the model, or the first of several.

    Raises:
        TalosTypeError: it is no module.
        TalosValueError: there is none.
    """
    if not isinstance(model, Mapping):
        check_module(model)
        return model
    if not model:
        raise TalosValueError("model must hold at least one module, got none")
    for task, module in model.items():
        check_module(module, f"model of {task}")
    return next(iter(model.values()))


def module_of_each(model: Models, tasks: Iterable[str]) -> dict[str, nn.Module]:
    """Return the module of each task.

    Raises:
        TalosValueError: `model` maps tasks to modules and lacks one.
    """
    if not isinstance(model, Mapping):
        return dict.fromkeys(tasks, model)
    tasks = list(tasks)
    if missing := [task for task in tasks if task not in model]:
        raise TalosValueError(
            f"model must hold a module for each judged task, got none for {', '.join(missing)}"
        )
    return {task: model[task] for task in tasks}


def check_shared(edited: nn.Module, modules: Mapping[str, nn.Module], vector: TaskVector) -> None:
    """Refuse modules that do not share the weights that an edit of the first one changes.

    Raises:
        TalosValueError: a task's module has another one; it would be judged without the edit.
    """
    touched = touched_weights(edited, vector.mask)
    for task, module in modules.items():
        if module is edited:
            continue
        held = {place(each) for each in (*module.parameters(), *module.buffers())}
        if lost := [name for name, weight in touched.items() if place(weight) not in held]:
            raise TalosValueError(
                "model must share the weights that a vector edits among its modules, got "
                f"another {lost[0]} for {task}; pass modules around one encoder"
            )


def checked_vectors(vectors: Mapping[str, TaskVector]) -> dict[str, TaskVector]:
    """Return task vectors by task.

    Raises:
        TalosTypeError: it is no mapping of task vectors.
        TalosValueError: there is none.
    """
    if not isinstance(vectors, Mapping) or not all(
        isinstance(vector, TaskVector) for vector in vectors.values()
    ):
        raise TalosTypeError(
            'vectors must map tasks to task vectors, got something else; pass {"task": task_vector}'
        )
    if not vectors:
        raise TalosValueError("vectors must hold the vector of at least one task, got none")
    return dict(vectors)


def _checked_judges(split: str, judges: Mapping[str, Judge]) -> dict[str, Judge]:
    if not isinstance(judges, Mapping) or not all(map(callable, judges.values())):
        raise TalosTypeError(
            f"{split} must map tasks to judges, got something else; pass "
            '{"task": right_answers(batches)}'
        )
    if not judges:
        raise TalosValueError(f"{split} must hold a judge for at least one task, got none")
    return dict(judges)
