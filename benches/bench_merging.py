"""Eight task vectors merged into one, by method, beside loading eight dense checkpoints.

The vectors have a tenth of the entries of a vision transformer. Two layouts: `Q and K`, where
TaLoS' masks lie, with masks that overlap as those of unrelated tasks do; and `anywhere`, random
entries, whose union is the largest that there can be.

- a method: `state_bytes` are the vectors themselves, `peak_bytes` the resident memory that a merge
  takes beside them.
- loading: one safetensors file a task, read whole and copied into one resident model.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import safetensors.torch
import torch

import talos
from benches import measure
from benches.results import Record
from benches.shapes import SHAPES, ModelShape
from benches.work import Work
from talos.merging import METHODS
from talos_kernels import TensorIndex
from tests.cases import assert_close

SHAPE = SHAPES["vit-b-32"]
VECTORS = 8
ROUNDS = 3
DENSITY = 0.1
MOST_PEAK = 1.5  # of one dense model
LAYOUTS = ("Q and K", "anywhere")
LOADING = "load eight dense checkpoints"


@lru_cache(maxsize=1)
def vectors(shape: ModelShape, layout: str) -> list[talos.TaskVector]:
    return [_vector(shape, layout, seed) for seed in range(VECTORS)]


def _vector(shape: ModelShape, layout: str, seed: int) -> talos.TaskVector:
    common, own = (torch.Generator().manual_seed(each) for each in (99, seed))
    share = DENSITY * shape.numel / shape.touched_numel
    indices, shapes = {}, {tensor.name: tensor.shape for tensor in shape.tensors}
    for tensor in shape.tensors:
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        if layout == "anywhere":
            mask = torch.rand(tensor.shape, generator=own) < DENSITY
        elif tensor.query_key_rows:
            rows = mask[: tensor.query_key_rows]
            alike, apart = (torch.rand(rows.shape, generator=each) for each in (common, own))
            # four fifths of the entries decide alike for all tasks: masks with an IoU of about .7
            rows.copy_(torch.where(alike < 0.8, alike / 0.8, apart) < share)
        indices[tensor.name] = TensorIndex.encode(mask)
    mask = talos.Mask(shapes, indices)
    return talos.TaskVector(mask, torch.randn(mask.nnz, generator=own) * 1e-3)


def make(shape: ModelShape, layout: str, method: str) -> Work:
    several = vectors(shape, layout)
    settings = {"drop_smallest": 0.95} if method == "breadcrumbs" else {}
    held = sum(vector.nbytes for vector in several)

    def step() -> None:
        talos.merge(several, method, **settings)

    def check() -> None:
        """Two tensors merge as their dense forms do."""
        names = [each.name for each in (shape.touched[0], shape.tensors[0])]
        sparse = [_only(each, names) for each in several]
        dense = [_dense(each) for each in sparse]
        one, other = (talos.merge(each, method, **settings) for each in (sparse, dense))
        if method != "dare":  # a dense form is another vector, which is drawn otherwise
            for name in names:
                assert_close(one.to_dense(name), other.to_dense(name))

    return Work(step, check, state_bytes=lambda: held)


def make_loading(shape: ModelShape, folder: Path) -> Work:
    generator = torch.Generator().manual_seed(0)
    model = {t.name: torch.randn(t.shape, generator=generator) for t in shape.tensors}
    paths = [folder / f"{number}.safetensors" for number in range(VECTORS)]
    for path in paths:
        safetensors.torch.save_file(model, path)

    def step() -> None:
        for path in paths:
            for name, tensor in safetensors.torch.load_file(path).items():
                model[name].copy_(tensor)

    def check() -> None:
        before = {name: tensor.clone() for name, tensor in model.items()}
        step()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.items())

    size = 4 * shape.numel
    return Work(step, check, bytes_moved=2 * VECTORS * size, state_bytes=lambda: size)


def _only(vector: talos.TaskVector, names: list[str]) -> talos.TaskVector:
    covers = {name: vector.mask.indices[name] for name in names}
    return vector.restrict(talos.Mask({n: vector.mask.shapes[n] for n in names}, covers))


def _dense(vector: talos.TaskVector) -> talos.TaskVector:
    names = vector.mask.names
    mask = talos.Mask.from_dense({n: torch.ones(vector.mask.shapes[n]) > 0 for n in names})
    return talos.TaskVector(mask, torch.cat([vector.to_dense(n).flatten() for n in names]))


@pytest.mark.skipif(not measure.RESIDENT_PEAK.exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_merging(layout: str, tmp_path: Path, keep: Callable[[Record], object]) -> None:
    works = {method: make(SHAPE, layout, method) for method in METHODS}
    peaks = {name: measure.resident_peak(work.step) for name, work in works.items()}
    held = sum(vector.nbytes for vector in vectors(SHAPE, layout))
    if layout == "Q and K":
        assert max(peaks.values()) + held < MOST_PEAK * 4 * SHAPE.numel
    loading = make_loading(SHAPE, tmp_path)
    works[LOADING], peaks[LOADING] = loading, measure.resident_peak(loading.step)
    for work in works.values():
        work.check()
    times = measure.alternated({name: work.step for name, work in works.items()}, ROUNDS)
    for name, work in works.items():
        seconds, spread = measure.median_and_spread(times[name])
        keep(
            Record(
                op="merging",
                shape=f"{SHAPE.name}, {layout}",
                form=name,
                seconds=seconds,
                spread=spread,
                peak_bytes=peaks[name],
                **work.about,
            )
        )
