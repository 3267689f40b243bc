"""Differences of checkpoints, of what changed only, and vectors under other names."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from talos import Mask, TaskVector
from talos.errors import TalosTypeError, TalosValueError
from talos.names import match_prefixes
from talos.task_vectors.fingerprints import fingerprint
from tests.cases import assert_bit_equal


def with_weight(values: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.w = nn.Parameter(values.clone())
    return model


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def test_modules_dicts_and_files_give_one_vector(tmp_path: Path) -> None:
    base, tuned = nn.Linear(5, 4), nn.Linear(5, 4)
    paths = [
        saved(tmp_path / name, **model.state_dict())
        for name, model in (("base.safetensors", base), ("tuned.safetensors", tuned))
    ]
    mask = Mask.from_dense({"weight": torch.rand(4, 5) > 0.5})
    for choice in (None, "changed", mask):
        wanted = TaskVector.from_models(base, tuned, choice, strict=False)
        for one in (base.state_dict(), str(paths[0])):
            for other in (tuned, paths[1]):
                found = TaskVector.from_models(one, other, choice, strict=False)
                assert found.fingerprints == wanted.fingerprints
                for name in wanted.mask.names:
                    assert_bit_equal(found.to_dense(name), wanted.to_dense(name))
    with pytest.raises(TalosValueError, match=r"only where mask selects, got .*bias \(4\)"):
        TaskVector.from_models(paths[0], paths[1], mask)
    more = saved(tmp_path / "more.safetensors", **tuned.state_dict(), extra=torch.ones(1))
    with pytest.raises(
        TalosValueError, match="base must have the weights of tuned, lacks 1: extra"
    ):
        TaskVector.from_models(paths[0], more)


def test_the_caller_sees_each_tensor() -> None:
    model, seen = nn.Linear(2, 2), []
    TaskVector.from_models(model, model, on_tensor=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_files_of_a_tied_weight_hold_one_name(tmp_path: Path) -> None:
    base = nn.Module()
    base.embedding, base.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    base.head.weight = base.embedding.weight
    tuned = base.embedding.weight.detach() + 1
    for name in ("embedding.weight", "head.weight"):
        path = saved(tmp_path / name, **{name: tuned})
        vector = TaskVector.from_models(base, path, "changed")
        assert vector.mask.names == ("embedding.weight",)
        assert_bit_equal(vector.to_dense("embedding.weight") > 0, torch.ones(5, 3) > 0)


def test_integers_and_shards_that_differ(tmp_path: Path) -> None:
    base = saved(tmp_path / "a", w=torch.ones(2), ids=torch.tensor([1, 2]))
    tuned = saved(tmp_path / "b", w=torch.zeros(2), ids=torch.tensor([1, 3]))
    with pytest.warns(UserWarning, match="not in the task vector: ids"):
        vector = TaskVector.from_models(base, tuned)
    assert vector.metadata == {"moved_buffers": ["ids"]}
    assert vector.mask.names == ("w",)


# mask="changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_changed_selects_the_entries_whose_bits_differ(dtype: torch.dtype) -> None:
    base = {"w": torch.randn(40, 5).to(dtype), "same": torch.randn(7).to(dtype)}
    base["w"][0, :3] = torch.tensor([0.0, math.nan, math.inf]).to(dtype)
    tuned = {name: each.clone() for name, each in base.items()}
    rows = torch.arange(1, 40, 3)
    tuned["w"][rows, 2] += 0.5
    vector = TaskVector.from_models(base, tuned, "changed")
    assert set(vector.mask.to_dense("w").nonzero()[:, 0].tolist()) <= set(rows.tolist())
    assert vector.mask.nnz == len(rows)
    assert vector.mask.indices["same"].nnz == 0
    assert vector.fingerprints == {"w": fingerprint(base["w"])}
    none = TaskVector.from_models(base, base, "changed")
    assert none.mask.nnz == 0
    assert none.mask.names == ("w", "same")


def test_signs_of_zero_and_nan() -> None:
    base = {"w": torch.tensor([0.0, -0.0, 1.0])}
    tuned = {"w": torch.tensor([-0.0, 0.0, 1.0])}
    vector = TaskVector.from_models(base, tuned, "changed")
    assert vector.mask.to_dense("w").tolist() == [True, True, False]
    assert vector.metadata == {"inexact": 1}  # -0 becomes 0, but 0 does not become -0
    model = with_weight(base["w"])
    vector.apply_(model)
    assert torch.signbit(model.w).tolist() == [False, False, False]
    with pytest.raises(TalosValueError, match="finite, got nan at entry 2 of w"):
        TaskVector.from_models(base, {"w": torch.tensor([0.0, -0.0, math.nan])}, "changed")


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2.0**16), (torch.float16, 2.0**13)])
def test_16_bits_come_back_exactly_unless_they_shrank_much(dtype: torch.dtype, most: float) -> None:
    """By more than 24 bits of float32 less those of the dtype, 8 or 11."""
    bits = torch.randint(-(2**15), 2**15, (2, 200_000)).to(torch.int16)
    base, tuned = (each[each.isfinite()][:150_000] for each in bits.view(dtype))
    if dtype == torch.float16:  # its differences leave its range
        base, tuned = base / 4, tuned / 4
    near = (base.double().abs() < most * tuned.double().abs()) | (tuned == 0) | (base == 0)
    near &= ~((base == 0) & (tuned == 0)) & (base.double() - tuned.double()).abs().lt(1e38)
    base, tuned = base[near], tuned[near]
    vector = TaskVector.from_models({"w": base}, {"w": tuned}, "changed")
    model = with_weight(base)
    vector.apply_(model)
    wrong = model.w.detach().view(torch.int16) != tuned.view(torch.int16)
    minus_zero = (tuned == 0) & torch.signbit(tuned)
    assert not (wrong & ~minus_zero).any()
    assert vector.metadata.get("inexact", 0) == int(wrong.count_nonzero())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inexact_entries_are_those_that_apply_misses(dtype: torch.dtype) -> None:
    base = torch.randn(3000).to(dtype)
    tuned = (base.double() * torch.logspace(-9, 1, 3000, dtype=torch.float64)).to(dtype)
    vector = TaskVector.from_models({"w": base}, {"w": tuned}, "changed")
    model = with_weight(base)
    vector.apply_(model)
    found = model.w.detach()
    missed = int(((found != tuned) | (found.signbit() != tuned.signbit())).count_nonzero())
    assert vector.metadata.get("inexact", 0) == missed
    assert missed > 0


def test_other_dtypes_differ_by_their_values(tmp_path: Path) -> None:
    base = torch.tensor([1.0, 1.0 + 2**-12, 3.0])
    tuned = torch.tensor([1.0, 1.0, 4.0]).bfloat16()
    vector = TaskVector.from_models(
        saved(tmp_path / "base", w=base), saved(tmp_path / "tuned", w=tuned), "changed"
    )
    assert vector.to_dense("w").tolist() == [0.0, -(2**-12), 1.0]
    assert vector.mask.nnz == 2
    assert vector.fingerprints == {"w": fingerprint(base)}
    with pytest.raises(
        TalosValueError, match="mask must be a Mask, 'changed' or None, got 'change'"
    ):
        TaskVector.from_models({"w": base}, {"w": base}, "change")


# Other names


def vector_of(*names: str) -> TaskVector:
    mask = Mask.from_dense({name: torch.eye(2) > 0 for name in names})
    bases = {name: f"{i:016x}" for i, name in enumerate(names)}
    metadata = {"task": "a", "moved_buffers": ["h.0.mean", "other.mean"]}
    return TaskVector(mask, torch.arange(2.0 * len(names)), bases, metadata)


def test_rename_moves_mask_fingerprints_and_metadata() -> None:
    vector = vector_of("h.0.q", "h.1.q", "head")
    found = vector.rename({r"^h\.(\d+)": r"model.layers.\1", "head": "lm_head"})
    assert found.mask.names == ("model.layers.0.q", "model.layers.1.q", "lm_head")
    assert list(found.fingerprints) == list(found.mask.names)
    assert list(found.fingerprints.values()) == list(vector.fingerprints.values())
    assert found.metadata["moved_buffers"] == ["model.layers.0.mean", "other.mean"]
    assert torch.equal(found.values, vector.values)
    assert vector.mask.names[0] == "h.0.q"
    back = found.rename({r"model\.layers": "h", "lm_head": "head"})
    assert back == vector


def test_a_name_of_the_vector_is_no_expression() -> None:
    found = vector_of("a.q", "b.a.q").rename({"a.q": "c"})
    assert found.mask.names == ("c", "b.a.q")
    first = vector_of("a.q", "b.q").rename({"^a": "x", "q$": "y"})  # the first that fits
    assert first.mask.names == ("x.q", "b.y")
    assert vector_of("a", "b").rename({"a": "b", "b": "a"}).mask.names == ("b", "a")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"q": "", "h": "k"}, r"got 1 that fit none or only renamed ones: h"),
        ({"hh": "k"}, "that fit none"),
        ({"[0-9]": "0"}, r"a name of its own, got 'h\.0\.q' for h\.0\.q and h\.1\.q"),
        ({"h.0.q": ""}, "a name of its own, got ''"),
        ({"h(": "k"}, r"names or regular expressions, got 'h\('"),
        ({"h": r"\2"}, "names or regular expressions, got 'h'"),
    ],
)
def test_names_that_cannot_be_are_refused(names: dict[str, str], match: str) -> None:
    with pytest.raises(TalosValueError, match=match):
        vector_of("h.0.q", "h.1.q").rename(names)


@pytest.mark.parametrize("names", [[("a", "b")], {"h.0.q": 3}, {1: "a"}])
def test_names_must_be_texts(names: object) -> None:
    with pytest.raises(TalosTypeError, match="names must map texts to texts"):
        vector_of("h.0.q").rename(names)


def test_prefixes() -> None:
    def pairs(names: list[str], known: list[str]) -> list[tuple[str, str]]:
        return match_prefixes(dict.fromkeys(names, (2,)), dict.fromkeys(known, (2,)))

    assert pairs(["a.w"], ["x.a.w", "y.b"]) == [("", "x.")]
    assert pairs(["x.y.a.w", "x.y.b"], ["a.w", "b"]) == [("x.y.", "")]
    assert pairs(["x.a.w", "x.b"], ["y.a.w", "y.b"]) == [("x.", "y.")]
    assert pairs(["a.w"], ["x.a.w", "y.a.w"]) == [("", "x."), ("", "y.")]
    assert pairs(["x.0.w"], ["x.1.w"]) == []
    assert pairs(["x.w", "w"], ["y.x.w"]) == []
    assert pairs(["w"], ["xw"]) == []  # whole steps of a name only
    assert match_prefixes({"a.w": (2,)}, {"x.a.w": (3,)}) == []
