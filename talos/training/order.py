"""The order of the data: batches again and again, and the place reached in them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.training.randomness import random_states, set_random_states

__all__ = ["Order", "stateful", "under"]


class Order:
    """Yields batches without end, and can begin again where another one of them was.

    A place is found again by going through the epoch from its start: with the generators as they
    were then, a shuffling loader makes the same order, and the batches before the place are
    dropped. A loader with `state_dict` and `load_state_dict`, as those of torchdata, goes there by
    itself, with the same generators.

    Args:
        batches: re-iterable.

    Attributes:
        epoch: number of the epoch, from 0.
        taken: batches taken in it.

    Example:
        >>> order = Order(["a", "b", "c"])
        >>> "".join(next(order) for _ in range(5))
        'abcab'
        >>> again = Order(["a", "b", "c"])
        >>> again.go_to(*order.state())
        >>> next(again)
        'c'
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.epoch = self.taken = 0
        self._iterator: Iterator[Any] | None = None
        self._generators = _generators_of(batches)
        self._start: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            TalosValueError: an epoch has no batch.
        """
        if self._iterator is None:
            self._begin()
        while True:
            assert self._iterator is not None
            for batch in self._iterator:
                self.taken += 1
                return batch
            if self.taken == 0:
                raise TalosValueError(
                    "batches must yield at least one batch"
                    + (" in every epoch: pass a list or a DataLoader, not a generator"
                       if self.epoch else "")
                )  # fmt: skip
            self.epoch, self.taken = self.epoch + 1, 0
            self._begin()

    def _begin(self) -> None:
        self._start = random_states(self._generators)
        self._iterator = iter(self.batches)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the place, JSON-able, and tensors: the generators, now and at the epoch's start.

        Raises:
            TalosTypeError: a loader with a state of its own has one of other parts than texts,
                numbers, lists, dictionaries and tensors.
        """
        content: dict[str, Any] = {"epoch": self.epoch, "taken": self.taken}
        tensors = {f"start/{name}": state for name, state in self._start.items()}
        tensors |= {f"now/{name}": s for name, s in random_states(self._generators).items()}
        if (loader := stateful(self.batches)) is not None:
            content["loader"] = _without_tensors(loader.state_dict(), tensors)
        return content, tensors

    def go_to(
        self, content: Mapping[str, Any], tensors: Mapping[str, Tensor], *, draws: bool = True
    ) -> None:
        """Go to the place that `state` returned, and set all generators to what they were.

        Args:
            content: the place.
            tensors: the generators.
            draws: False leaves the generators as they are now.

        Raises:
            TalosValueError: an epoch has fewer batches than were taken, or a loader does not take
                its own state.
        """
        own = random_states(self._generators)
        set_random_states(under("start/", tensors), self._generators)
        if (loader := stateful(self.batches)) is not None:
            try:
                loader.load_state_dict(_with_tensors(content["loader"], tensors))
            except Exception as error:  # which one depends on the loader
                raise TalosValueError(
                    "batches.load_state_dict() must take the state of the checkpoint, got "
                    f"{error!r:.200}; pass the same loader of the same data"
                ) from error
            self._begin()
        else:
            self._begin()
            assert self._iterator is not None
            skipped = sum(1 for _ in islice(self._iterator, content["taken"]))
            if skipped < content["taken"]:
                raise TalosValueError(
                    f"batches must be those of the checkpoint, which had taken {content['taken']} "
                    f"in an epoch, got {skipped}; pass the same data"
                )
        self.epoch, self.taken = content["epoch"], content["taken"]
        set_random_states(under("now/", tensors) if draws else own, self._generators)


def _generators_of(batches: object) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, each once."""
    inner = getattr(batches, "batch_sampler", None)
    places = (batches, getattr(batches, "sampler", None), inner, getattr(inner, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    return list(dict.fromkeys(each for each in found if isinstance(each, torch.Generator)))


def stateful(batches: object) -> Any:
    """Return a loader that keeps its own place, else None."""
    methods = ("state_dict", "load_state_dict")
    return batches if all(hasattr(batches, each) for each in methods) else None


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with a name in place of each tensor, which goes to `tensors`."""
    if isinstance(value, Tensor):
        name = f"loader/{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _without_tensors(each, tensors) for key, each in value.items()}}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, tensors) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TalosTypeError(
        "batches.state_dict() must hold texts, numbers, lists, tensors and dictionaries of them "
        f"for a checkpoint, got {type(value).__name__}; wrap the loader, or hide its state_dict"
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `_without_tensors` was given; tuples come back as lists."""
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _with_tensors(each, tensors) for key, each in value["dict"].items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): each for k, each in tensors.items() if k.startswith(prefix)}
