"""Texts or images to predict, whose labels need not be known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from talos.app.tasks.files import read_texts
from talos.app.tasks.images import ImageExample, ImageTask, find_images
from talos.app.tasks.task import Example, Task

__all__ = ["Rows", "load_rows"]


@dataclass(frozen=True)
class Rows:
    """Texts or images in the order of a file or folder.

    Attributes:
        path: the file or folder.
        reads: "texts" or "images".
        names: the texts, or the places of the images in the folder.
        labels: the label of each; "" where the data has none.
    """

    path: Path
    reads: str
    names: Sequence[str]
    labels: Sequence[str]

    def task(self, class_names: tuple[str, ...], class_texts: tuple[str, ...]) -> Task | ImageTask:
        """Return a task of these classes whose test examples are the rows.

        A row whose label is unknown, or is none of the classes, counts as one of the first class.
        """
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = [numbers.get(label, 0) for label in self.labels]
        name, source = self.path.stem, self.path.name
        if self.reads == "images":
            images = [
                ImageExample(self.path / own, label)
                for own, label in zip(self.names, labels, strict=True)
            ]
            return ImageTask(name, "", class_names, class_texts, [], [], images, source=source)
        texts = [Example(text, label) for text, label in zip(self.names, labels, strict=True)]
        return Task(name, "", class_names, class_texts, [], [], texts, source=source)


def load_rows(path: str | Path, reads: str) -> Rows:
    r"""Load texts of a .csv, .tsv or .jsonl file with the column text, or the images of a folder.

    The label of a text is in the column label, if there is one. That of an image is the subfolder
    of `path` that it lies in.

    Args:
        path: the file or folder.
        reads: "texts" or "images".

    Raises:
        TalosOSError: the file or folder cannot be read.
        TalosValueError: the file is not what its suffix says, lacks the column text, or is empty.

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
        names = [str(image.relative_to(path)) for image in find_images(path)]
        folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
        return Rows(path, reads, names, folders)
    rows = read_texts(path)
    return Rows(path, reads, [text for text, _ in rows], [label for _, label in rows])
