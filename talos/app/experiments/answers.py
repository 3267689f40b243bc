"""Right answers in cells: as bits, hexadecimal, so that no figure needs another evaluation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from talos.app.report.runs import from_hex, to_hex
from talos.evaluation.intervals import Picked

__all__ = ["pack", "pack_picked", "unpack", "unpack_picked"]


def pack(outcomes: Mapping[str, Tensor]) -> dict[str, str]:
    """Return right answers, bool `[n]` of each task, as hexadecimal digits."""
    return {task: to_hex(each) for task, each in outcomes.items()}


def unpack(found: Mapping[str, str], examples: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the right answers of which `pack` made the digits.

    Args:
        found: the digits of each task.
        examples: the number of examples of each task.
    """
    return {task: from_hex(digits, examples[task]) for task, digits in found.items()}


def pack_picked(picked: Mapping[str, Picked]) -> dict[str, Any]:
    """Return the answers of a model that was chosen, and of those that resamples choose.

    Returns:
        `picks`, two hexadecimal digits for each resample, the same for all tasks; and `taken` and
        `tried` of each task.
    """
    picks = next(iter(picked.values())).picks
    return {
        "picks": picks.to(torch.uint8).numpy().tobytes().hex(),
        "taken": {task: to_hex(each.taken) for task, each in picked.items()},
        "tried": {task: [to_hex(row) for row in each.tried] for task, each in picked.items()},
    }


def unpack_picked(found: Mapping[str, Any], examples: Mapping[str, int]) -> dict[str, Picked]:
    """Return the answers of which `pack_picked` made the digits.

    Args:
        found: what it returned.
        examples: the number of examples of each task.
    """
    picks = torch.frombuffer(bytearray.fromhex(found["picks"]), dtype=torch.uint8).long()
    return {
        task: Picked(
            from_hex(digits, examples[task]),
            torch.stack([from_hex(row, examples[task]) for row in found["tried"][task]]),
            picks,
        )
        for task, digits in found["taken"].items()
    }
