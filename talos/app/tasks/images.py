"""Image classification tasks: a folder with one subfolder a class, or scikit-learn's digits.

PIL and scikit-learn are imported when images are opened or loaded, never before.
"""

import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talos.app.tasks.files import MIN_CLASS
from talos.app.tasks.splits import split_classes
from talos.app.tasks.task import LabelledSplits, ordered
from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class ImageExample:
    """An image with its class.

    Attributes:
        image: A file, or gray values, uint8 [H, W].
        label: Index into the task's `class_names`.
    """

    image: Path | np.ndarray
    label: int

    def open(self) -> Any:
        """Returns the image as PIL's, in RGB.

        Raises:
            TalosError: PIL is not installed.
            TalosValueError: The file is no image that PIL can read.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise TalosError(f"images need Pillow ({error}); pip install pillow") from error
        if isinstance(self.image, np.ndarray):
            return Image.fromarray(self.image).convert("RGB")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.image) as opened:
                    return opened.convert("RGB")
        # PIL's plugins raise what they like over a damaged file.
        except Exception as error:
            raise TalosValueError(
                f"path must hold images that can be read, got {self.image} "
                f"({type(error).__name__}); replace or remove it"
            ) from error


@dataclass(frozen=True)
class ImageTask(LabelledSplits[ImageExample]):
    """An image classification task with three splits that share no image; see `LabelledSplits`."""

    reads = "images"

    def batches(
        self,
        split: str,
        tokenizer: Transform,
        *,
        batch_size: int = 32,
        max_length: int = 48,
        seed: int | None = None,
        epoch: int = 0,
    ) -> "ImageBatches":
        """Returns the split's batches, which can be iterated as often as one likes.

        The arguments are those of `Task.batches`, so that one trainer takes both kinds.

        Args:
            split: "train", "validation" or "test".
            tokenizer: Turns a PIL image into float32 [3, H, W].
            batch_size: Images per batch; the last batch holds what is left.
            max_length: Of texts; images have none.
            seed: Shuffles the examples; None keeps their order.
            epoch: Shuffles in another order for the same seed.

        Returns:
            The batches.

        Raises:
            TalosValueError: There is no such split, or `batch_size` is below 1.

        Example:
            >>> pixels = np.zeros((8, 8), dtype=np.uint8)
            >>> task = ImageTask("t", "", ("a", "b"), ("a", "b"), [ImageExample(pixels, 1)], [], [])
            >>> def transform(image):
            ...     return torch.zeros(3, *image.size)
            >>> next(iter(task.batches("train", transform)))["pixel_values"].shape
            torch.Size([1, 3, 8, 8])
        """
        examples = self.examples(split)
        if batch_size < 1:
            raise TalosValueError(f"batch_size must be at least 1, got {batch_size}")
        return ImageBatches(examples, tokenizer, batch_size=batch_size, seed=seed, epoch=epoch)


class ImageBatches:
    """Batches of images: the same ones in the same order each time they are iterated.

    Each is a dict of `pixel_values`, float32 [B, 3, H, W], and `labels`, int64 [B]. Images are
    opened when their batch is due.

    Args:
        examples: The images.
        transform: Turns a PIL image into float32 [3, H, W].
        batch_size: Images per batch.
        seed: Shuffles; None keeps the order.
        epoch: Together with the seed decides the order.
    """

    def __init__(
        self,
        examples: Sequence[ImageExample],
        transform: Transform,
        *,
        batch_size: int,
        seed: int | None = None,
        epoch: int = 0,
    ) -> None:
        self.examples = examples
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iterations; without a seed it stays the same.

        Args:
            epoch: Number of the epoch.
        """
        self.epoch = epoch

    @property
    def labels(self) -> list[int]:
        """One label per image, in the order of `examples`."""
        return [example.label for example in self.examples]

    def shortest_first(self, stride: int = 1) -> "ImageBatches":
        """Returns batches in the order of the examples; images are all of one size.

        Args:
            stride: Only every so many-th image is taken.

        Returns:
            The batches, whatever the seed.
        """
        return ImageBatches(self.examples[::stride], self.transform, batch_size=self.batch_size)

    def first(self, count: int) -> "ImageBatches":
        """Returns batches of the images that come first in the order of this epoch.

        Args:
            count: How many images.

        Returns:
            The batches, in that order, whatever the seed.
        """
        chosen = ordered(len(self.examples), self.seed, self.epoch)[:count]
        examples = [self.examples[i] for i in chosen]
        return ImageBatches(examples, self.transform, batch_size=self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = ordered(len(self.examples), self.seed, self.epoch)
        for start in range(0, len(order), self.batch_size):
            chosen = [self.examples[i] for i in order[start : start + self.batch_size]]
            pixels = torch.stack([self.transform(example.open()) for example in chosen])
            labels = torch.tensor(
                [example.label for example in chosen], dtype=torch.int64, device="cpu"
            )
            yield {"pixel_values": pixels, "labels": labels}


def load_image_folder(path: str | Path, *, seed: int = 0, name: str | None = None) -> ImageTask:
    """Loads a task from a folder with one subfolder a class, split 80/10/10, each class on its own.

    Images are taken from subfolders of any depth; a file whose bytes repeat another's of its class
    is dropped, so that no image is in two splits. The text of a class is "a photo of a" and its
    folder's name, with spaces for underscores and hyphens. Files are opened when they are needed.

    Args:
        path: The folder.
        seed: Decides which images come into which split.
        name: Name of the task, by default the folder's.

    Returns:
        The task; its classes are the subfolders, sorted.

    Raises:
        TalosOSError: The folder or a file in it cannot be read.
        TalosTypeError: `seed` is not an integer.
        TalosValueError: There are fewer than two subfolders, a class has fewer than three images,
            or one image is in two classes.
    """
    path = Path(path)
    seed = _integer(seed)
    try:
        folders = sorted(each for each in path.iterdir() if each.is_dir() and _visible(each))
        images = [_images(folder) for folder in folders]
        images = _unique(images)
    except OSError as error:
        raise TalosOSError(
            f"path must be a folder that can be read, got {path} ({error.strerror})"
        ) from error
    if len(folders) < 2:
        raise TalosValueError(
            f"path must hold one folder of images a class, at least two, got {len(folders)} in "
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
            f"split, got {', '.join(small)} in {path}; add images ({', '.join(SUFFIXES)})"
        )
    classes = [[ImageExample(file, label) for file in files] for label, files in enumerate(images)]
    train, validation, test = split_classes(classes, seed)
    names = tuple(folder.name for folder in folders)
    return ImageTask(
        name=path.resolve().name if name is None else name,
        description=f"Images of {path.name}, split 80/10/10 within each class.",
        class_names=names,
        class_texts=tuple(f"a photo of a {_words(each)}" for each in names),
        train=train,
        validation=validation,
        test=test,
    )


def load_digits(*, seed: int = 0) -> ImageTask:
    """Loads scikit-learn's 1797 handwritten digits of 8 x 8 pixels, split 80/10/10.

    Args:
        seed: Decides which images come into which split.

    Returns:
        The task; its classes are the digits, whose texts are "the digit zero" and so on.

    Raises:
        TalosError: scikit-learn is not installed.
        TalosTypeError: `seed` is not an integer.
    """
    seed = _integer(seed)
    try:
        from sklearn import datasets
    except ImportError as error:
        raise TalosError(
            f"digits come with scikit-learn ({error}); pip install scikit-learn"
        ) from error
    data = datasets.load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # gray values from 0 to 16
    classes = [
        [ImageExample(image, digit) for image in pixels[data.target == digit]]
        for digit in range(len(_DIGITS))
    ]
    train, validation, test = split_classes(classes, seed)
    return ImageTask(
        name="digits",
        description="Handwritten digits of scikit-learn, split 80/10/10 within each class.",
        class_names=_DIGITS,
        class_texts=tuple(f"the digit {each}" for each in _DIGITS),
        train=train,
        validation=validation,
        test=test,
    )


def _integer(seed: int) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TalosTypeError(f"seed must be an integer, got {seed!r}") from None


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and _visible(file) and file.is_file()
    )


def _unique(classes: list[list[Path]]) -> list[list[Path]]:
    """Keeps the first of equal files; only files of one size are read and compared."""
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
