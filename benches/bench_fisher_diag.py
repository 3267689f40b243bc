"""Scoring one batch with a whole tower, and the op on a single layer.

`ours` is the time of one further batch of a call of `talos.fisher_diag`. The first batch of a call
also finds out which rows belong to which sample, and has a row of its own. Peak memory includes the
scores, and of the plain form the gradients.

Every form is checked in fp32 against a loop of single samples in float64 before it is timed; on a
GPU it is timed under bf16 autocast. Operations are those of the plain form, whatever a form really
computes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benches import measure, scoring
from benches.results import OURS, Record
from benches.shapes import SHAPES, ModelShape
from benches.work import Work
from talos_kernels import fisher_diag_

BATCH_SIZE = {"cpu": 16, "cuda": 32}
CPU_LAYERS = {"minilm": 6, "vit-b-32": 4, "vit-l-14": 1, "t5-large": 1}
TOLERANCE = 1e-4

Tower = tuple[str, scoring.Scored, scoring.Batch]
Keep = Callable[[Record], dict[str, object]]


@pytest.fixture(scope="module")
def tower(request: pytest.FixtureRequest) -> Tower:
    """Return a real tower by its name, with its description."""
    name, device = request.param, measure.target_device()
    full = SHAPES[name].layers
    default = full if device.type == "cuda" else CPU_LAYERS[name]
    layers = request.config.getoption("--layers") or default
    batch_size = BATCH_SIZE[device.type]
    tokens = SHAPES[name].tokens
    described = f"{name}, {layers} of {full} layers, {batch_size} samples of {tokens} tokens"
    return described, *scoring.build(name, layers, batch_size, device)


@pytest.fixture(scope="module")
def wanted(tower: Tower) -> scoring.Scores:
    _, model, batch = tower
    return scoring.exact(model, batch)


@pytest.fixture(scope="module")
def flops(tower: Tower) -> int:
    _, model, batch = tower
    with FlopCounterMode(display=False) as counter:
        scoring.plain(model, batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", scoring.FORMS)
def bench_scoring(tower: Tower, wanted: scoring.Scores, flops: int, name: str, keep: Keep) -> None:
    described, model, batch = tower
    form = scoring.FORMS[name]
    model = form.prepare(model)
    on_gpu = torch.cuda.is_available()
    found: scoring.Scores = {}

    def step() -> None:
        found.update(form.score(model, batch))

    def timed(rounds: int) -> list[float]:
        if name == OURS:
            return scoring.further_batches(model, batch, rounds)
        return measure.seconds(lambda: form.score(model, batch), rounds)

    try:
        first = measure.clock()
        peak = measure.peak_bytes(step)
        first = measure.clock() - first
        if form.scores:
            error = scoring.relative_error(found, wanted)
            assert error <= TOLERANCE
        found.clear()
        if on_gpu:
            model.autocast = True
            peak = measure.peak_bytes(lambda: form.score(model, batch))
        rounds = measure.rounds_for(first)
        seconds, spread = measure.median_and_spread(timed(rounds))
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{name} needs more memory than there is: {str(error).splitlines()[0]}")
    finally:
        model.autocast = False
    dtype = torch.bfloat16 if on_gpu else torch.float32
    keep(
        Record(
            op="scoring",
            shape=described,
            form=name,
            seconds=seconds,
            spread=spread,
            flops=flops,
            matrix_rate=measure.matrix_rate(measure.target_device(), dtype),
            peak_bytes=peak,
        )
    )


def bmm(score: Tensor, dy: Tensor, x: Tensor) -> None:
    score += torch.bmm(dy[0].transpose(1, 2), x[0]).float().square_().sum(0)


def einsum(score: Tensor, dy: Tensor, x: Tensor) -> None:
    score += torch.einsum("abco,abci->boi", dy, x).float().square_().sum(0)


def weight_gradient(score: Tensor, dy: Tensor, x: Tensor) -> None:
    score += torch.mm(dy.flatten(0, 2).t(), x.flatten(0, 2))


OPS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    OURS: lambda score, dy, x: fisher_diag_([score], [dy], [x]),
    "(a) bmm, square, sum": bmm,
    "(b) einsum, square, sum": einsum,
    "(c) the weight gradient, which it replaces": weight_gradient,
}


def make(
    name: str,
    linear: tuple[int, int],
    samples: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Work:
    """Return the op on one layer [O, I]."""
    generator = torch.Generator(device).manual_seed(0)
    dy, x = (
        torch.randn((1, samples, tokens, width), generator=generator, device=device).to(dtype)
        for width in linear
    )
    score = torch.zeros(linear, device=device)

    def step() -> None:
        OPS[name](score, dy, x)

    def check() -> None:
        score.zero_()
        step()
        sums = torch.zeros(linear, dtype=torch.float64, device=device)
        for each_dy, each_x in zip(dy[0], x[0], strict=True):
            gradient = each_dy.double().t() @ each_x.double()
            sums += gradient if OPS[name] is weight_gradient else gradient.square_()
        exact_sums = name == OURS or dtype == torch.float32  # others round each gradient to bf16
        error = scoring.relative_error({"weight": score}, {"weight": sums})
        assert error <= (TOLERANCE if exact_sums else 1e-2)

    return Work(step, check, flops=2 * samples * tokens * linear[0] * linear[1])


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", OPS)
def bench_fisher_diag(
    shape: ModelShape, linear: tuple[int, int], name: str, measured: Callable[..., None]
) -> None:
    device = measure.target_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples, (rows, columns) = BATCH_SIZE[device.type], linear
    work = make(name, linear, samples, shape.tokens, dtype, device)
    measured(
        work,
        op="fisher_diag_",
        shape=f"{shape.name}, {rows} x {columns}, {samples} samples of {shape.tokens} tokens",
        form=name,
        matrix_rate=measure.matrix_rate(device, dtype),
    )
