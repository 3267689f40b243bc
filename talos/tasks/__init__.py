"""Text classification tasks made of the Python installation itself, or of a user's file."""

from talos.tasks.files import load_file
from talos.tasks.registry import available_tasks, load_task
from talos.tasks.task import Batches, Example, Task, Tokenizer

__all__ = [
    "Batches",
    "Example",
    "Task",
    "Tokenizer",
    "available_tasks",
    "load_file",
    "load_task",
]
