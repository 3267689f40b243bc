"""How exact the ops are: every op on every backend against float64, and 1,000 steps.

    python -m benches.numerics --out benches/results/<device>/numerics.json

An error is counted in ulp, units in the last place of the result's dtype. The unit is that at the
largest number of a sum: what was there before, what is added, the result; of a sum of many terms
their magnitudes together. Where terms cancel, the unit of the small rest would say nothing.

The oracles share no code with the ops: torch's AdamW in float64, indexing, products and a stable
sort in float64. A bar is what docs/numerics.md promises. Exit code 1: one is missed.
"""

import argparse
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import talos
from benches import measure
from benches.results import markdown, write_json
from talos_kernels import (
    Index,
    TensorIndex,
    _ops,
    add_delta_,
    fisher_diag_,
    gather_grad_,
    scatter_,
    sddmm_,
    select_threshold,
    sparse_adam_,
)
from tests.cases import BLOCK_SIZE, DTYPES, MANY, Case
from tests.interpreter import use_interpreter

RUNS, STEPS, PARITY_STEPS = 10, 1000, 40
EPS = torch.finfo(torch.float32).eps
CASE = next(case for case in MANY if case.name == "every-encoding")
SAMPLES, TOKENS, ROWS, COLUMNS = 4, 50, 96, 64
LR, WEIGHT_DECAY, BEFORE = 1e-2, 0.1, 6
FULL, PART = "full mask beside torch.optim.AdamW", "unselected entries that changed"


@dataclass(frozen=True)
class Backend:
    """Implementations of the ops on one device; `own` names those that are not another's."""

    name: str
    device: torch.device
    ops: Mapping[str, Callable[..., Any]]
    own: frozenset[str]

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Let these implementations run behind the public functions."""
        module = importlib.import_module("talos_kernels.select_threshold")
        digits = module.DIGITS  # Triton's histogram has fewer bins
        if self.name.startswith("Triton"):
            digits = digits | {torch.float32: module.GPU_DIGITS}
        with (
            mock.patch.object(torch.ops, "talos", SimpleNamespace(**self.ops)),
            mock.patch.object(module, "DIGITS", digits),
        ):
            yield


def backends() -> list[Backend]:
    """Return what this machine has: the references and C++ on the CPU, Triton, CUDA C++."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    references = _ops._references
    compiled = {name: getattr(torch.ops.talos, name) for name in references}
    found = [Backend("reference", cpu, references, frozenset(references))]
    if _ops.compiled_library is not None:
        found.append(Backend("C++", cpu, compiled, frozenset(compiled)))
    if importlib.util.find_spec("triton") is None:
        return found
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        use_interpreter()
    importlib.import_module("talos_kernels.triton")
    by_kind = {
        kind: {name: each[kind] for name, each in _ops._on_cuda.items() if kind in each}
        for kind in ("triton", "csrc")
    }
    triton = by_kind["triton"]
    name, device = ("Triton", cuda) if on_gpu else ("Triton, interpreted", cpu)
    found.append(Backend(name, device, triton, frozenset(triton)))
    if by_kind["csrc"]:
        own = frozenset(by_kind["csrc"])
        found.append(Backend("CUDA C++", cuda, triton | by_kind["csrc"], own))
    return found


@dataclass(frozen=True)
class Part:
    """One result of an op, what it should be in float64, and what was there before it."""

    found: Tensor
    exact: Tensor
    before: Tensor
    moved: bool = False
    """Whether the op only moves bits, and must be exact."""
    bar: bool = False
    """Whether docs/numerics.md promises the last bit: one ulp in float32, else one rounding."""
    theirs: Tensor | None = None
    """What torch's own float32 optimizer makes of the same numbers."""

    def figures(self) -> dict[str, Any]:
        """Return the errors in ulp, and what is wrong with them: empty where nothing is."""
        errors = ulps(self.found, self.exact, self.before)
        rounded = ulps(self.found, self.exact.to(self.found.dtype), self.before).max().item()
        largest, eps = errors.max().item(), torch.finfo(self.found.dtype).eps
        short = eps > EPS  # its weights are rounded from float32 ones
        figures = {"largest": largest, "mean": errors.mean().item(), "rounded": rounded}
        if self.theirs is not None:
            figures["oracle"] = ulps(self.theirs, self.exact, self.before).max().item()
        if self.moved:
            return figures | {"bar": "exact", "met": largest == 0}
        if not self.bar:
            return figures
        if short:
            return figures | {"bar": "one rounding", "met": largest <= 0.5 + 1.5 * EPS / eps}
        return figures | {"bar": "1 ulp", "met": rounded <= 1}


