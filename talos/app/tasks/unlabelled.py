"""Texts or images to predict, whose labels need not be known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talos.app.tasks.files import read_texts
from talos.app.tasks.images import ImageExample, ImageTask, check_images, find_images
from talos.app.tasks.task import Example, Task

__all__ = ["Rows", "load_rows", "split_of"]


@dataclass(frozen=True)
class Rows:
    """Texts or images in the order of a file or folder.

    Attributes:
        source: the name of the file, the folder or the task.
        reads: "texts" or "images".
        names: the texts, or the places of the images in the folder.
        labels: the label of each; "" where the data has none.
        inputs: the texts, or the images as an `ImageExample` takes them.
    """

    source: str
    reads: str
    names: Sequence[str]
    labels: Sequence[str]
    inputs: Sequence[Any]

    def task(self, class_names: tuple[str, ...], class_texts: tuple[str, ...]) -> Task | ImageTask:
        """Return a task of these classes whose test examples are the rows.

        A row whose label is unknown, or is none of the classes, counts as one of the first class.
        """
        numbers = {name: number for number, name in enumerate(class_names)}
        rows = [
            (each, numbers.get(label, 0))
            for each, label in zip(self.inputs, self.labels, strict=True)
        ]
        about = (self.source, "", class_names, class_texts)
        if self.reads == "images":
            return ImageTask(*about, [], [], [ImageExample(*row) for row in rows], source=about[0])
        return Task(*about, [], [], [Example(*row) for row in rows], source=about[0])


def split_of(task: Task | ImageTask, split: str, folder: str | Path = "") -> Rows:
    """Return the rows of a split of a task, with their labels.

    Args:
        task: the task.
        split: "train", "validation" or "test".
        folder: that of the images, which their names leave out.

    Raises:
        TalosValueError: there is no such split.
    """
    labels = [task.class_names[each.label] for each in task.examples(split)]
    if isinstance(task, Task):
        texts = [each.text for each in task.examples(split)]
        return Rows(task.source or task.name, task.reads, texts, labels, texts)
    images = [each.image for each in task.examples(split)]
    names = [
        str(image.relative_to(folder)) if isinstance(image, Path) else str(place)
        for place, image in enumerate(images)
    ]
    return Rows(task.source or task.name, task.reads, names, labels, images)


def load_rows(path: str | Path, reads: str) -> Rows:
    r"""Load texts of a .csv, .tsv or .jsonl file with the column text, or the images of a folder.

    The label of a text is in the column label, if there is one. That of an image is the subfolder
    of `path` that it lies in.

    Args:
        path: the file or folder.
        reads: "texts" or "images".

    Raises:
        TalosOSError: the file or folder cannot be read.
        TalosValueError: the file is not what its suffix says, lacks the column text, or is empty;
            or an image cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.csv")
        ...     _ = path.write_text("text\nmeow\nwoof\n")
        ...     load_rows(path, "texts").names
        ['meow', 'woof']
    """
    path = Path(path)
    if reads == "images":
        files = find_images(path)
        check_images(files)
        names = [str(image.relative_to(path)) for image in files]
        folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
        return Rows(path.name, reads, names, folders, files)
    rows = read_texts(path)
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    return Rows(path.name, reads, texts, labels, texts)
