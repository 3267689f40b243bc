"""One form of an op, ready to be checked and timed: by a bench, and by a stage of `benches.gpu`."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What is timed, and what it must move or compute at least.

    Attributes:
        step: what is timed; may be called any number of times.
        check: calls it, and raises where its result is not the right one.
        bytes_moved: by the form's byte model.
        flops: of the work, the same for every form.
        state_bytes: held between calls.
    """

    step: Callable[[], object]
    check: Callable[[], None]
    bytes_moved: int | None = None
    flops: int | None = None
    state_bytes: int | None = None

    @property
    def about(self) -> dict[str, int | None]:
        """The fields of a `Record` that it tells."""
        names = ("bytes_moved", "flops", "state_bytes")
        return {name: getattr(self, name) for name in names}
