"""A training step on a device: host syncs, a captured iteration, a side stream, launches."""

from collections.abc import Callable

import pytest

from benches.gpu.checks import CHECKS
from benches.gpu.device import find_device

# The scalars of all tensors, the entries of all, and lr made float64; one launch for each of what
# is taken off and what is put on.
MOST_LAUNCHES = {"step": 3, "swap, from the base": 1, "swap, from a vector": 2}


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_training_step(check: Callable[..., dict[str, object]], compact: bool) -> None:
    found = check(find_device(), compact=compact)
    counts = found.get("launches", MOST_LAUNCHES)
    assert all(counts[name] <= most for name, most in MOST_LAUNCHES.items()), counts
