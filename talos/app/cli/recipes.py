"""Recipes of merges: a TOML file that names vectors, method, settings and outputs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talos.app.cli.options import as_options
from talos.app.nearest import did_you_mean
from talos.app.toml_files import read_toml
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from torch import Tensor

    from talos.merging import Coefficient, Merge

__all__ = ["Output", "Recipe", "check_recipe_base", "read_recipe"]

_KEYS = {
    "the recipe": ("base", "method", "vectors", "settings", "outputs"),
    "vectors": ("file", "scaling_coef"),
    "outputs": ("file", "dtype"),
}
_TERM = re.compile(r"(.+\.safetensors):([^:/]*)")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Output:
    """A file to write.

    Attributes:
        file: the file.
        dtype: of its values; None: float32, as merged.
    """

    file: Path
    dtype: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What a merge reads, does and writes.

    Attributes:
        files: the vectors.
        merge: the method with its settings and the vectors' coefficients.
        outputs: the files to write.
        base: the model that the vectors must belong to, if the recipe names one.
    """

    files: tuple[Path, ...]
    merge: "Merge"
    outputs: tuple[Output, ...]
    base: str | None = None


def read_recipe(path: Path) -> Recipe:
    r"""Read a recipe and check all of it but the files that it names.

    Files are relative to the folder of the recipe.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: it is not TOML, a key is unknown or missing, or a value is out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "recipe.toml")
        ...     text = 'method = "ties"\nvectors = ["a.safetensors"]\noutputs = ["b.safetensors"]\n'
        ...     _ = path.write_text(text + "[settings]\ndensity = 0.1\n")
        ...     read_recipe(path).merge
        Ties(scaling_coef=1.0, scaling_coefs=(1.0,), density=0.1)
    """
    from talos.merging import merge_of

    content = read_toml(path)
    _check_keys(path, "the recipe", content)
    vectors = [_entry(path, "vectors", each) for each in _several(path, content, "vectors")]
    outputs = [_entry(path, "outputs", each) for each in _several(path, content, "outputs")]
    written = [each["file"] for each in outputs]
    if len(set(written)) < len(written):
        raise TalosValueError(f"{path}: outputs must be different files, got {written}")
    for each in outputs:
        if each.get("dtype", "float32") not in _DTYPES:
            raise TalosValueError(
                f"{path}: dtype must be {', '.join(_DTYPES)}, got {each['dtype']!r}"
            )
    coefs: list[Coefficient] = [each.get("scaling_coef", 1.0) for each in vectors]
    settings = content.get("settings", {})
    base = content.get("base")
    if not isinstance(settings, dict) or "scaling_coefs" in settings:
        raise TalosValueError(
            f"{path}: settings must be a table without scaling_coefs, got {settings!r}; a "
            "coefficient stands beside its vector, as scaling_coef"
        )
    if base is not None and not isinstance(base, str):
        raise TalosValueError(f"{path}: base must be a text, got {base!r}")
    try:
        merge = merge_of(content.get("method", "task_arithmetic"), settings)
        merge = merge_of(merge, {"scaling_coefs": coefs})
    except (TalosValueError, TypeError) as error:
        raise TalosValueError(f"{path}: {error}") from None
    return Recipe(
        tuple(path.parent / each["file"] for each in vectors),
        merge,
        tuple(Output(path.parent / each["file"], each.get("dtype")) for each in outputs),
        base,
    )


def check_recipe_base(base: str, folder: Path, wanted: Mapping[str, str]) -> None:
    """Refuse vectors of another base than the recipe names.

    Args:
        base: a checkpoint in safetensors, a file or a folder, or a model as --model takes it.
        folder: of the recipe; a checkpoint is relative to it.
        wanted: the vectors' fingerprints of their base, by tensor.

    Raises:
        TalosValueError: a tensor is missing or has another fingerprint.
        TalosOSError: the base cannot be read.
    """
    from talos.task_vectors.exports import base_of

    with as_options({"--model": "base", "path": "base"}):
        tensors = _tensors(base, folder, wanted)
    remedy = "name the model that they were trained on"
    if missing := sorted(set(wanted) - set(tensors)):
        raise TalosValueError(
            f"base must have the tensors of the vectors, got {base} without "
            f"{', '.join(missing[:3])}; {remedy}"
        )
    differing = [name for name, each in wanted.items() if base_of(tensors[name], each) != each]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise TalosValueError(
            f"base must be the base of the vectors, got {base} with other weights in "
            f"{differing[0]}{more}; {remedy}, in the same dtype"
        )


def _tensors(base: str, folder: Path, wanted: Mapping[str, str]) -> "Mapping[str, Tensor]":
    """Return the base's tensors by the vectors' names: a checkpoint's or a model's."""
    from talos.app.cli.loading import load_encoder
    from talos.files.checkpoint import Checkpoint
    from talos.names import named_parameters

    path = folder / base
    if path.is_file() or path.is_dir():
        checkpoint = Checkpoint(path)
        if path.is_file() or any(name in checkpoint for name in wanted):
            return checkpoint
    return named_parameters(load_encoder(str(path) if path.is_dir() else base))


def _several(path: Path, content: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list of the recipe that holds something."""
    value = content.get(key)
    if not isinstance(value, list) or not value:
        raise TalosValueError(f"{path}: {key} must be a list of at least one file, got {value!r}")
    return value


def _entry(path: Path, key: str, entry: Any) -> dict[str, Any]:
    """Return an entry of a list: a file alone or a table."""
    if key == "vectors" and isinstance(entry, str) and (term := _TERM.fullmatch(entry)):
        raise TalosValueError(
            f"{path}: vectors must hold files without coefficients, got {entry!r}; write "
            f'{{file = "{term[1]}", scaling_coef = {term[2]}}}'
        )
    table = {"file": entry} if isinstance(entry, str) else entry
    if not isinstance(table, dict) or not isinstance(table.get("file"), str):
        raise TalosValueError(f"{path}: {key} must hold files or tables with file, got {entry!r}")
    _check_keys(path, key, table)
    return table


def _check_keys(path: Path, where: str, table: Mapping[str, Any]) -> None:
    unknown = sorted(set(table) - set(_KEYS[where]))
    if unknown:
        raise TalosValueError(
            f"{path}: keys of {where} must be among {', '.join(_KEYS[where])}, got "
            f"{', '.join(unknown)}{_hint(where, unknown)}"
        )


def _hint(where: str, unknown: Sequence[str]) -> str:
    """Return what the first key that is a setting, or nearly another key, should be."""
    from talos.merging import METHODS

    settings = {each.name for method in METHODS.values() for each in fields(method)}
    settings -= {"scaling_coefs"}
    for key in unknown:
        if where == "the recipe" and key in settings:
            return f"; put {key} under [settings]"
        if near := did_you_mean(key, _KEYS[where]):
            return near
    return ""
