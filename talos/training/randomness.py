"""The random number generators that a training draws from: their states as tensors."""

import random
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from talos.errors import TalosValueError

__all__ = ["random_states", "set_random_states"]


def random_states(generators: Iterable[torch.Generator] = ()) -> dict[str, Tensor]:
    """Return the states of torch's generators, of `random` and of NumPy's global generator.

    Args:
        generators: further ones.

    Returns:
        CPU tensors by name: `torch`, `cuda.0` for each CUDA device, `python`, `numpy`, and
        `generator.0` for each further one.

    Example:
        >>> states = random_states()
        >>> drawn = torch.rand(3), random.random(), np.random.rand()
        >>> set_random_states(states)
        >>> torch.equal(drawn[0], torch.rand(3)), drawn[1:] == (random.random(), np.random.rand())
        (True, True)
    """
    _, numbers, gauss = random.getstate()
    _, key, *rest = np.random.get_state(legacy=True)
    found = {
        "torch": torch.get_rng_state(),
        "python": _numbers([*numbers, gauss is not None, gauss or 0.0]),
        "numpy": _numbers([*map(int, key), *rest]),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"cuda.{i}": each for i, each in enumerate(torch.cuda.get_rng_state_all())}
    return found | {f"generator.{i}": each.get_state() for i, each in enumerate(generators)}


def set_random_states(
    states: Mapping[str, Tensor], generators: Iterable[torch.Generator] = ()
) -> None:
    """Set all generators to what `random_states` returned; devices that are not here are left out.

    Args:
        states: by name.
        generators: the further ones, in the same order.

    Raises:
        TalosValueError: they are not such states.
    """
    try:
        torch.set_rng_state(states["torch"])
        *numbers, has_gauss, gauss = states["python"].tolist()
        random.setstate((3, tuple(map(int, numbers)), gauss if has_gauss else None))
        *key, place, has_gauss, gauss = states["numpy"].tolist()
        np.random.set_state(
            ("MT19937", np.array(key).astype(np.uint32), int(place), int(has_gauss), gauss)
        )
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device in range(devices):
            if (state := states.get(f"cuda.{device}")) is not None:
                torch.cuda.set_rng_state(state, device)
        for number, generator in enumerate(generators):
            generator.set_state(states[f"generator.{number}"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TalosValueError(
            f"states must be those of random_states, got others ({error!r:.100}); begin anew"
        ) from error


def _numbers(values: Iterable[float]) -> Tensor:
    """Return integers below 2^32 and floats, all exact: float64, on the CPU."""
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")
