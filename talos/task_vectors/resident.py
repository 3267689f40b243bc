"""Many task vectors ready on one model: put on, rescaled, exchanged or taken off in place.

The vectors' values and packed indices lie on the model's devices from the start, with room for the
base's bits under the vector that is on. A search for a scaling coefficient, or an exchange of one
task for another, therefore moves only the selected entries: no weight is copied or loaded, nothing
is allocated, and the host never waits for a device.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.task_vectors.editing import (
    check_base,
    check_scale,
    check_sums,
    may_overflow,
    touched_weights,
)
from talos.task_vectors.fingerprints import base_fingerprints, bit_sums, remember_bases
from talos.task_vectors.sums import slices_of
from talos.task_vectors.vector import TaskVector
from talos.tensors import check_separate, place
from talos_kernels import Index, TensorIndex, add_delta_, revert_delta_

__all__ = ["ResidentVectors"]


class ResidentVectors:
    """Task vectors that lie ready on a model's devices, of which at most one is on at a time.

    The weights are edited in place. Each `swap` takes two launches for all weights of one device
    and dtype: one takes off, one puts on. As a context manager it leaves the weights bit for bit as
    it found them, also after an exception. Inside, other code may read the weights, but must not
    write, cast, move or replace those that a vector touches: the next `swap` and the end of the
    block refuse then, with nothing written. A write that torch does not count, through `.data` or
    NumPy, is not noticed. While a vector is on, the weights count as another base for every other
    task vector.

    Args:
        model: the base, on any devices, in float32, bfloat16, float16 or float64.
        vectors: task vectors by any names; they may select different entries and tensors.
        force: also take a model whose weights have other fingerprints.

    Attributes:
        active: name of the vector that is on, None if none is.

    Raises:
        TalosTypeError: `model` is no module, or its weights have another dtype.
        TalosValueError: there is no vector, or the model lacks a tensor of one, has another shape
            of it or another fingerprint.

    Example:
        >>> from talos import Mask
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> left, right = (
        ...     TaskVector(Mask.from_dense({"weight": torch.tensor([[x, not x]])}), torch.ones(1))
        ...     for x in (True, False)
        ... )
        >>> with ResidentVectors(model, {"left": left, "right": right}) as resident:
        ...     for name, scale in [("left", 0.5), ("left", 1.0), ("right", 0.25)]:
        ...         resident.swap(name, scale)
        ...         print(model.weight.tolist())
        [[1.5, 1.0]]
        [[2.0, 1.0]]
        [[1.0, 1.25]]
        >>> model.weight.tolist()
        [[1.0, 1.0]]
    """

    def __init__(
        self, model: nn.Module, vectors: Mapping[str, TaskVector], *, force: bool = False
    ) -> None:
        if not isinstance(vectors, Mapping) or not all(
            isinstance(name, str) and isinstance(vector, TaskVector)
            for name, vector in vectors.items()
        ):
            raise TalosTypeError(
                "vectors must map names to task vectors, got something else; pass "
                '{"name": task_vector}'
            )
        if not vectors:
            raise TalosValueError("vectors must hold at least one task vector, got none")
        touched = {name: touched_weights(model, vector.mask) for name, vector in vectors.items()}
        names: dict[Hashable, str] = {}  # of each weight; vectors may name a tied one differently
        self._params: dict[str, Tensor] = {}
        for weights in touched.values():
            for name, param in weights.items():
                if names.setdefault(place(param), name) == name:
                    self._params[name] = param
        check_separate(self._params, "weights that the vectors edit")
        verify = not force and any(vector.fingerprints for vector in vectors.values())
        self._bases = base_fingerprints(self._params, verify=verify)
        self._sums = bit_sums(self._params)
        for key, vector in vectors.items() if verify else ():
            first_names = {name: names[place(param)] for name, param in touched[key].items()}
            check_base(
                {name: self._bases[first] for name, first in first_names.items()},
                vector.fingerprints,
            )
        self._vectors = frozenset(vectors)
        with torch.inference_mode(False):  # what is kept outlives the caller's mode
            self._groups = _groups(self._params, vectors, touched)
        self._homes = _homes(model, self._params)
        self._on: _Scaled | None = None
        self._states = self._read_states()

    @property
    def active(self) -> str | None:
        """Name of the vector that is on, None if none is."""
        return None if self._on is None else self._on.name

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model: values, packed indices, and the saved bits."""
        held = [tensor for group in self._groups for tensor in group.tensors()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    def swap(self, name: str | None, scale: float = 1.0) -> None:
        """Take off the vector that is on, if any, and put another one on the base.

        Args:
            name: the vector, also the one that is on, with another coefficient; None leaves the
                base, bit for bit.
            scale: the scaling coefficient.

        Raises:
            TalosTypeError: `scale` is no real number.
            TalosValueError: no vector has the name, `scale` is not finite, or a finite weight
                would overflow; the vector that was on is on again.
            TalosRuntimeError: other code wrote, cast, moved or replaced a weight.
        """
        if name is not None and name not in self._vectors:
            raise TalosValueError(
                f"name must be one of {', '.join(sorted(self._vectors))} or None, got {name}"
            )
        wanted = None if name is None else _Scaled(name, check_scale(scale))
        self._check_states()
        before = self._on
        try:
            for group in self._groups:
                group.swap(wanted)
        except BaseException:
            for group in self._groups:
                group.swap(before)
            self._states = self._read_states()
            raise
        self._on = wanted
        if wanted is None:
            remember_bases(self._params, self._bases, self._sums)
        self._states = self._read_states()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.swap(None)

    def _read_states(self) -> dict[str, tuple[Any, ...]]:
        return {name: _state(param) for name, param in self._params.items()}

    def _check_states(self) -> None:
        """Refuse weights that are not as the last swap left them."""
        changes = [
            f"{home.name} replaced by another tensor" for home in self._homes if home.is_left
        ]
        for name, param in self._params.items():
            old, new = self._states[name], _state(param)
            differing = [what for what, a, b in zip(_PARTS, old, new, strict=True) if a != b]
            changes += [f"{name} with another {differing[0]}"] if differing else []
        if changes:
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            remedy = "make ResidentVectors anew" if self._on is None else "load the weights again"
            raise TalosRuntimeError(
                "model must keep the weights that resident vectors edit, got "
                f"{changes[0]}{more} since the last swap; nothing was written, {remedy}"
            )


_PARTS = ("device", "dtype", "shape", "stride", "storage", "version, so other code wrote it")


def _state(param: Tensor) -> tuple[Any, ...]:
    """Return what changes when a weight is moved, cast, reshaped or written; see `_PARTS`."""
    version = None if param.is_inference() else param._version  # inference tensors count none
    return param.device, param.dtype, param.shape, param.stride(), param.data_ptr(), version


@dataclass(frozen=True)
class _Home:
    """A place in a module that holds an edited weight, under one of its names."""

    name: str
    parameters: Mapping[str, Tensor | None]
    key: str
    param: Tensor

    @property
    def is_left(self) -> bool:
        return self.parameters.get(self.key) is not self.param


def _homes(model: nn.Module, params: Mapping[str, Tensor]) -> list[_Home]:
    names = {place(param): name for name, param in params.items()}
    return [
        _Home(names[place(param)], held, key, param)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for key, param in held.items()
        if param is not None and place(param) in names
    ]


@dataclass(frozen=True)
class _Scaled:
    """A vector's name and the coefficient that it is on with."""

    name: str
    scale: float


class _Group:
    """The weights of one device and dtype, and every vector's part for them.

    Attributes:
        names: of the weights.
        params: the weights.
        deltas: packed index and values by the vectors' names.
        largest: magnitude of the values, by the vectors' names.
        saved: room for the base's bits under the vector that is on.
        on: the vector that is on.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        deltas: dict[str, tuple[Index, Tensor]],
        largest: Mapping[str, float],
    ) -> None:
        self.names, self.params = list(params), list(params.values())
        self.deltas = deltas
        self.largest = largest
        most = max(index.nnz for index, _ in deltas.values())
        self.saved = torch.empty(most, dtype=self.params[0].dtype, device=self.params[0].device)
        self.on: _Scaled | None = None

    def swap(self, wanted: _Scaled | None) -> None:
        """Take off the vector that is on, then put on the wanted one: at most two launches.

        Raises:
            TalosValueError: a weight would overflow; then none is on.
        """
        if self.on is not None:
            index, _ = self.deltas[self.on.name]
            revert_delta_(self.params, index, self.saved[: index.nnz])
            self.on = None
        if wanted is not None:
            index, values = self.deltas[wanted.name]
            saved = self.saved[: index.nnz]
            if may_overflow(saved.dtype, wanted.scale * self.largest[wanted.name]):
                check_sums(self.names, self.params, index, values, wanted.scale)
            add_delta_(self.params, index, values, scale=wanted.scale, saved=saved)
            self.on = wanted

    def tensors(self) -> list[Tensor]:
        """Return what is held on the device beside the weights."""
        parts = [[values, *index.buffers] for index, values in self.deltas.values()]
        return [tensor for part in (*parts, [self.saved]) for tensor in part]


def _groups(
    params: Mapping[str, Tensor],
    vectors: Mapping[str, TaskVector],
    touched: Mapping[str, Mapping[str, Tensor]],
) -> list[_Group]:
    """Return one group per device and dtype, with the vectors' values and indices uploaded.

    `params` holds every weight that a vector touches, once; `touched` holds those of each vector
    by its own names.
    """
    members: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, param in params.items():
        members.setdefault((param.device, param.dtype), {})[name] = param
    largest = {key: vector.largest for key, vector in vectors.items()}
    groups = []
    for (device, _), group in members.items():
        packed: dict[int, Index] = {}  # vectors of one mask share its index
        deltas = {}
        for key, vector in vectors.items():
            names = {place(param): name for name, param in touched[key].items()}
            if id(vector.mask) not in packed:
                selected = [
                    _part(vector, names.get(place(param)), param.numel())
                    for param in group.values()
                ]
                packed[id(vector.mask)] = Index.pack(selected, device)
            slices = slices_of(vector.mask)
            own = [names[place(param)] for param in group.values() if place(param) in names]
            whole = own == list(touched[key])  # no copy then, where the model is on the CPU
            parts = [vector.values[slices[name]] for name in own]
            values = vector.values if whole else torch.cat([vector.values[:0], *parts])
            deltas[key] = packed[id(vector.mask)], values.to(device)
        groups.append(_Group(group, deltas, largest))
    return groups


def _part(vector: TaskVector, name: str | None, numel: int) -> TensorIndex:
    """Return what a vector selects of one weight: nothing where it does not name it."""
    if name is None:
        return TensorIndex.from_positions(torch.zeros(0, dtype=torch.int64, device="cpu"), numel)
    return vector.mask.indices[name]
