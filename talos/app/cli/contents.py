"""What a file of talos holds: its entries, how it was made, and how two files overlap."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talos.app.cli.options import as_options
from talos.app.cli.records import table_record
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from talos.masks import Mask
    from talos.masks.table import MaskTable
    from talos.task_vectors import TaskVector

__all__ = ["Content", "Parent", "made", "overlap", "parents", "read_content"]

# Keys whose own words say too little.
_WORDS = {
    "draws": "labels drawn per sample",
    "labels": "way to draw labels",
    "params": "parameters scored",
    "parity": "calibration follows",
    "passed_over": "frozen tensors passed over",
    "select": "scores selected",
    "soft": "dropped weights times",
    "target": "function differentiated",
    "torch": "version of torch",
}


@dataclass(frozen=True)
class Content:
    """A file that was read and checked.

    Attributes:
        file: its path.
        kind: mask, task vector or patch.
        nbytes: bytes of the file.
        table: the entries by layer and type.
        metadata: how it was made.
        mask: which entries; None for a patch.
        vector: the vector, if it is one.
    """

    file: Path
    kind: str
    nbytes: int
    table: "MaskTable"
    metadata: Mapping[str, Any]
    mask: "Mask | None" = None
    vector: "TaskVector | None" = None

    @property
    def dtype(self) -> str | None:
        """The dtype of a vector's values."""
        return None if self.vector is None else str(self.vector.values.dtype)[6:]

    @property
    def norm(self) -> float | None:
        """The norm of a vector's values."""
        return None if self.vector is None else float(self.vector.values.float().norm())

    def record(self) -> dict[str, Any]:
        """Return what `--json` writes of the file."""
        about = {"file": str(self.file), "kind": self.kind, "bytes": self.nbytes}
        about |= {"dtype": self.dtype, "norm": self.norm}
        return {**about, **table_record(self.table), "metadata": dict(self.metadata)}


@dataclass(frozen=True)
class Parent:
    """A vector that a sum or merge was made of.

    Attributes:
        depth: 0 for a parent, 1 for a parent's parent, and so on.
        scale: its scaling coefficient, or one for each pattern of names.
        made: its metadata.
        kept: the entries that took part, if the merge counted them.
    """

    depth: int
    scale: Any
    made: Mapping[str, Any]
    kept: int | None


def read_content(file: Path) -> Content:
    """Read a mask, a task vector or a patch, and verify its checksums."""
    from talos.files import claimed_kind
    from talos.masks import Mask
    from talos.task_vectors import Patch, TaskVector

    kind, size = claimed_kind(file), file.stat().st_size
    if kind == "task_vector":
        vector = TaskVector.load(file)
        mask = vector.mask
        return Content(file, "task vector", size, mask.describe(), vector.metadata, mask, vector)
    if kind == "patch":
        return Content(file, "patch", size, Patch.load(file).describe(), {})
    mask = Mask.load(file)
    return Content(file, "mask", size, mask.describe(), mask.metadata, mask)


def parents(metadata: Mapping[str, Any], depth: int = 0) -> Iterator[Parent]:
    """Yield the parents of a sum or merge, each before its own parents."""
    key = _key_of_parents(metadata)
    if key == "of":  # trimmed or restricted afterwards
        yield from parents(metadata["of"], depth)
        return
    for part in metadata[key] if key else ():
        of = part["of"] if isinstance(part["of"], Mapping) else {"made": part["of"]}
        yield Parent(depth, part["scale"], of, part.get("kept"))
        yield from parents(of, depth + 1)


def made(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as words and texts, without the parents, which are a table.

    Example:
        >>> made({"left_out": {"names": [], "share": 0.0}, "samples_of_rounds": [24, 24]})
        {'left out: names': 'none', 'left out: share': '0', 'samples of rounds': '24, 24'}
    """
    apart = _key_of_parents(metadata)
    return dict(_texts({key: each for key, each in metadata.items() if key != apart}))


def overlap(first: Content, second: Content) -> dict[str, Any]:
    """Return how two files overlap, as `--json` writes it.

    Raises:
        TalosValueError: one is a patch, or a tensor has another shape in the other.
    """
    for each in (first, second):
        if each.mask is None:
            raise TalosValueError(
                f"FILE must be a mask or task vector beside another one, got the {each.kind} "
                f"{each.file}"
            )
    assert first.mask is not None
    assert second.mask is not None
    from talos.evaluation import mask_similarity

    masks = {"first": first.mask, "second": second.mask}
    with as_options({"masks must": "both FILE must"}):
        similarity = mask_similarity(masks)
        both, either = first.mask & second.mask, first.mask | second.mask
    tables = {name: each.describe() for name, each in {**masks, "both": both}.items()}
    types = []
    for row in [*either.describe().by_kind(), either.describe().total()]:
        counts = {
            name: sum(each.nnz for each in table.rows if row.kind in (each.kind, "total"))
            for name, table in tables.items()
        }
        iou = counts["both"] / row.nnz if row.nnz else None
        types.append({"type": row.kind, "entries": row.numel, **counts, "iou": iou})
    return {
        "entries": both.nnz,
        "iou": float(similarity.iou[0, 1]),
        "iou_by_chance": float(similarity.by_chance[0, 1]),
        "cosine": _cosine(first, second, both),
        "types": types,
        "metadata": {
            key: [one, other]
            for key in sorted({*first.metadata, *second.metadata})
            if (one := first.metadata.get(key)) != (other := second.metadata.get(key))
        },
    }


def _cosine(first: Content, second: Content, both: "Mask") -> float | None:
    """Return the cosine of two vectors on the entries that both select; None without any."""
    if first.vector is None or second.vector is None:
        return None
    one, other = (each.restrict(both).values.double() for each in (first.vector, second.vector))
    norms = float(one.norm() * other.norm())
    return float(one @ other) / norms if norms else None


def _key_of_parents(metadata: Mapping[str, Any]) -> str | None:
    from talos.task_vectors.sums import is_merge, is_sum

    if is_sum(metadata):
        return "sum"
    if is_merge(metadata):
        return "sources"
    inner = metadata.get("of")
    return "of" if isinstance(inner, Mapping) and _key_of_parents(inner) else None


def _texts(value: Any, words: str = "") -> Iterator[tuple[str, str]]:
    """Yield each value in words: of a mapping inside a mapping the keys are joined."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            own = _WORDS.get(key, str(key).replace("_", " "))
            yield from _texts(part, f"{words}: {own}" if words else own)
    elif words:
        yield words, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)
