"""Packages that hold data: where each is looked for, and how it is got. Nothing is downloaded."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from talos.app.extras import package_folder
from talos.errors import TalosOSError

__all__ = ["Package", "bigbench", "data_folder"]

_VARIABLE = "TALOS_DATA"


def data_folder() -> Path:
    """Return the folder of data that is no Python package: TALOS_DATA, or ~/.cache/talos."""
    return Path(os.environ.get(_VARIABLE) or "~/.cache/talos").expanduser()


@dataclass(frozen=True)
class Package:
    """A package of a registry that holds the data of tasks.

    Attributes:
        name: the package and its version.
        licence: what its authors state.
        get: the command that gets it; `{data}` stands for the folder of TALOS_DATA.
        path: the file or folder that holds the data, below that folder.
        module: the Python package that holds it where it was installed with pip.
        system: the folder that holds it where the system's package manager installed it.
    """

    name: str
    licence: str
    get: str
    path: str
    module: str = ""
    system: str = ""

    def find(self, task: str) -> Path:
        """Return the file or folder with the data.

        Args:
            task: the name of the task that needs it.

        Raises:
            TalosOSError: it is not on this machine.
        """
        here = data_folder() / self.path
        if here.exists():
            return here
        if self.system and Path(self.system).exists():
            return Path(self.system)
        if self.module and (folder := package_folder(self.module)):
            return folder
        raise TalosOSError(
            f"data must be on this machine, got {task}, whose package {self.name} is not "
            f"installed and not at {here}; run: {self.command()}"
        )

    def command(self) -> str:
        """Return the command that gets the package to this machine."""
        return self.get.replace("{data}", f'"{data_folder()}"')


def bigbench(folder: Path, task: str) -> Iterator[tuple[str, str]]:
    """Yield the input of each example of a task of bigbench, with its answer of highest score."""
    file = folder / "bigbench" / "benchmark_tasks" / task / "task.json"
    for example in json.loads(file.read_bytes())["examples"]:
        scores = example["target_scores"]
        yield example["input"], max(scores, key=scores.get)
