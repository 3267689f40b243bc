"""A recipe of a tiny random encoder that runs to its end in a second or two."""

from pathlib import Path
from typing import Any

from talos.app.experiments.recipe import Recipe, recipe_of
from talos.app.experiments.run import run_experiment
from talos.app.models import Encoder, load_encoder
from talos.app.tasks import Example, Task
from tests.tiny import save_tiny_encoder

TASKS = ("pets", "signs")
_WORDS = {"pets": ("cat", "dog"), "signs": ("plus", "minus")}


def tiny_recipe(**changes: Any) -> Recipe:
    """Return a recipe of two tasks, two methods, two rates and two seeds.

    Args:
        **changes: keys of the recipe's file, which replace those here; tables are merged.
    """
    content: dict[str, Any] = {
        "title": "A tiny experiment",
        "seeds": [0, 1],
        "models": ["tiny"],
        "tasks": list(TASKS),
        "calibration": {"rounds": 1, "samples": 8, "batch_size": 4},
        "training": {"steps": 2, "batch_size": 4, "max_length": 12},
        "evaluation": {"coefficients": 3, "resamples": 20},
        "methods": [
            {"method": "talos", "lr": [1e-3, 1e-2]},
            {"method": "nonlinear", "lr": [1e-3]},
        ],
    }
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    return recipe_of(content)


def tiny_tasks() -> list[Task]:
    """Return two tasks of texts with 16 training examples each, and 8 of the other splits."""
    return [
        Task(name, f"which {name}", words, words, *(_texts(words, n) for n in (16, 8, 8)))
        for name, words in _WORDS.items()
    ]


def tiny_encoder(folder: Path) -> Encoder:
    """Write the tiny model to a folder, and load it."""
    return load_encoder(save_tiny_encoder(folder))


def run_tiny(out: Path, recipe: Recipe | None = None, **options: Any) -> dict[str, Any]:
    """Run a tiny recipe and return its results; the model is written beside the folder.

    Args:
        out: the experiment's folder.
        recipe: None: `tiny_recipe()`.
        **options: of `run_experiment`.
    """
    encoders = {"tiny": tiny_encoder(out.parent / "tiny-model")}
    given: dict[str, Any] = {"encoders": encoders, "tasks": tiny_tasks()}
    return run_experiment(recipe or tiny_recipe(), out, **given | options)


def _texts(words: tuple[str, ...], count: int) -> list[Example]:
    return [Example(f"{words[i % 2]} {count} number {i}", i % 2, f"{count}") for i in range(count)]
