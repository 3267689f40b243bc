"""Read the labelled pictures of packages, each in the layout in which its authors published it.

NumPy and Pillow are imported when pictures are read, never before.
"""

import base64
import gzip
import io
import json
import pickle
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talos.app.extras import import_package
from talos.app.tasks.packages import bigbench
from talos.app.tasks.splits import deduplicate_by

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Picture", "animals", "cifar10", "drawings", "fashion", "letters", "mnist"]

LETTER_SIZE = 40
_SYMBOLS = re.compile("(?i)symbol|dingbat|^D05|math|initials|keyboard")  # fonts without letters


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


def cifar10(folder: Path) -> list[Picture]:
    """Read the test pictures of CIFAR-10, which bigbench holds as PNG files in base64."""
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
    return _numbered(
        (base64.b64decode(given), (*names, "truck").index(answer))
        for given, answer in bigbench(folder, "cifar10_classification/base64")
    )


def mnist(folder: Path) -> list[Picture]:
    """Read the digits of MNIST that bigbench holds in black and white, in their full size."""
    import numpy as np

    def drawn(text: str) -> "np.ndarray":
        rows = text.strip("\n").split("\n")
        letters = np.frombuffer("".join(rows).encode(), np.uint8).reshape(len(rows), -1)
        return np.where(letters == ord(" "), 0, 255).astype(np.uint8)

    return _numbered(
        (drawn(given), int(answer))
        for given, answer in bigbench(folder, "mnist_ascii")
        if "@" not in given  # these are smaller and in shades
    )


def _numbered(found: "Iterable[tuple[bytes | np.ndarray, int]]") -> list[Picture]:
    """Return pictures without repeats, each a group of its own."""
    return _unique(Picture(*each, str(place)) for place, each in enumerate(found))


def fashion(folder: Path) -> list[Picture]:
    """Read Fashion-MNIST, four files of the form IDX."""
    return _numbered(
        (image, int(label))
        for part in ("train", "t10k")
        for image, label in zip(
            _idx(folder / f"{part}-images-idx3-ubyte.gz"),
            _idx(folder / f"{part}-labels-idx1-ubyte.gz"),
            strict=True,
        )
    )


def _idx(file: Path) -> "np.ndarray":
    """Read an array of bytes: two zeros, 8, the number of axes, four bytes for each, the bytes."""
    import numpy as np

    content = gzip.decompress(file.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of NumPy's arrays, which runs no other code."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        allowed: dict[str, Any] = {"ndarray": np.ndarray, "dtype": np.dtype}
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda kind, shape, code: np.ndarray.__new__(np.ndarray, shape, code)
        if module == "numpy" and name in allowed:
            return allowed[name]
        raise ValueError(f"a pickle that asks for {module}.{name}")


def animals(folder: Path) -> list[Picture]:
    """Read the outlines of animals of animal-mnist: pickled arrays of pictures and of labels."""
    place = folder / "data" / "Animal_MNIST"
    images, labels = (
        _ArraysOnly(io.BytesIO(gzip.decompress(place.joinpath(name).read_bytes()))).load()
        for name in ("animal_data_version_3.gz", "animal_label_version_3.gz")
    )
    return _numbered((image, int(label)) for image, label in zip(images, labels, strict=True))


def drawings(answers: tuple[str, ...]) -> Callable[[Path], list[Picture]]:
    """Return the builder of easy-vqa's drawings that a question with one of the answers is about.

    Args:
        answers: the classes.
    """

    def build(folder: Path) -> list[Picture]:
        return _numbered(_asked(folder / "data", answers))

    return build


def _asked(folder: Path, answers: tuple[str, ...]) -> Iterator[tuple[bytes, int]]:
    for part in ("train", "test"):
        questions = json.loads((folder / part / "questions.json").read_bytes())
        found = {number: answer for _, answer, number in questions if answer in answers}
        for number, answer in sorted(found.items()):
            content = (folder / part / "images" / f"{number}.png").read_bytes()
            yield content, answers.index(answer)


def letters(folder: Path) -> list[Picture]:
    """Draw the letters A to Z in each font of a folder; the fonts of a family are a group."""
    import numpy as np

    pillow, font, draw = map(import_package, ("PIL.Image", "PIL.ImageFont", "PIL.ImageDraw"))
    found = []
    files = (each for each in folder.rglob("*") if re.search(r"(?i)\.[ot]tf$", each.name))
    for file in sorted(files):
        if _SYMBOLS.search(file.name) or not file.is_file():  # a link may lead nowhere
            continue
        drawn = font.truetype(str(file), LETTER_SIZE * 3 // 4)
        family = str(drawn.getname()[0]).split()[0]  # "Lato Black" and "Lato Light" are Lato
        for label, letter in enumerate(string.ascii_uppercase):
            image = pillow.new("L", (LETTER_SIZE, LETTER_SIZE))
            middle = LETTER_SIZE // 2, LETTER_SIZE // 2
            draw.Draw(image).text(middle, letter, fill=255, font=drawn, anchor="mm")
            found.append(Picture(np.asarray(image), label, family))
    return _unique(found)
