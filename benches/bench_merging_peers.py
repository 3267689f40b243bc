"""Merges of other packages beside ours, on the same eight dense vectors: how many entries agree.

`equal` is the share of entries with the same value, `1 ulp` that of entries one rounding apart at
most. Each peer gets our settings, and for DARE our draws. The vectors are of one tensor, because
mergekit merges tensor by tensor: its TIES trims each of them by itself.

Where they differ, and why:

- TIES of mergekit 0.1.5, in 2 of 2,000,000 entries: of two equal magnitudes at the threshold it may
  keep the second, because its sort is not stable.
- TIES of FusionBench 0.2.33, in 7: it keeps one entry more of each vector. Both take + or the whole
  model's majority where a sum of kept entries is 0; here none is.
- DARE of mergekit, in all kept entries: it rescales to the vector's L1 norm, not by 1 / density.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import talos
from benches import measure
from benches.results import Record
from talos.merging import tall_masks

SIZE = (1000, 2000)
VECTORS = 8
DENSITY, LARGEST, STRICTNESS = 0.1, 0.01, 0.4
OURS: dict[str, tuple[str, dict[str, float]]] = {
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {"density": DENSITY}),
    "breadcrumbs": (
        "breadcrumbs",
        {"drop_largest": LARGEST, "drop_smallest": 1 - DENSITY - LARGEST},
    ),
    "dare_linear": ("dare", {"density": DENSITY}),
}
FORMS = (
    *(("mergekit", name) for name in OURS),
    *(("fusion-bench", name) for name in ("task_arithmetic", "ties", "dare_linear", "tall_masks")),
)


@lru_cache(maxsize=1)
def deltas() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, generator=generator) * 1e-3 for _ in range(VECTORS)]


def vectors() -> list[talos.TaskVector]:
    mask = talos.Mask.from_dense({"w": torch.ones(SIZE) > 0})
    return [talos.TaskVector(mask, delta.flatten()) for delta in deltas()]


def our_draws() -> list[Tensor]:
    """Return what DARE keeps of each vector, as 0 and 1."""
    settings = OURS["dare_linear"][1]
    merged = [talos.merge([each], "dare", **settings) for each in vectors()]
    return [each.mask.to_dense("w").float() for each in merged]


def ours(name: str) -> Callable[[], Tensor]:
    several = vectors()
    if name == "tall_masks":
        total = talos.merge(several)
        return lambda: torch.stack(
            [each.to_dense("w") for each in tall_masks(several, total, STRICTNESS)]
        ).float()
    method, settings = OURS[name]
    return lambda: talos.merge(several, method, **settings).to_dense("w")


@contextmanager
def drawing(function: str) -> Iterator[None]:
    """Let a random function of torch return our draws, one vector after the other."""
    draws = iter(our_draws())
    with patch.object(torch, function, lambda *_, **__: next(draws)):
        yield


def mergekit(name: str) -> Callable[[], Tensor]:
    base = pytest.importorskip("mergekit.merge_methods.base")
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    group = base.TensorGroup.from_tensors([torch.zeros(SIZE), *deltas()], base_index=0)

    def each(value: float) -> dict[int, float]:
        return dict.fromkeys(range(1, VECTORS + 1), value)

    settings = {
        "normalize": name == "ties",
        "rescale": name == "dare_linear",
        "int8_mask": False,
        "lambda": 1.0,
        "weight": each(1.0),
        "density": each(DENSITY),
        **({"gamma": each(LARGEST)} if name == "breadcrumbs" else {}),
    }
    return lambda: registry.get(name).merge_group(group, **settings)


def fusion_bench(name: str) -> Callable[[], Tensor]:
    package = "fusion_bench.method"
    ties = pytest.importorskip(f"{package}.ties_merging.ties_merging_utils")
    dare = pytest.importorskip(f"{package}.dare.utils")
    tall = pytest.importorskip(f"{package}.tall_mask.task_arithmetic")
    dicts = pytest.importorskip("fusion_bench.utils.state_dict_arithmetic")
    several: list[dict[str, Tensor]] = [{"w": delta} for delta in deltas()]

    def dropped() -> Tensor:
        kept = [torch.nn.Parameter(delta.clone()) for delta in deltas()]
        for each in kept:
            dare.param_random_drop_(each, 1 - DENSITY, rescale=True)
        total: Tensor = dicts.state_dict_sum([{"w": each.detach()} for each in kept])["w"]
        return total

    def masks() -> Tensor:
        total, zero = dicts.state_dict_sum(several), {"w": torch.zeros(SIZE)}
        found = [tall.generate_task_masks(total, each, zero, STRICTNESS) for each in several]
        return torch.stack([each["w"] for each in found])

    flat = torch.stack(deltas()).flatten(1)
    forms: dict[str, Callable[[], Tensor]] = {
        "task_arithmetic": lambda: dicts.state_dict_sum(several)["w"],
        "ties": lambda: ties.ties_merging(flat, DENSITY, "mean").view(SIZE),
        "dare_linear": dropped,
        "tall_masks": masks,
    }
    return forms[name]


PEERS: dict[str, tuple[Callable[[str], Callable[[], Tensor]], str]] = {
    "mergekit": (mergekit, "bernoulli"),
    "fusion-bench": (fusion_bench, "rand_like"),
}


@pytest.mark.parametrize(("package", "name"), FORMS)
@pytest.mark.filterwarnings("ignore")
def bench_merging_peers(package: str, name: str, keep: Callable[[Record], Any]) -> None:
    make, random = PEERS[package]
    theirs, wanted = make(name), ours(name)
    if name == "dare_linear":
        with drawing(random):
            found = theirs()
    else:
        found = theirs()
    own = wanted()
    start = measure.clock()
    wanted()
    seconds = measure.clock() - start
    apart = (own - found).abs()
    ulp = torch.maximum(own.abs(), found.abs()) * 2.0**-23
    keep(
        Record(
            op="merging_peers",
            shape=f"{VECTORS} dense vectors of {SIZE[0]}x{SIZE[1]}",
            form=f"{package} {version(package)}, {name}",
            seconds=seconds,
            spread=0.0,
            overlaps={
                "equal": float((own == found).double().mean()),
                "1 ulp": float((apart <= ulp).double().mean()),
            },
            comparable=False,
        )
    )
