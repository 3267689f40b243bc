"""The interface between the ways of merging and the one pass over the vectors.

A `Merge` holds a method's settings. `merge` goes over the tensors one by one. Of each vector it
takes what the method chooses, scales it, and lays the parts over the union of their entries; the
method makes one value of the values that meet at an entry. So a method is three short functions:

- `_scale`: the factor of all vectors;
- `_choose`: which entries of each vector take part;
- `_merge_entries`: the value of each entry of the union.

    tau = f(c_1 tau_1, ..., c_T tau_T),   c_t = scaling_coef * scaling_coefs[t]

Each vector is scaled first, in float32. Everything after that is float32, too, and added in the
order of the vectors.
"""

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.options import finite
from talos.task_vectors import TaskVector
from talos.task_vectors.choosing import Choice
from talos.task_vectors.fingerprints import one_base
from talos.task_vectors.sums import (
    Overlay,
    Part,
    gathered,
    overlays,
    shapes_of,
    slices_of,
    sources,
)
from talos.tensors import true_places
from talos_kernels import TensorIndex

__all__ = ["Coefficient", "Merge", "Source", "read_vectors"]

Coefficient = float | Mapping[str, float]
"""Of a vector: one number, or one for each module or tensor by name; "" stands for all others."""


@dataclass(frozen=True)
class Source:
    """A vector, and what a method chooses of it.

    Attributes:
        vector: the vector.
        choices: applied one after the other to each tensor's part.
    """

    vector: TaskVector
    choices: tuple[Choice, ...] = ()
    _ranges: dict[str, slice] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look up the tensors' ranges once."""
        object.__setattr__(self, "_ranges", slices_of(self.vector.mask))

    def then(self, choice: Choice | None) -> "Source":
        """Return the source with one more choice; None: all stays."""
        return self if choice is None else Source(self.vector, (*self.choices, choice))

    def part(self, name: str) -> Part:
        """Return what stays of a tensor that the vector covers; values of any floating dtype."""
        part = Part(self.vector.mask.indices[name], self.vector.values[self._ranges[name]])
        for choice in self.choices:
            part = choice(name, part) if len(part.values) else part
        return part

    def values(self) -> dict[str, Tensor]:
        """Return the values that stay, by tensor."""
        return {name: self.part(name).values for name in self.vector.mask.names}


