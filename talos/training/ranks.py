"""A training on several ranks: what must be the same on all, and what each has of its own.

Each rank goes through batches of its own and makes their gradient. `Phase.average` makes the mean
of all ranks, so that all take the same step.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talos.batches import digest_of
from talos.distributed import (
    check_same,
    errors_on_all_ranks,
    rank,
    several_processes,
    world_size,
)
from talos.errors import TalosTypeError, TalosValueError
from talos.tensors import sums_of_bits

__all__ = ["check_ranks", "digest_if_readable", "mean_loss", "warn_of_same_batches"]


def check_ranks(model: nn.Module, settings: Mapping[str, str]) -> None:
    """Refuse settings and weights that differ between ranks; all ranks call this.

    Args:
        model: before its training. Sharded weights are not compared.
        settings: of the training, by name.

    Raises:
        TalosValueError: the model is wrapped in DistributedDataParallel; or something differs,
            which every rank raises.
    """
    if any(isinstance(each, nn.parallel.DistributedDataParallel) for each in model.modules()):
        raise TalosValueError(
            "model must not be wrapped in DistributedDataParallel, got it wrapped: fine_tune "
            "averages the gradients itself; pass the module inside it"
        )
    if not several_processes():
        return
    check_same(settings, "pass the same settings on each")
    held = {name: each for name, each in model.state_dict().items() if isinstance(each, Tensor)}
    sums = sums_of_bits(held)
    check_same(
        {f"the sum of the bits of {name}": each for name, each in sums.items()},
        "load the same weights on each, or send those of rank 0: for each in "
        "[*model.parameters(), *model.buffers()]: torch.distributed.broadcast(each.data, 0)",
    )


def mean_loss(loss: float, device: torch.device) -> float:
    """Return the mean of all ranks' losses, NaN if one has none; all ranks call this.

    Args:
        loss: of this rank.
        device: of what is trained.
    """
    if not several_processes():
        return loss
    total = torch.tensor(loss, dtype=torch.float64, device=device) / world_size()
    dist.all_reduce(total)
    return float(total)


def digest_if_readable(batch: Any) -> str:
    """Return a hash of the content of a batch; "" if it cannot be read."""
    try:
        return digest_of(batch)
    except TalosTypeError:
        return ""


def warn_of_same_batches(digest: str) -> None:
    """Warn, on rank 0, if all ranks train on the same batches; all ranks call this.

    Args:
        digest: of this rank's first batch; "" is like no other one.
    """
    with errors_on_all_ranks() as digests:
        digests.append(digest)
    if len(digests) > 1 and set(digests) == {digest} != {""} and rank() == 0:
        warnings.warn(
            f"the first batch is the same on all {len(digests)} ranks, so that they do the same "
            "work; give each its share, e.g. with torch.utils.data.DistributedSampler",
            stacklevel=6,
        )
