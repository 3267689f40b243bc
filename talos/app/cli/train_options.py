"""Options of `talos train` that go together, checked before any work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talos.app.cli.options import check_choice
from talos.errors import TalosValueError
from talos.options import fraction, integer, positive

__all__ = ["checked_method", "checked_numbers"]

_RANKED, _DENSE = ("l_lora",), ("lota", "random", "magnitude")


def checked_method(
    method: str | None,
    mask: Path | None,
    rank: int | None,
    density: float | None,
    sparse_lr: float | None,
) -> str:
    """Return the method's name after a check of the options that go with it."""
    if method is None:
        method = "nonlinear" if mask is None else "talos"
    from talos.methods import METHODS

    check_choice("--method", method, METHODS)
    if method == "talos" and mask is None:
        raise TalosValueError(
            "--mask must be given with --method talos, got none; make one with talos calibrate"
        )
    if method != "talos" and mask is not None:
        raise TalosValueError(f"--mask must be left out with --method {method}, got {mask}")
    for option, value, takers in (
        ("--rank", rank, _RANKED),
        ("--density", density, _DENSE),
        ("--sparse-lr", sparse_lr, ("lota",)),
    ):
        if value is not None and method not in takers:
            raise TalosValueError(
                f"{option} must be left out with --method {method}, got {value}; it is for "
                f"{', '.join(takers)}"
            )
    if rank is not None:
        integer("--rank", rank, 1)
    if density is not None:
        fraction("--density", density)
    if sparse_lr is not None:
        positive("--sparse-lr", sparse_lr)
    return method


def checked_numbers(checkpoint: Path | None, given: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the arguments of `fine_tune` that go with --checkpoint, and only with it."""
    found = {option: number for option, number in given.items() if number is not None}
    for option, number in found.items():
        if checkpoint is None:
            raise TalosValueError(f"{option} must be left out without --checkpoint, got it")
        if option != "--resume":
            integer(option, number, 1)
    return {option.removeprefix("--"): number for option, number in found.items()}
