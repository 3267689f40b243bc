"""Load models and data by the names that the options take."""

from collections.abc import Sequence

from talos.app.cli.options import as_options
from talos.app.experiments.machine import default_device
from talos.app.models import Classifier, Encoder, takes_images
from talos.app.models import load_encoder as load
from talos.app.models.clip import PREFIX
from talos.app.models.folders import find_folder
from talos.app.models.heads import classifier_for
from talos.app.models.packages import PACKAGED
from talos.app.tasks import ImageTask, Task, load_any
from talos.app.tasks.unlabelled import Rows, split_of
from talos.app.tasks.unlabelled import load_rows as read_rows
from talos.errors import TalosValueError

__all__ = ["check_names", "find_model", "load_classifier", "load_data", "load_encoder", "load_rows"]


def load_data(data: str) -> Task | ImageTask:
    """Load the data of --data; see `load_any`."""
    with as_options({"path": "--data", "name": "--data", "data": "--data"}):
        return load_any(data)


def check_names(tasks: Sequence[Task | ImageTask]) -> list[str]:
    """Return the names of the tasks.

    Raises:
        TalosValueError: two have the same name, as files of one name in two folders do.
    """
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TalosValueError(
            f"--data must have different names, got {', '.join(sorted(twice))} twice; rename a file"
        )
    return names


def load_rows(data: str, model: str, split: str | None = None) -> Rows:
    """Load what a model is to predict: all of a file or a folder, or a split of a task.

    Raises:
        TalosValueError: the model reads texts and the task holds images, or the other way round.
    """
    if split is not None:
        task = load_data(data)
        _check_reads(model, [task])
        return split_of(task, split, data)
    with as_options({"path": "--data"}):
        return read_rows(data, find_model(model))


def find_model(model: str) -> str:
    """Find a model, and download one of the hub; return what it reads, texts or images."""
    with as_options({"source": "--model"}):
        here = model in PACKAGED or model.startswith(PREFIX)
        return "images" if takes_images(model if here else str(find_folder(model)[0])) else "texts"


def load_encoder(model: str, *tasks: Task | ImageTask) -> Encoder:
    """Load a model to the GPU, or to the CPU where there is none.

    Raises:
        TalosValueError: the model reads texts and a task holds images, or the other way round.
    """
    _check_reads(model, tasks)
    with as_options({"source": "--model"}):
        return load(model).to(default_device())


def _check_reads(model: str, tasks: Sequence[Task | ImageTask]) -> None:
    """Refuse tasks whose examples a model does not read."""
    reads = find_model(model)
    for task in tasks:
        if task.reads != reads:
            raise TalosValueError(
                f"--model must read the {task.reads} of {task.name}, got {model}, which reads "
                f"{reads}; take "
                + ("--data of texts" if reads == "texts" else "--data digits or a folder of images")
                + (" or a model of images as --model" if reads == "texts" else "")
            )


def load_classifier(model: str, task: Task | ImageTask) -> Classifier:
    """Load a model as a classifier of a task."""
    with as_options({"class_texts": "the labels of --data"}):
        return classifier_for(load_encoder(model, task), task)
