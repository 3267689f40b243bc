"""Classification tasks: of the Python installation, of packages, or of a user's texts or images."""

from talos.app.tasks.files import load_file
from talos.app.tasks.images import ImageExample, ImageTask, load_digits, load_image_folder
from talos.app.tasks.load import load_any
from talos.app.tasks.registry import available_tasks, load_task
from talos.app.tasks.task import Batches, Example, LabelledSplits, Task

__all__ = [
    "Batches",
    "Example",
    "ImageExample",
    "ImageTask",
    "LabelledSplits",
    "Task",
    "available_tasks",
    "load_any",
    "load_digits",
    "load_file",
    "load_image_folder",
    "load_task",
]
