"""The weight gradients of Q and K at their selected entries, ours beside torch's product.

- product and gather: `torch.mm` of the rows with selected entries into one reused scratch, in the
  operands' dtype, and `gather_grad_` from there: what compact gradients do without `sampled`.

Both multiply the same rows. The product's form writes one dense gradient and reads the sectors with
selected entries again, and rounds to the operands' dtype in between; ours does neither. What is
timed are all Q and K weights of a model, each with operands of its own, after one another.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benches import measure
from benches.results import OURS
from benches.shapes import ModelShape
from benches.work import Work, sector_share, selection
from talos_kernels import Index, gather_grad_, sddmm_

FORMS = (OURS, "(a) product and gather")
BATCH_SIZE = {"cpu": 16, "cuda": 32}


class Layer(NamedTuple):
    """One weight: its operands `[tokens, features]`, its selection, the rows that hold entries."""

    dy: Tensor
    x: Tensor
    index: Index
    rows: slice
    out: Tensor


def operand_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def make_layers(shape: ModelShape, tokens: int, device: torch.device) -> list[Layer]:
    """Every Q and K weight of a model, in bf16 on a GPU and in fp32 on a CPU."""
    dtype = operand_dtype(device)
    generator = torch.Generator(device).manual_seed(0)
    layers = []
    chosen = selection(shape)
    for tensor in shape.touched:
        dy, x = (
            torch.randn(tokens, width, generator=generator, device=device).to(dtype)
            for width in tensor.shape
        )
        index = chosen.pack([tensor.name], device)
        out = torch.empty(index.nnz, device=device)
        layers.append(Layer(dy, x, index, slice(0, tensor.query_key_rows), out))
    return layers


def sampled(layers: list[Layer]) -> None:
    for layer in layers:
        sddmm_(layer.out, layer.dy, layer.x, layer.index)


def product_and_gather(layers: list[Layer], scratch: Tensor) -> None:
    for layer in layers:
        rows, cols = layer.dy.shape[1], layer.x.shape[1]
        dense = scratch[: rows * cols].view(rows, cols)
        torch.mm(layer.dy[:, layer.rows].t(), layer.x, out=dense[layer.rows])
        gather_grad_(layer.out, [dense], layer.index)


def relative_error(layer: Layer) -> float:
    """Return the entries' relative error, against the product of the same operands in float64."""
    wanted = layer.dy.double().t() @ layer.x.double()
    found = layer.out.double()
    entries = wanted.flatten()[layer.index.unpack()[0].positions_int64().to(wanted.device)]
    return float((found - entries).norm() / entries.norm())


def make(shape: ModelShape, name: str, batch_size: int, device: torch.device) -> Work:
    tokens = batch_size * shape.tokens
    layers = make_layers(shape, tokens, device)
    dtype, itemsize = layers[0].dy.dtype, layers[0].dy.element_size()
    nnz = sum(layer.index.nnz for layer in layers)
    features = sum(layer.rows.stop + layer.x.shape[1] for layer in layers)
    moved = itemsize * tokens * features + 4 * nnz + sum(each.index.nbytes for each in layers)
    held = 0
    if name == OURS:

        def step() -> None:
            sampled(layers)
    else:
        scratch = torch.empty(max(each.index.numels[0] for each in layers), device=device).to(dtype)
        held = scratch.nbytes
        again = 1 + sector_share(nnz / shape.touched_numel, itemsize)
        moved += int(again * itemsize * shape.touched_numel)

        def step() -> None:
            product_and_gather(layers, scratch)

    def check() -> None:
        step()
        rounded = name != OURS and dtype != torch.float32
        # A GPU's matrix units cut sums off where others round them.
        assert max(map(relative_error, layers)) <= (1e-2 if rounded else 1e-4)

    flops = 2 * tokens * sum(each.rows.stop * each.x.shape[1] for each in layers)
    return Work(step, check, bytes_moved=moved, flops=flops, state_bytes=lambda: held)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", FORMS)
def bench_sddmm(shape: ModelShape, name: str, measured: Callable[..., None]) -> None:
    device = measure.target_device()
    batch_size = BATCH_SIZE[device.type]
    work = make(shape, name, batch_size, device)
    measured(
        work,
        op="sddmm_",
        shape=f"{shape.name}, {batch_size} samples of {shape.tokens} tokens",
        form=name,
        matrix_rate=measure.matrix_rate(device, operand_dtype(device)),
    )
