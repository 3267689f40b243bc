"""Image classification tasks: a folder with one subfolder per class, or scikit-learn's digits.

Pillow, scikit-learn, NumPy and torch are imported when images are opened or loaded, never before.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talos.app.extras import import_package
from talos.app.nearest import several
from talos.app.tasks.splits import MIN_CLASS, SPLITS, split_classes, words
from talos.app.tasks.task import Collate, LabelledSplits
from talos.errors import TalosOSError, TalosValueError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Transform = Callable[[Any], "Tensor"]


class Stored(ABC):
    """An encoded image that is read when it is opened, such as a row of a data set.

    Attributes:
        key: the same for equal images.
    """

    key: bytes

    @abstractmethod
    def read(self) -> bytes:
        """Return the encoded image."""


@dataclass(frozen=True, eq=False)
class ImageExample:
    """An image with its class.

    Attributes:
        image: a file, what reads one, or pixels, uint8 [H, W] if gray, else [H, W, 3].
        label: index into the task's `class_names`.
    """

    image: "Path | Stored | np.ndarray"
    label: int

    def open(self) -> Any:
        """Return the image as a PIL image in RGB.

        Raises:
            TalosError: Pillow is not installed.
            TalosValueError: Pillow cannot read the file, or it has too many pixels.
        """
        pillow = import_package("PIL.Image")
        if not isinstance(self.image, Path | Stored):
            return pillow.fromarray(self.image).convert("RGB")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            return _read(self.image, lambda opened: opened.convert("RGB"))


def _read(path: Path | Stored, use: Callable[[Any], Any]) -> Any:
    """Open a file and return what `use` makes of the PIL image."""
    pillow = import_package("PIL.Image")
    try:
        with pillow.open(path if isinstance(path, Path) else BytesIO(path.read())) as opened:
            return use(opened)
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise TalosValueError(
            f"path must hold images of at most {pillow.MAX_IMAGE_PIXELS:,} pixels, got {path} with "
            "more; make it smaller"
        ) from error
    except Exception as error:  # Pillow's plugins raise any error over a damaged file
        raise TalosValueError(
            f"path must hold images that can be read, got {path} ({type(error).__name__}); replace "
            "or remove it"
        ) from error


def _decode(opened: Any) -> None:
    """Decode an image, a JPEG at an eighth of its size, which reads all of the file, too."""
    opened.draft(None, (1, 1))
    opened.load()


@dataclass(frozen=True)
class ImageTask(LabelledSplits[ImageExample]):
    """An image classification task; see `LabelledSplits`."""

    reads = "images"

    def check(self) -> None:
        """Read each image once; see `check_images`.

        Raises:
            TalosValueError: one cannot be read, or has too many pixels.
        """
        images = [each.image for split in SPLITS for each in self.examples(split)]
        check_images([each for each in images if isinstance(each, Path)])

    def _content(self, example: ImageExample) -> bytes:
        image = example.image
        if isinstance(image, Path):
            return image.name.encode()
        return image.key if isinstance(image, Stored) else image.tobytes()

    def _inputs(
        self, split: str, tokenizer: Transform, max_length: int
    ) -> tuple[Collate, Sequence[int]]:
        examples = self.examples(split)
        return partial(_stacked, examples, tokenizer), [0] * len(examples)


def check_images(files: Sequence[Path]) -> None:
    """Read each image once, all of it, on several threads.

    Raises:
        TalosValueError: one cannot be read, or has too many pixels.
    """
    pillow = import_package("PIL.Image")
    with warnings.catch_warnings(), ThreadPoolExecutor() as threads:
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        for _ in threads.map(partial(_read, use=_decode), files):
            pass


def _stacked(
    examples: Sequence[ImageExample], transform: Transform, places: Sequence[int]
) -> "dict[str, Tensor]":
    """Open the images of a batch."""
    import torch

    pixels = [transform(examples[place].open()) for place in places]
    return {"pixel_values": torch.stack(pixels)}


def load_image_folder(path: str | Path, *, seed: int = 0) -> ImageTask:
    """Load a task from a folder with one subfolder per class, split 80/10/10 within each class.

    Images are taken from subfolders of any depth. Of equal files in a class one is kept, so that
    no image is in two splits. The text of a class is "a photo of a" and its folder's name, with
    spaces for underscores and hyphens. Files are opened when their batch is made.

    Args:
        path: the folder.
        seed: decides which images are in which split.

    Returns:
        The task; its name is the folder's, its classes are the subfolders, sorted.

    Raises:
        TalosOSError: the folder or a file in it cannot be read.
        TalosValueError: there are fewer than two subfolders, a class has fewer than three images,
            or one image is in two classes; or `seed` is not an integer.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for red, name in enumerate(("cat", "dog")):
        ...         Path(folder, name).mkdir()
        ...         for i in range(10):
        ...             image = Image.new("RGB", (8, 8), (red, i, 0))
        ...             image.save(Path(folder, name, f"{i}.png"))
        ...     task = load_image_folder(folder)
        >>> task.class_texts, len(task.train), len(task.validation), len(task.test)
        (('a photo of a cat', 'a photo of a dog'), 16, 2, 2)
    """
    path = Path(path)
    try:
        folders = sorted(each for each in path.iterdir() if each.is_dir() and _visible(each))
        found = [_images(folder) for folder in folders]
        images = _unique(found)
    except OSError as error:
        raise TalosOSError(
            f"path must be a folder that can be read, got {path} ({error.strerror})"
        ) from error
    if len(folders) < 2:
        raise TalosValueError(
            f"path must hold one folder of images per class, at least two, got {len(folders)} in "
            f"{path}; sort the images into folders that are named after their classes"
        )
    small = [
        f"{folder.name} {len(files)}"
        for folder, files in zip(folders, images, strict=True)
        if len(files) < MIN_CLASS
    ]
    if small:
        raise TalosValueError(
            f"path must hold at least {MIN_CLASS} different images of each class, one for each "
            f"split, got {several(small)} in {path}; add images ({', '.join(SUFFIXES)})"
        )
    classes = [[ImageExample(file, label) for file in files] for label, files in enumerate(images)]
    names = tuple(folder.name for folder in folders)
    return ImageTask(
        path.resolve().name,
        f"Images of {path.name}, split 80/10/10 within each class.",
        names,
        tuple(f"a photo of a {words(each)}" for each in names),
        *split_classes(classes, seed),
        source=path.resolve().name,
        repeats=sum(map(len, found)) - sum(map(len, images)),
    )


def find_images(path: Path) -> list[Path]:
    """Return the images of a folder and its subfolders, sorted.

    Raises:
        TalosOSError: the folder cannot be read.
        TalosValueError: there is none.
    """
    if not path.is_dir():
        raise TalosOSError(f"path must be a folder of images, got {path}")
    found = _images(path)
    if not found:
        raise TalosValueError(
            f"path must hold images, got none in {path}; add files ({', '.join(SUFFIXES)})"
        )
    return found


def load_digits(*, seed: int = 0) -> ImageTask:
    """Load scikit-learn's 1797 handwritten digits of 8 x 8 pixels, split 80/10/10.

    Args:
        seed: decides which images are in which split.

    Returns:
        The task; its class texts are "the digit zero" to "the digit nine".

    Raises:
        TalosError: scikit-learn is not installed.
        TalosValueError: `seed` is not an integer.

    Example:
        >>> task = load_digits()
        >>> task.class_texts[0], len(task.test)
        ('the digit zero', 179)
    """
    import numpy as np

    data = import_package("sklearn.datasets").load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # gray values from 0 to 16
    classes = [
        [ImageExample(image, digit) for image in pixels[data.target == digit]]
        for digit in range(len(_DIGITS))
    ]
    return ImageTask(
        "digits",
        "Handwritten digits of scikit-learn, split 80/10/10 within each class.",
        _DIGITS,
        tuple(f"the digit {each}" for each in _DIGITS),
        *split_classes(classes, seed),
    )


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and _visible(file) and file.is_file()
    )


def _unique(classes: list[list[Path]]) -> list[list[Path]]:
    """Keep the first of equal files; only files of one size are read and compared."""
    sizes = Counter(file.stat().st_size for files in classes for file in files)
    first: dict[str, Path] = {}
    kept: list[list[Path]] = []
    for files in classes:
        kept.append([])
        for file in files:
            if sizes[file.stat().st_size] > 1:
                known = first.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
                if known is not file and known in kept[-1]:
                    continue
                if known is not file:
                    raise TalosValueError(
                        f"path must hold each image in one class, got {known} and {file}, which "
                        "are equal; remove one of them"
                    )
            kept[-1].append(file)
    return kept