@dataclass(frozen=True, kw_only=True)
class Merge(ABC):
    """A method of merging and its settings; a frozen dataclass.

    Attributes:
        name: as `talos.merge` and the command line take it.
        scaling_coef: the factor of all vectors.
        scaling_coefs: a factor of each vector: a number, or a mapping from names of modules or
            tensors to numbers. The longest name that leads to a tensor counts; "" stands for all
            others. None: 1 for all.

    Raises:
        TalosValueError: a coefficient is not a finite number.
    """

    name: ClassVar[str]
    adds: ClassVar[bool] = False
    """Whether the result is the sum of the scaled vectors and nothing else."""
    scaling_coef: float = 1.0
    scaling_coefs: Sequence[Coefficient] | None = None

    @property
    def averages(self) -> bool:
        """Whether entries are means over the vectors, not sums.

        A mean of T vectors is a T-th of their sum: the best coefficient may be as large as T.
        """
        return False

    def __post_init__(self) -> None:
        """Refuse coefficients that are not finite numbers."""
        self._store(scaling_coef=finite("scaling_coef", self.scaling_coef))
        if self.scaling_coefs is not None:
            if isinstance(self.scaling_coefs, Mapping | str) or not isinstance(
                self.scaling_coefs, Iterable
            ):
                raise TalosValueError(
                    "scaling_coefs must be a list with an entry a vector, got "
                    f"{self.scaling_coefs!r}; coefficients by layer are one such entry"
                )
            read = [_read_coef(i, coef) for i, coef in enumerate(self.scaling_coefs)]
            self._store(scaling_coefs=tuple(read))

    def merge(
        self,
        vectors: Iterable[TaskVector],
        *,
        on_tensor: Callable[[int, int], None] | None = None,
    ) -> TaskVector:
        """Merge task vectors into one; see `talos.merge`.

        Args:
            vectors: at least one, of one base.
            on_tensor: called after each tensor with the number of tensors done, and of all.

        Returns:
            The merged vector, float32.

        Raises:
            TalosTypeError: something else than a task vector is among them.
            TalosValueError: there is none, two belong to different bases or shapes of a tensor, the
                settings do not fit, or a sum overflows.
        """
        vectors = read_vectors(vectors)
        bases = one_base(vector.fingerprints for vector in vectors)
        masks = [vector.mask for vector in vectors]
        tensors = len(shapes_of(masks))
        scales = self._scales(vectors)
        chosen = self._choose([Source(vector) for vector in vectors])
        kept = [0] * len(vectors)

        def part_of(i: int, name: str) -> Part:
            part = chosen[i].part(name)
            kept[i] += len(part.values)
            scale, values = scales[i](name), part.values.float()
            return Part(part.index, values if scale == 1.0 else values * scale, part.kept)

        def found() -> Iterator[tuple[str, TensorIndex, Tensor]]:
            for done, (name, overlay) in enumerate(overlays(masks, part_of), 1):
                values, wanted = self._merge_entries(overlay)
                if wanted is None:
                    yield name, overlay.index, values
                else:
                    _check_sums(name, values)
                    yield name, overlay.wanted(wanted), values[true_places(wanted)]
                if on_tensor is not None:
                    on_tensor(done, tensors)

        mask, values = gathered(masks, found())
        return TaskVector(mask, values, bases, self._metadata(vectors, kept))

    def _scale(self, count: int) -> float:
        """Return the factor of all of `count` vectors."""
        return self.scaling_coef

    def _choose(self, vectors: Sequence[Source]) -> Sequence[Source]:
        """Return what takes part of each vector."""
        return vectors

    def _merge_entries(self, overlay: Overlay) -> tuple[Tensor, Tensor | None]:
        """Return the value of each entry of a tensor's union.

        Args:
            overlay: the scaled values of the entries that take part.

        Returns:
            float32 `[union]`; and bool `[union]`, the entries that the result selects, or None: all
            of them.
        """
        return overlay.total(), None

    def settings(self) -> dict[str, Any]:
        """Return the method's name and settings, JSON-able; those that are None are left out."""
        found: dict[str, Any] = {"method": self.name}
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                found[each.name] = value.settings() if isinstance(value, Merge) else value
        return found

    def _store(self, **settings: Any) -> None:
        """Store settings in the form in which they were read."""
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def _coefs(self, count: int) -> Sequence[Coefficient]:
        """Return a coefficient of each vector, without the factor of all."""
        coefs = [1.0] * count if self.scaling_coefs is None else self.scaling_coefs
        if len(coefs) != count:
            raise TalosValueError(
                f"scaling_coefs must hold {count} entries, one a vector, got {len(coefs)}"
            )
        return coefs

    def _scales(self, vectors: Sequence[TaskVector]) -> list[Callable[[str], float]]:
        """Return for each vector the factor of a tensor by its name."""
        factor = self._scale(len(vectors))
        found: list[Callable[[str], float]] = []
        for i, (coef, vector) in enumerate(zip(self._coefs(len(vectors)), vectors, strict=True)):
            if isinstance(coef, Mapping):
                own = _by_tensor(i, coef, vector.mask.names)
                found.append({name: factor * each for name, each in own.items()}.__getitem__)
            else:
                found.append(_always(factor * coef))
        return found

    def _metadata(self, vectors: Sequence[TaskVector], kept: Sequence[int]) -> dict[str, Any]:
        """Return how the merged vector was made: method, settings, and the vectors."""
        factor, coefs = self._scale(len(vectors)), self._coefs(len(vectors))
        made = self.settings()
        made.pop("scaling_coefs", None)
        origins = [vector.origin() for vector in vectors]
        plain = [factor * coef for coef in coefs if not isinstance(coef, Mapping)]
        if self.adds and len(plain) == len(vectors):
            return {"merge": made, "sum": sources(list(zip(plain, origins, strict=True)))}
        parts = [
            {"scale": coef, "kept": entries, "of": origin}
            for coef, entries, origin in zip(coefs, kept, origins, strict=True)
        ]
        return {"merge": made, "sources": parts}


def read_vectors(vectors: Iterable[TaskVector]) -> list[TaskVector]:
    """Return the vectors as a list.

    Raises:
        TalosTypeError: something else than a task vector is among them.
        TalosValueError: there is none.
    """
    if isinstance(vectors, TaskVector | Mapping) or not isinstance(vectors, Iterable):
        raise TalosTypeError(
            f"vectors must be a list of task vectors, got {type(vectors).__name__}; put one vector "
            "in a list, pass the values() of a mapping"
        )
    read = list(vectors)
    for each in read:
        if not isinstance(each, TaskVector):
            raise TalosTypeError(f"vectors must hold task vectors, got {type(each).__name__}")
    if not read:
        raise TalosValueError("vectors must hold at least one task vector, got none")
    return read


def _check_sums(name: str, values: Tensor) -> None:
    """Refuse a sum that overflowed, before a method leaves its entry out."""
    if not bool(values.isfinite().all()):
        raise TalosValueError(
            f"vectors must have finite sums, got infinity or NaN in {name}; take smaller scales"
        )


def _always(scale: float) -> Callable[[str], float]:
    return lambda _: scale


def _read_coef(i: int, coef: Any) -> Coefficient:
    if isinstance(coef, Mapping):
        return {
            str(name): finite(f"scaling_coefs[{i}][{name!r}]", each) for name, each in coef.items()
        }
    return finite(f"scaling_coefs[{i}]", coef)


def _by_tensor(i: int, coefs: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the coefficient of each tensor: that of the longest name that leads to it.

    Raises:
        TalosValueError: a tensor has none, or a name leads to no tensor.
    """
    found, unused = {}, set(coefs) - {""}
    for name in names:
        module = name
        while module and module not in coefs:
            module = module.rpartition(".")[0]
        if module not in coefs:
            raise TalosValueError(
                f"scaling_coefs[{i}] must have a coefficient of {name}, got none; name it or a "
                'module that holds it, or "" for all others'
            )
        found[name] = coefs[module]
        unused.discard(module)
    if unused:
        raise TalosValueError(
            f"scaling_coefs[{i}] must name modules or tensors of the vector, got "
            f"{', '.join(sorted(unused)[:5])}"
        )
    return found