def ulps(found: Tensor, wanted: Tensor, before: Tensor) -> Tensor:
    """Return each entry's distance in units at the largest of before, added and after: float64."""
    wanted, before = wanted.double(), before.double()
    largest = torch.stack([before, wanted - before, wanted]).abs().amax(0)
    return (found.double() - wanted).abs() / ulp(largest, found.dtype)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of `dtype` at float64 values that are positive.

    Example:
        >>> ulp(torch.tensor([1.0, 1.5, 3.0]).double(), torch.float32) * 2**23
        tensor([1., 1., 2.], dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def _index(case: Case, device: torch.device) -> Index:
    return Index.pack([TensorIndex.encode(mask) for mask in case.masks()], device)


def _selected(tensors: Sequence[Tensor], case: Case) -> Tensor:
    pairs = zip(tensors, case.masks(), strict=True)
    return torch.cat([tensor.cpu()[mask] for tensor, mask in pairs])


def _moments(nnz: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(nnz, generator=generator) * 0.1, torch.rand(nnz, generator=generator)


def adam_step(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """One step in the middle of a training, with weight decay, against torch's AdamW."""
    index = _index(CASE, device)
    params = [each.to(device) for each in CASE.tensors(dtype)]
    grads = [each.to(device) for each in CASE.tensors(dtype, seed=3)]
    start, gradient = (_selected(each, CASE).double() for each in (params, grads))
    m, v = (each.to(device) for each in _moments(index.nnz))
    old_m, old_v = m.cpu().double(), v.cpu().double()
    master = None if dtype == torch.float32 else start.float().to(device)
    steps = torch.full((len(params),), float(BEFORE), device=device)
    sparse_adam_(params, grads, index, m, v, steps, lr=LR, weight_decay=WEIGHT_DECAY, master=master)
    old = (start, old_m, old_v)
    exact, after_m, after_v = torch_step(*old, gradient)
    parts = {
        "weights": Part(_selected(params, CASE), exact, start, bar=True),
        "exp_avg": Part(m.cpu(), after_m, old_m),
        "exp_avg_sq": Part(v.cpu(), after_v, old_v),
    }
    if dtype == torch.float32:
        theirs = torch_step(*(each.float() for each in old), gradient.float())
        pairs = zip(parts.items(), theirs, strict=True)
        parts = {key: replace(part, theirs=each) for (key, part), each in pairs}
    if master is not None:
        parts["float32 master"] = Part(master.cpu(), exact, start, bar=True)
    return parts


def torch_step(weight: Tensor, m: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return weight and moments after a step of torch's own AdamW, in the dtype of all of them."""
    param = nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([param], lr=LR, weight_decay=WEIGHT_DECAY, foreach=False)
    state = optimizer.state[param]
    state |= {"step": torch.tensor(float(BEFORE)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    param.grad = gradient
    optimizer.step()
    return param.detach(), state["exp_avg"], state["exp_avg_sq"]


def gathered(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """Selected entries read."""
    index, tensors = _index(CASE, device), [each.to(device) for each in CASE.tensors(dtype)]
    out = torch.zeros(index.nnz, device=device)
    gather_grad_(out, tensors, index)
    exact = _selected(tensors, CASE).double()
    return {"": Part(out.cpu(), exact, exact, moved=True)}


def scattered(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """Selected entries written."""
    index, tensors = _index(CASE, device), [each.to(device) for each in CASE.tensors(dtype)]
    values = _selected(CASE.tensors(dtype, seed=3), CASE)
    scatter_(tensors, index, values.to(device))
    exact = values.double()
    return {"": Part(_selected(tensors, CASE), exact, exact, moved=True)}


def added(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """A scaled delta added to selected entries."""
    index, tensors = _index(CASE, device), [each.to(device) for each in CASE.tensors(dtype)]
    before = _selected(tensors, CASE).double()
    delta = torch.randn(index.nnz, generator=torch.Generator().manual_seed(4)) * 0.1
    add_delta_(tensors, index, delta.to(device), scale=0.3)
    return {"": Part(_selected(tensors, CASE), before + 0.3 * delta.double(), before)}


def _rows(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, SAMPLES, TOKENS, width) for width in (ROWS, COLUMNS))
    dy, x = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    return dy, x


def scored(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """Squared gradients per sample, summed over samples."""
    dy, x = _rows(device, dtype)
    score = torch.zeros(ROWS, COLUMNS, device=device)
    fisher_diag_([score], [dy], [x])
    left, right = dy[0].cpu().double().mT, x[0].cpu().double()
    exact, size = ((left @ right).square(), (left.abs() @ right.abs()).square())
    return {"": Part(score.cpu(), exact.sum(0), size.sum(0))}


def sampled(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """The selected entries of a weight gradient."""
    dy, x = (each.flatten(0, 2) for each in _rows(device, dtype))
    case = Case("layer", (ROWS * COLUMNS,), (0.6,))
    index = _index(case, device)
    out = torch.zeros(index.nnz, device=device)
    sddmm_(out, dy, x, index)
    left, right = dy.cpu().double().T, x.cpu().double()
    exact, size = left @ right, left.abs() @ right.abs()
    return {"": Part(out.cpu(), *(_selected([each.flatten()], case) for each in (exact, size)))}


def thresholded(device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """The lowest tenth of many scores, of which some are equal: 1 where selected, else 0."""
    scores = [each.square().to(device) for each in CASE.tensors(dtype)]
    flat = torch.cat([each.cpu().double() for each in scores])
    k = flat.numel() // 10
    threshold = select_threshold(scores, k)
    found = torch.cat([threshold.select(i, each) for i, each in enumerate(scores)])
    exact = torch.zeros_like(flat)
    exact[flat.sort(stable=True).indices[:k]] = 1
    return {"": Part(found.cpu().float(), exact, exact, moved=True)}


WORKS: dict[str, tuple[str, Callable[[torch.device, torch.dtype], dict[str, Part]]]] = {
    "sparse_adam_": ("sparse_adam_", adam_step),
    "gather_grad_": ("gather_grad_", gathered),
    "scatter_": ("scatter_", scattered),
    "add_delta_": ("add_delta_", added),
    "fisher_diag_": ("fisher_diag_", scored),
    "sddmm_": ("sddmm_", sampled),
    "select_threshold": ("score_histogram", thresholded),
}
"""By public function: the op behind it, and one call beside its oracle."""


@dataclass(frozen=True)
class Row:
    """One result on one backend. Errors are in ulp; those of unselected entries count entries."""

    op: str
    backend: str
    dtype: str
    entries: int
    largest: float
    mean: float
    rounded: float | None = None
    """The largest distance from the float64 result rounded to the dtype."""
    bar: str = ""
    met: bool = True
    runs: int = 1
    hashes: int = 1
    """How many different results the runs gave."""
    relative: float | None = None
    """Of the full mask: the norm of the difference over the norm of what training changed."""
    oracle: float | None = None
    """How far torch's own float32 AdamW is from its float64 one on the same numbers, in ulp."""


def one_call(name: str, backend: Backend, dtype: torch.dtype, runs: int) -> list[Row]:
    """Return a row for each result of one op, called `runs` times with one seed."""
    work = WORKS[name][1]
    with backend.serving():
        outcomes = [work(backend.device, dtype) for _ in range(runs)]
    rows = []
    for key, part in outcomes[0].items():
        hashes = {_hash(outcome[key].found) for outcome in outcomes}
        about = {"entries": part.found.numel(), "runs": runs, "hashes": len(hashes)}
        shown = f"{name}, {key}" if key else name
        row = Row(shown, backend.name, _short(dtype), **about, **part.figures())
        rows.append(replace(row, met=row.met and row.hashes == 1))
    return rows


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def full_mask(backend: Backend, steps: int) -> list[Row]:
    """Train with every entry selected, beside torch.optim.AdamW in float32 and in float64.

    The unit of an entry is that at its largest value on the way.
    """
    start = torch.randn(BLOCK_SIZE, generator=torch.Generator().manual_seed(6)) * 0.1
    mask = talos.Mask.from_dense({"weight": torch.ones(BLOCK_SIZE, dtype=torch.bool)})
    params = [
        nn.Parameter(start.to(backend.device, dtype, copy=True))
        for dtype in (torch.float32, torch.float32, torch.float64)
    ]
    settings = {"lr": 1e-3, "weight_decay": WEIGHT_DECAY}
    rows, widest = [], start.double()
    with backend.serving():
        optimizers: list[torch.optim.Optimizer] = [
            talos.SparseAdam([("weight", params[0])], mask, **settings),
            *(torch.optim.AdamW([each], **settings) for each in params[1:]),
        ]
        for step, gradient in enumerate(_gradients(steps), 1):
            for param, optimizer in zip(params, optimizers, strict=True):
                param.grad = gradient.to(param)
                optimizer.step()
            ours, theirs, exact = (each.detach().cpu().double() for each in params)
            widest = torch.maximum(widest.abs(), exact.abs())
            if step in {1, PARITY_STEPS, steps}:
                unit = ulp(widest, torch.float32)
                errors, drift = (ours - theirs).abs() / unit, (theirs - exact).abs() / unit
                relative = (ours - theirs).norm() / (theirs - start.double()).norm()
                row = Row(
                    f"{FULL}, {step:,} step{'s' * (step > 1)}", backend.name, "float32",
                    errors.numel(), errors.max().item(), errors.mean().item(),
                    relative=relative.item(), oracle=drift.max().item(),
                )  # fmt: skip
                if step in {1, PARITY_STEPS}:
                    row = replace(row, bar="2 ulp", met=row.largest <= 2)
                rows.append(row)
    return rows


def _gradients(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        yield torch.randn(BLOCK_SIZE, generator=generator)


def unselected(backend: Backend, dtype: torch.dtype, steps: int) -> list[Row]:
    """Count the unselected entries that training changed; their gradients are NaN."""
    generator = torch.Generator().manual_seed(8)
    chosen = torch.rand(BLOCK_SIZE, generator=generator) < 0.5
    start = torch.randn(BLOCK_SIZE, generator=generator).to(dtype)
    param = nn.Parameter(start.to(backend.device, copy=True))
    mask = talos.Mask.from_dense({"weight": chosen})
    with backend.serving():
        optimizer = talos.SparseAdam([("weight", param)], mask, lr=1e-3, weight_decay=WEIGHT_DECAY)
        for gradient in _gradients(steps):
            param.grad = gradient.masked_fill(~chosen, torch.nan).to(param)
            optimizer.step()
    found = param.detach().cpu()
    wide = torch.int32 if dtype == torch.float32 else torch.int16
    changed = (found.view(wide) != start.view(wide))[~chosen].sum().item()
    if not bool((found != start)[chosen].any()):
        raise AssertionError("the selected entries must move, or there was no training")
    name, entries = f"{PART}, {steps:,} steps", int((~chosen).sum())
    figures = {"largest": changed, "mean": changed / entries, "bar": "exact", "met": changed == 0}
    return [Row(name, backend.name, _short(dtype), entries, **figures)]


def works(found: Sequence[Backend], runs: int, steps: int) -> Iterator[Callable[[], list[Row]]]:
    """Yield what makes the rows of each measurement."""
    for name, (op, _) in WORKS.items():
        for dtype in DTYPES:
            for backend in found:
                if op in backend.own:
                    yield partial(one_call, name, backend, dtype, runs)
    for backend in found:
        if "sparse_adam_" in backend.own:
            yield partial(full_mask, backend, steps)
            for dtype in DTYPES:
                yield partial(unselected, backend, dtype, steps)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table: a row for each result and dtype, a column for each backend.

    A cell holds the largest and the mean error.
    """
    names = list(dict.fromkeys(row["backend"] for row in rows))
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"]), {})[row["backend"]] = row
    body = []
    for (op, dtype), by_backend in groups.items():
        found = list(by_backend.values())
        cells = [_cell(by_backend[name]) if name in by_backend else "" for name in names]
        runs, hashes = (max(row[key] for row in found) for key in ("runs", "hashes"))
        met = "met" if all(row["met"] for row in found) else "MISSED"
        bar = f"{found[0]['bar']}: {met}" if found[0]["bar"] or met == "MISSED" else ""
        body.append([op, dtype, *cells, bar, f"{hashes} of {runs}" if runs > 1 else ""])
    return markdown(["result", "dtype", *names, "bar", "hashes"], body)


def _cell(row: Mapping[str, Any]) -> str:
    if row["largest"] == 0:
        return "0"
    return f"{row['largest']:.2f}, {row['mean']:.2g}"


def main(argv: Sequence[str] | None = None, show: Callable[[str], object] = print) -> int:
    """Return 0 if every bar is met, else 1."""
    options = parser().parse_args(argv)
    rows = write(options.out, backends(), options.runs, options.steps)
    for line in table(rows):
        show(line)
    return 0 if all(row["met"] for row in rows) else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.numerics")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each op with one seed")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the trainings")
    return parser


def write(
    path: Path, found: Sequence[Backend], runs: int = RUNS, steps: int = STEPS
) -> list[dict[str, Any]]:
    """Measure everything on these backends; write the file and return its records."""
    rows = [asdict(row) for make in works(found, runs, steps) for row in make()]
    about = measure.machine() | {"runs": runs, "steps": steps}
    write_json(path, {"about": about, "records": rows})
    return rows


if __name__ == "__main__":
    sys.exit(main())
