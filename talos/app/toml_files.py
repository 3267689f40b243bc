"""Recipes, of merges and of experiments, are TOML files that are read alike."""

import tomllib
from pathlib import Path
from typing import Any

from talos.errors import TalosOSError, TalosValueError

__all__ = ["read_toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """Return the keys of a recipe's file.

    Args:
        path: the file.

    Raises:
        TalosOSError: it cannot be read.
        TalosValueError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TalosOSError(f"RECIPE must be a file that can be read, got {path}") from error
    except (ValueError, RecursionError) as error:
        raise TalosValueError(f"RECIPE must be TOML, got {path}: {error}") from None
