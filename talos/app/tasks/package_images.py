"""Read the labelled pictures of packages, each in the layout in which its authors published it.

NumPy and Pillow are imported when pictures are read, never before.
"""

import base64
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talos.app.extras import import_package
from talos.app.tasks.splits import deduplicate_by

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Picture", "cifar10", "mnist"]


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that a task may use.

    Attributes:
        content: the bytes of a file, or pixels, uint8 [H, W] or [H, W, 3].
        label: index of its class.
        group: pictures of one group are always in the same split.
    """

    content: "bytes | np.ndarray"
    label: int
    group: str

    def pixels(self) -> "np.ndarray":
        """Return the pixels."""
        import numpy as np

        if not isinstance(self.content, bytes):
            return self.content
        with import_package("PIL.Image").open(io.BytesIO(self.content)) as opened:
            return np.asarray(opened.convert("RGB"))


def _unique(pictures: Iterable[Picture]) -> list[Picture]:
    """Keep the first of equal pictures, and none of those that have two labels."""
    return deduplicate_by(
        lambda each: each.content if isinstance(each.content, bytes) else each.content.tobytes(),
        pictures,
    )


def _bigbench(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the examples of a task of bigbench."""
    file = folder / "bigbench" / "benchmark_tasks" / task / "task.json"
    examples: list[dict[str, Any]] = json.loads(file.read_bytes())["examples"]
    return examples


def _answer(example: dict[str, Any]) -> str:
    """Return the answer of an example of bigbench that has the highest score."""
    scores: dict[str, float] = example["target_scores"]
    return max(scores, key=lambda answer: scores[answer])


def cifar10(folder: Path) -> list[Picture]:
    """Read the test pictures of CIFAR-10, which bigbench holds as PNG files in base64."""
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
    return _numbered(
        (base64.b64decode(each["input"]), (*names, "truck").index(_answer(each)))
        for each in _bigbench(folder, "cifar10_classification/base64")
    )


def mnist(folder: Path) -> list[Picture]:
    """Read the digits of MNIST that bigbench holds in black and white, in their full size."""
    import numpy as np

    def drawn(text: str) -> "np.ndarray":
        rows = text.strip("\n").split("\n")
        letters = np.frombuffer("".join(rows).encode(), np.uint8).reshape(len(rows), -1)
        return np.where(letters == ord(" "), 0, 255).astype(np.uint8)

    return _numbered(
        (drawn(each["input"]), int(_answer(each)))
        for each in _bigbench(folder, "mnist_ascii")
        if "@" not in each["input"]  # these are smaller and in shades
    )


def _numbered(found: "Iterable[tuple[bytes | np.ndarray, int]]") -> list[Picture]:
    """Return pictures without repeats, each a group of its own."""
    return _unique(Picture(*each, str(place)) for place, each in enumerate(found))
