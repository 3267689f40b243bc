"""Every merge against its formula in dense float32 arithmetic, and what all merges share."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import talos
from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.merging import METHODS, Breadcrumbs, Dare, Merge, TallMasks, Ties, merge_of, tall_masks
from talos.merging.dare import _Draw
from talos.task_vectors import TaskVector
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.sums import Overlay, Part
from talos_kernels import TensorIndex
from tests.cases import DTYPES, assert_bit_equal, assert_close, dense_mask

SHAPES = {"h.0.w": (1,), "h.0.b": (97,), "h.1.w": (23, 90), "h.2.w": (300, 250)}
Dense = dict[str, Tensor]


def vector_of(
    densities: Sequence[float],
    seed: int,
    names: Sequence[str] = tuple(SHAPES),
    dtype: torch.dtype = torch.float32,
) -> TaskVector:
    """Values on a coarse grid without 0, so that equal magnitudes and sums of zero occur."""
    generator = torch.Generator().manual_seed(seed)
    picked = {
        name: dense_mask(math.prod(SHAPES[name]), density, generator).view(SHAPES[name])
        for name, density in zip(names, densities, strict=True)
    }
    mask = Mask.from_dense(picked)
    values = (torch.randn(mask.nnz, generator=generator) * 8).round() / 8
    values[values == 0] = 0.125
    bases = {name: f"{i:016x}" for i, name in enumerate(SHAPES) if name in names}
    return TaskVector(mask, values.to(dtype), bases, {"task": str(seed)})


def vectors() -> list[TaskVector]:
    """Three masks, dtypes and densities, other tensors in another order; one is dense."""
    return [
        vector_of((1.0, 0.6, 0.1, 0.01), 1),
        vector_of((0.05, 0.6, 0.1), 2, ("h.2.w", "h.1.w", "h.0.b"), torch.bfloat16),
        vector_of((0.0, 1.0, 1.0, 1.0), 3, dtype=torch.float16),
        vector_of((1.0, 0.0), 4, ("h.0.w", "h.2.w")),
    ]


def dense_of(vector: TaskVector, names: Sequence[str] = tuple(SHAPES)) -> Dense:
    """float32 from the dense masks, sharing no code with merging."""
    dense = {name: torch.zeros(SHAPES[name]) for name in names}
    first = 0
    for name in vector.mask.names:
        chosen = vector.mask.to_dense(name)
        count = int(chosen.sum())
        dense[name][chosen] = vector.values[first : first + count].float()
        first += count
    return dense


def own_numel(vector: TaskVector) -> int:
    return sum(math.prod(shape) for shape in vector.mask.shapes.values())


def top(dense: Dense, names: Sequence[str], count: int) -> dict[str, Tensor]:
    """The `count` largest magnitudes of some tensors together; first positions first."""
    flat = torch.cat([dense[name].abs().flatten() for name in names])
    order = flat.argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([dense[name].numel() for name in names])
    found = {name: part.view(SHAPES[name]) for name, part in zip(names, parts, strict=True)}
    return {name: found.get(name, torch.zeros(shape) > 0) for name, shape in SHAPES.items()}


def trimmed(vector: TaskVector, density: float) -> Dense:
    dense = dense_of(vector)
    kept = top(dense, vector.mask.names, round(density * own_numel(vector)))
    return {name: dense[name] * kept[name] for name in SHAPES}


def summed(terms: Sequence[Dense]) -> Dense:
    return {name: sum((each[name] for each in terms), torch.zeros(s)) for name, s in SHAPES.items()}


def ties(terms: Sequence[Dense]) -> Dense:
    found = {}
    for name in SHAPES:
        stacked = torch.stack([each[name] for each in terms])
        sign = sum(stacked, torch.zeros(SHAPES[name])).sign()
        votes = stacked.sign().sum(0).sign()
        sign = torch.where(sign == 0, votes, sign)
        agree = (stacked.sign() == sign) & (stacked != 0)
        total = sum(torch.where(agree, stacked, 0.0), torch.zeros(SHAPES[name]))
        found[name] = torch.where(agree.any(0), total / agree.sum(0), 0.0)
    return found


def scaled(terms: Sequence[Dense], coefs: Sequence[float]) -> list[Dense]:
    return [{name: t * c for name, t in each.items()} for each, c in zip(terms, coefs, strict=True)]


def between(vector: TaskVector, largest: float, smallest: float) -> Dense:
    dense = dense_of(vector)
    found = {}
    for name, values in dense.items():
        n = values.numel()
        order = values.flatten().abs().argsort(descending=True, stable=True)
        middle = order[round(largest * n) : n - round(smallest * n)]
        found[name] = torch.zeros(n).index_copy(0, middle, values.flatten()[middle]).view_as(values)
    return found


def consensus(terms: Sequence[Dense], strictness: Sequence[float], least: int) -> Dense:
    total = summed(terms)
    needed = [
        {n: t[n].abs() > s * (total[n] - t[n]).abs() for n in SHAPES}
        for t, s in zip(terms, strictness, strict=True)
    ]
    return {n: total[n] * (sum(m[n].int() for m in needed) >= least) for n in SHAPES}


COEFS = [0.5, -1.25, 1.0, 2.0]
FORMULAS: dict[str, tuple[str, dict[str, object], Callable[[list[TaskVector]], Dense]]] = {
    "sum": ("task_arithmetic", {}, lambda v: summed([dense_of(each) for each in v])),
    "coefs": (
        "task_arithmetic",
        {"scaling_coef": 0.3, "scaling_coefs": COEFS},
        lambda v: summed(scaled([dense_of(e) for e in v], [0.3 * c for c in COEFS])),
    ),
    "mean": (
        "mean",
        {"scaling_coef": 0.3},
        lambda v: summed(scaled([dense_of(each) for each in v], [0.3 / 4] * 4)),
    ),
    "trim": ("trim", {"density": 0.04}, lambda v: summed([trimmed(each, 0.04) for each in v])),
    "ties": ("ties", {"density": 0.2}, lambda v: ties([trimmed(each, 0.2) for each in v])),
    "ties-all": ("ties", {"density": 1.0}, lambda v: ties([dense_of(each) for each in v])),
    "ties-coefs": (
        "ties",
        {"density": 0.03, "scaling_coefs": COEFS, "scaling_coef": 0.7},
        lambda v: ties(scaled([trimmed(e, 0.03) for e in v], [0.7 * c for c in COEFS])),
    ),
    "breadcrumbs": (
        "breadcrumbs",
        {"drop_largest": 0.02, "drop_smallest": 0.5},
        lambda v: summed([between(each, 0.02, 0.5) for each in v]),
    ),
    "breadcrumbs-all": (
        "breadcrumbs",
        {"drop_largest": 0.0, "drop_smallest": 0.0},
        lambda v: summed([dense_of(each) for each in v]),
    ),
    "consensus": (
        "tall_masks",
        {},
        lambda v: consensus([dense_of(each) for each in v], [0.4] * 4, 2),
    ),
    "needed-by-one": (
        "tall_masks",
        {"strictness": (0.2, 1.0, 3.0, 0.0), "least_tasks": 1, "scaling_coefs": COEFS},
        lambda v: consensus(scaled([dense_of(e) for e in v], COEFS), (0.2, 1.0, 3.0, 0.0), 1),
    ),
}


def assert_is(merged: TaskVector, wanted: Mapping[str, Tensor]) -> None:
    """To the last bit, and nothing selected that no vector selects."""
    assert merged.values.dtype == torch.float32
    for name, dense in dense_of(merged).items():
        assert_bit_equal(dense, wanted[name] + 0.0)  # -0 is 0 where it is not selected


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize("cut", [slice(0, 4), slice(2, 3)], ids=["different", "with-itself"])
def test_every_merge_is_its_formula(case: str, cut: slice) -> None:
    method, settings, formula = FORMULAS[case]
    several = vectors()[cut] * (4 if cut.start else 1)
    before = [each.values.clone() for each in several]
    merged = talos.merge(several, method, **settings)
    assert_is(merged, formula(several))
    assert merged.fingerprints == {n: b for v in several for n, b in v.fingerprints.items()}
    union = several[0].mask | several[1].mask | several[2].mask | several[3].mask
    assert merged.mask & union == merged.mask
    assert all(map(torch.equal, before, (each.values for each in several)))


@pytest.mark.parametrize("method", METHODS)
def test_one_vector_and_vectors_without_entries(method: str) -> None:
    one = vector_of((1.0, 0.6, 0.1, 0.01), 1)
    settings = {
        "dare": {"density": 1.0},
        "breadcrumbs": {"drop_largest": 0.0, "drop_smallest": 0.0},
        "tall_masks": {"least_tasks": 1, "strictness": 0.0},
        "trim": {"density": 1.0},
        "ties": {"density": 1.0},
    }.get(method, {})
    assert_is(talos.merge([one], method, **settings), dense_of(one))
    empty = vector_of((0.0, 0.0, 0.0, 0.0), 1)
    assert len(talos.merge([empty, empty], method)) == 0
    several = talos.merge([empty, one], method, **settings)
    assert_is(several, {n: t / (2 if method == "mean" else 1) for n, t in dense_of(one).items()})
    with pytest.raises(TalosValueError, match="vectors must hold at least one task vector"):
        talos.merge([], method)


def test_the_result_holds_only_entries_that_took_part() -> None:
    several = vectors()
    for method in ("trim", "ties"):
        merged = talos.merge(several, method, density=0.02)
        kept = [top(dense_of(e), e.mask.names, round(0.02 * own_numel(e))) for e in several]
        for name in SHAPES:
            took_part = torch.zeros(SHAPES[name]) > 0
            for each, vector in zip(kept, several, strict=True):
                if name in vector.mask:
                    took_part |= each[name] & vector.mask.to_dense(name)
            assert torch.equal(merged.mask.to_dense(name), took_part)
        own = [min(round(0.02 * own_numel(each)), len(each)) for each in several]
        assert [each["kept"] for each in merged.metadata["sources"]] == own
    needed = talos.merge(several, "tall_masks", least_tasks=3)
    assert 0 < len(needed) < len(talos.merge(several))


def test_ties_without_a_majority_is_zero() -> None:
    mask = Mask.from_dense({"w": torch.ones(3) > 0})
    values = ([2.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0])
    merged = talos.merge([TaskVector(mask, torch.tensor(v)) for v in values], "ties", density=1.0)
    assert merged.values.tolist() == [-1.0, 0.0, 0.0]  # by the sum, by votes, by neither


# Python's integers: no code shared with the draws of torch.
def lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def test_draws_are_a_hash_of_seed_vector_tensor_and_position() -> None:
    positions = torch.tensor([0, 1, 2, 5, 1000, 2**16, 2**31, 2**32, 2**32 + 1, 2**33 - 1])
    part = Part(TensorIndex.from_positions(positions, 2**33), torch.ones(10))
    kept = 0
    for number in range(40):
        digest = hashlib.sha256(f"{number}|w".encode()).digest()
        first, second = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
        drawn = _Draw(0.5, str(number))("w", part)
        wanted = []
        for position in positions.tolist():
            low, high = position & 0xFFFFFFFF, position >> 32
            bits = lowbias32(lowbias32(low ^ first) ^ high ^ second)
            wanted.append((bits + 2**31) % 2**32 < 2**31)  # compared as a signed number
        assert drawn.positions().tolist() == [
            p for p, keep in zip(positions.tolist(), wanted, strict=True) if keep
        ]
        assert drawn.values.tolist() == [2.0] * len(drawn.values)
        kept += len(drawn.values)
    assert abs(kept - 200) < 5 * 10  # five standard deviations


@pytest.mark.parametrize("density", [0.1, 0.7])
def test_dare_keeps_the_share_and_follows_the_formula(density: float) -> None:
    several = vectors()
    alone = [talos.merge([each], "dare", density=density, seed=7) for each in several]
    for vector, drawn in zip(several, alone, strict=True):
        share = density * len(vector)
        assert abs(len(drawn) - share) <= 5 * math.sqrt(share * (1 - density))
        own = dense_of(vector)
        for name, dense in dense_of(drawn).items():
            chosen = dense != 0
            assert_bit_equal(dense[chosen], (own[name] / density)[chosen])
    merged = talos.merge(several, "dare", density=density, seed=7, scaling_coefs=COEFS)
    terms = [dense_of(each) for each in alone]
    assert_is(merged, summed(scaled(terms, COEFS)))
    after = talos.merge(several, "dare", density=density, seed=7, follow=Ties(density=0.02))
    assert_is(after, ties([trimmed(each, 0.02) for each in alone]))
    assert_is(
        talos.merge(several, "dare", density=density, seed=7, follow="mean"),
        summed(scaled(terms, [0.25] * 4)),
    )


def test_draws_of_vectors_tensors_and_seeds_are_independent() -> None:
    mask = Mask.from_dense({name: torch.ones(20_000) > 0 for name in ("a", "b")})
    one, other = (TaskVector(mask, torch.full((40_000,), v)) for v in (1.0, 2.0))

    def kept(vector: TaskVector, seed: int, name: str) -> Tensor:
        return talos.merge([vector], "dare", density=0.3, seed=seed).mask.to_dense(name)

    first = kept(one, 0, "a")
    for second in (kept(one, 0, "b"), kept(one, 1, "a"), kept(other, 0, "a"), first.roll(1)):
        both = float((first & second).float().mean())
        assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / 20_000)


def test_one_seed_gives_one_hash_whatever_the_order_and_the_threads() -> None:
    several = vectors()
    merged = talos.merge(several, "dare", density=0.5, follow="ties", seed=3)
    digest = (merged.mask.fingerprint, fingerprint(merged.values))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            again = talos.merge(several, "dare", density=0.5, follow="ties", seed=3)
            assert (again.mask.fingerprint, fingerprint(again.values)) == digest
    finally:
        torch.set_num_threads(threads)
    assert talos.merge(several, "dare", density=0.5, seed=4) != talos.merge(
        several, "dare", density=0.5, seed=3
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_vectors_and_tensors_does_not_count(method: str) -> None:
    several = vectors()
    merged = talos.merge(several, method)
    backward = talos.merge(several[::-1], method)
    assert merged.mask == backward.mask
    for name, dense in dense_of(merged).items():
        torch.testing.assert_close(dense_of(backward)[name], dense, rtol=1e-6, atol=2e-6)
    pair = several[:2]
    turned = []
    for each in pair:
        names = each.mask.names[::-1]
        mask = Mask(
            {n: each.mask.shapes[n] for n in names}, {n: each.mask.indices[n] for n in names}
        )
        dense = dense_of(each)
        values = torch.cat([dense[n][each.mask.to_dense(n)] for n in names]).to(each.values.dtype)
        turned.append(TaskVector(mask, values, each.fingerprints))
    whole = {"density": 1.0} if method in ("trim", "ties") else {}  # ties of magnitude aside
    assert talos.merge(turned, method, **whole) == talos.merge(pair, method, **whole)


def test_a_vector_given_twice_is_drawn_twice() -> None:
    one = vector_of((1.0, 1.0, 1.0, 1.0), 1)
    twice = talos.merge([one, one], "dare", density=0.5)
    assert len(twice) > len(talos.merge([one], "dare", density=0.5)) * 1.3


def test_a_coefficient_by_layer() -> None:
    several = vectors()[:2]
    coefs = [{"h.0": 2.0, "h.0.b": 3.0, "": 0.5}, {"h.2.w": -1.0, "": 1.0}]
    factors = [
        {"h.0.w": 2.0, "h.0.b": 3.0, "h.1.w": 0.5, "h.2.w": 0.5},
        {"h.0.w": 1.0, "h.0.b": 1.0, "h.1.w": 1.0, "h.2.w": -1.0},
    ]
    merged = talos.merge(several, scaling_coefs=coefs, scaling_coef=0.25)
    terms = [
        {name: t * (0.25 * factor[name]) for name, t in dense_of(each).items()}
        for each, factor in zip(several, factors, strict=True)
    ]
    assert_is(merged, summed(terms))
    assert merged.metadata["sources"][0]["scale"] == coefs[0]


def test_tall_masks_rebuild_each_tasks_vector() -> None:
    several = vectors()
    total = TaskVector.combine([(1.0, each) for each in several])
    masks = tall_masks(several, total, strictness=[0.4, 0.4, 1.0, 0.4])
    whole = dense_of(total)
    for vector, mask, strictness in zip(several, masks, (0.4, 0.4, 1.0, 0.4), strict=True):
        own = dense_of(vector)
        rebuilt = total.restrict(mask)
        assert rebuilt.mask == mask
        for name in vector.mask.names:
            wanted = own[name].abs() > strictness * (whole[name] - own[name]).abs()
            assert torch.equal(mask.to_dense(name), wanted)
            assert_bit_equal(dense_of(rebuilt)[name], torch.where(wanted, whole[name], 0.0))
    apart = [vector_of((0.0, 0.0, 1.0, 0.0), 1), vector_of((1.0, 1.0, 0.0, 1.0), 2)]
    alone = tall_masks(apart, apart[0] + apart[1])
    for vector, mask in zip(apart, alone, strict=True):  # nothing shared: nothing lost
        assert_is((apart[0] + apart[1]).restrict(mask), dense_of(vector))


def test_metadata_name_the_method_and_the_parents() -> None:
    several = vectors()[:2]
    added = talos.merge(several, scaling_coef=0.5)
    assert added.metadata["merge"] == {"method": "task_arithmetic", "scaling_coef": 0.5}
    assert added == 0.5 * several[0] + 0.5 * several[1]
    assert added.metadata["sum"] == (0.5 * several[0] + 0.5 * several[1]).metadata["sum"]
    merged = talos.merge(several, "dare", density=0.5, follow="ties", scaling_coefs=(1, 0.5))
    assert merged.metadata["merge"] == {
        "method": "dare",
        "scaling_coef": 1.0,
        "density": 0.5,
        "seed": 0,
        "follow": {"method": "ties", "scaling_coef": 1.0, "density": 0.2},
    }
    assert [(p["scale"], p["of"]["task"]) for p in merged.metadata["sources"]] == [
        (1.0, "1"),
        (0.5, "2"),
    ]
    (part,) = (2 * merged).metadata["sum"]  # a merge is one source of a later sum
    assert part["of"]["merge"]["method"] == "dare"


def test_tensors_are_counted_as_they_are_done() -> None:
    seen: list[tuple[int, int]] = []
    talos.merge(vectors(), on_tensor=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@dataclass(frozen=True, kw_only=True)
class Largest(Merge):
    """What a user may add: the largest value of each entry."""

    name = "largest"

    def _merge_entries(self, overlay: Overlay) -> tuple[Tensor, Tensor | None]:
        return overlay.rows().amax(0), None


def test_a_method_of_ones_own() -> None:
    several = vectors()
    merged = talos.merge(several, Largest(), scaling_coef=2.0)
    for name, dense in dense_of(merged).items():
        stacked = torch.stack([dense_of(each)[name] for each in several])
        assert torch.equal(dense, 2 * stacked.amax(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tie"}, "method must be one of task_arithmetic, mean, trim, ties"),
        ({"method": "mean", "density": 0.1}, "settings of mean must be among .* density is for tr"),
        ({"method": "ties", "densty": 0.1}, "got densty; check its spelling"),
        ({"method": "ties", "density": 0}, r"density must lie in \(0, 1\], got 0"),
        ({"method": "ties", "density": 1e-9}, "density must keep at least one of"),
        ({"method": "dare", "seed": 0.5}, "seed must be an integer"),
        ({"method": "dare", "follow": "none"}, "follow must be task_arithmetic, mean, ties or"),
        ({"method": "dare", "follow": Dare()}, "follow must be"),
        ({"method": "dare", "follow": Ties(scaling_coef=2)}, "must leave the coefficients to dare"),
        ({"method": "breadcrumbs", "drop_largest": 1}, r"drop_largest must lie in \[0, 1\), got 1"),
        (
            {"method": "breadcrumbs", "drop_largest": 0.5, "drop_smallest": 0.5},
            "drop_smallest must leave something",
        ),
        ({"method": "tall_masks", "strictness": -1}, "strictness must be finite and not negative"),
        ({"method": "tall_masks", "strictness": (1, 1)}, "strictness must hold 4 entries"),
        ({"method": "tall_masks", "least_tasks": 0}, "least_tasks must be an integer of"),
        ({"scaling_coef": math.inf}, "scaling_coef must be a finite number, got inf"),
        ({"scaling_coefs": [1.0]}, "scaling_coefs must hold 4 entries, one a vector, got 1"),
        ({"scaling_coefs": {"h": 1.0}}, "scaling_coefs must be a list with an entry a vector"),
        ({"scaling_coefs": [{"h.0": 1.0}, 1, 1, 1]}, r"a coefficient of h\.1\.w, got none"),
        ({"scaling_coefs": [{"": 1, "k": 2}, 1, 1, 1]}, "must name modules or tensors of .* got k"),
        ({"scaling_coefs": [1, "2", 1, 1]}, r"scaling_coefs\[1\] must be a finite number"),
        ({"scaling_coef": 3e38, "scaling_coefs": [9e9] * 4}, "values must be finite"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        talos.merge(vectors(), **settings)


def test_bad_vectors_are_refused() -> None:
    several = vectors()
    other = replace(several[1], fingerprints={"h.1.w": "f" * 16})
    with pytest.raises(TalosValueError, match=r"and f{16} of h\.1\.w; make them from the same"):
        talos.merge([several[0], other], "ties")
    with pytest.raises(TalosValueError, match="one base"):
        tall_masks([several[0], other], several[0])
    shape = TaskVector(Mask.from_dense({"h.0.b": torch.ones(96) > 0}), torch.ones(96))
    with pytest.raises(TalosValueError, match=r"shape of h\.0\.b"):
        talos.merge([several[0], shape], "mean")
    with pytest.raises(TalosTypeError, match="vectors must be a list of task vectors, got dict"):
        talos.merge({"a": several[0]})
    with pytest.raises(TalosTypeError, match="vectors must hold task vectors, got str"):
        talos.merge([several[0], "b"])
    with pytest.raises(TalosTypeError, match="method must be a name or a Merge, got int"):
        talos.merge(several, 3)
    with pytest.raises(TalosTypeError, match="total must be a task vector"):
        tall_masks(several, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trim_keeps_the_largest_entries_of_the_dense_form(dtype: torch.dtype) -> None:
    vector = vector_of((1.0, 0.6, 0.1, 0.05), 1, dtype=dtype)
    dense = dense_of(vector)
    for density in (0.001, 0.02, 0.05):
        kept = vector.trim(density)
        chosen = top(dense, vector.mask.names, round(density * own_numel(vector)))
        assert kept.values.dtype == dtype
        assert kept.fingerprints == vector.fingerprints
        for name in SHAPES:
            assert torch.equal(kept.mask.to_dense(name), chosen[name])
            assert_bit_equal(dense_of(kept)[name], torch.where(chosen[name], dense[name], 0.0))
        assert kept.metadata["trimmed"] == density
    assert vector.trim(0.5) is vector
    assert vector.trim(torch.tensor(0.02)).metadata["trimmed"] == pytest.approx(0.02)  # JSON-able
    assert type(vector.trim(torch.tensor(0.02)).metadata["trimmed"]) is float
    with pytest.raises(TalosValueError, match="density must lie"):
        vector.trim(0.0)
    with pytest.raises(TalosValueError, match="density must keep at least one of"):
        vector.trim(1e-9)
    total = (vector + vector).trim(0.01)
    assert "sum" not in total.metadata  # it is no longer that sum
    assert total.metadata["of"]["sum"]


def test_restrict_leaves_what_both_select() -> None:
    vector = vector_of((1.0, 0.6, 0.1, 0.05), 1)
    other = vector_of((1.0, 0.6, 0.1), 9, ("h.2.w", "h.1.w", "h.0.b")).mask
    kept = vector.restrict(other)
    assert set(kept.mask.names) == {"h.0.b", "h.1.w", "h.2.w"}
    for name in kept.mask.names:
        both = vector.mask.to_dense(name) & other.to_dense(name)
        assert torch.equal(kept.mask.to_dense(name), both)
        assert_close(dense_of(kept)[name], dense_of(vector)[name] * both)
    with pytest.raises(TalosValueError, match=r"shape of h\.0\.b"):
        vector.restrict(Mask.from_dense({"h.0.b": torch.ones(3) > 0}))


def test_settings_are_kept_in_a_merge_of_ones_own() -> None:
    merge = Breadcrumbs(drop_smallest=0.5)
    assert talos.merge(vectors(), merge) == talos.merge(vectors(), "breadcrumbs", drop_smallest=0.5)
    assert talos.merge(vectors(), TallMasks(), least_tasks=1) == talos.merge(
        vectors(), "tall_masks", least_tasks=1
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dare"])
def test_no_method_leaves_out_a_sum_that_overflows(method: str) -> None:
    mask = Mask.from_dense({"w": torch.ones(8) > 0})
    each = TaskVector(mask, torch.arange(1.0, 9.0))
    with pytest.raises(TalosValueError, match=r"values must be finite|must have finite sums"):
        talos.merge([each, each], method, scaling_coef=1e300)


def test_what_cannot_be_listed_is_refused_by_name() -> None:
    vector = vector_of((1.0, 0.6, 0.1, 0.05), 1)
    with pytest.raises(
        TalosTypeError, match="vectors must be a list of task vectors, got NoneType"
    ):
        talos.merge(None)
    with pytest.raises(
        TalosValueError, match="scaling_coefs must be a list with an entry a vector"
    ):
        talos.merge([vector], scaling_coefs=0.4)


def test_a_merge_says_whether_it_takes_means() -> None:
    found = {name for name in METHODS if merge_of(name, {}).averages}
    assert found == {"mean", "ties"}
    assert merge_of("dare", {"follow": "ties"}).averages
