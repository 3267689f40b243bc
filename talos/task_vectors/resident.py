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

from talos.distributed import is_sharded
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.task_vectors.editing import Launch, check_base, check_scale, launches, touched_weights
from talos.task_vectors.fingerprints import base_fingerprints, bit_sums, remember_bases
from talos.task_vectors.vector import TaskVector
from talos.tensors import check_separate, place

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
        if sharded := [
            name for own in touched.values() for name, p in own.items() if is_sharded(p)
        ]:
            raise TalosTypeError(
                f"model must hold whole weights, got {sharded[0]}, of which ranks hold parts; use "
                "applied() on a sharded model"
            )
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
        self._largest = {key: vector.largest for key, vector in vectors.items()}
        with torch.inference_mode(False):  # what is kept outlives the caller's mode
            self._launches = {
                key: launches(vector.mask, vector.values, touched[key])
                for key, vector in vectors.items()
            }
            self._saved = _shared_room([each for own in self._launches.values() for each in own])
        self._written: list[Launch] = []
        self._homes = _homes(model, self._params)
        self._on: tuple[str, float] | None = None
        self._states = self._read_states()

    @property
    def active(self) -> str | None:
        """Name of the vector that is on, None if none is."""
        return None if self._on is None else self._on[0]

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model: values, packed indices, and the saved bits."""
        parts = [each for own in self._launches.values() for each in own]
        held = [*self._saved, *(tensor for each in parts for tensor in each.index.buffers)]
        held += [each.values for each in parts]
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
        if name is not None and name not in self._launches:
            raise TalosValueError(
                f"name must be one of {', '.join(sorted(self._launches))} or None, got {name}"
            )
        wanted = None if name is None else (name, check_scale(scale))
        self._check_states()
        before = self._on
        try:
            self._write(wanted)
        except BaseException:
            self._write(before)
            raise
        if wanted is None:
            remember_bases(self._params, self._bases, self._sums)

    def _write(self, wanted: tuple[str, float] | None) -> None:
        """Take off what was written, then put on the wanted vector."""
        try:
            while self._written:
                self._written[-1].take_off()
                self._written.pop()
            self._on = None
            if wanted is not None:
                name, scale = wanted
                for launch in self._launches[name]:
                    launch.check(scale, self._largest[name])
                for launch in self._launches[name]:
                    launch.put_on(scale)
                    self._written.append(launch)
            self._on = wanted
        finally:
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


def _shared_room(parts: list[Launch]) -> list[Tensor]:
    """Give the launches of one device and dtype one room for old bits; return the rooms."""
    alike: dict[tuple[torch.device, torch.dtype], list[Launch]] = {}
    for launch in parts:
        alike.setdefault((launch.index.device, launch.dtype), []).append(launch)
    rooms = []
    for (device, dtype), group in alike.items():
        most = max(launch.index.nnz for launch in group)
        rooms.append(torch.empty(most, dtype=dtype, device=device))
        for launch in group:
            launch.keep_bits(rooms[-1])
    return rooms
