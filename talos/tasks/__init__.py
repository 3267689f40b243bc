"""Classification tasks: made of the Python installation itself, or of a user's texts or images."""

from talos.tasks.files import load_file
from talos.tasks.images import ImageBatches, ImageExample, ImageTask, load_digits, load_image_folder
from talos.tasks.registry import available_tasks, load_task
from talos.tasks.task import Batches, Example, LabelledSplits, Task, Tokenizer

__all__ = [
    "Batches",
    "Example",
    "ImageBatches",
    "ImageExample",
    "ImageTask",
    "LabelledSplits",
    "Task",
    "Tokenizer",
    "available_tasks",
    "load_digits",
    "load_file",
    "load_image_folder",
    "load_task",
]
