"""Checks of a training step on a device: no wait, a captured step's bits, another stream's.

Each raises where it does not hold. On the CPU the same lines run, with `Device` in CUDA's place.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import talos
from benches import measure
from benches.gpu.device import WARMUP, Device, Run
from tests.cases import assert_bit_equal

DENSITIES = (0.6, 0.1, 0.01)
REPLAYS = 5
DELAY = 2048
"""Width of a product that keeps a stream busy while the host goes on."""


class Training:
    """A small model with every encoding of a tensor in its mask, trained on one batch."""

    def __init__(self, device: Device, *, compact: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        widths = ((64, 192), (192, 96), (96, 64))
        layers = [nn.Linear(rows, columns) for rows, columns in widths]
        with torch.no_grad():
            for layer in layers:
                layer.weight.normal_(std=0.1, generator=generator)
                layer.bias.zero_()
        self.model = nn.Sequential(*layers).to(device.torch)
        masks = {
            f"{i}.weight": torch.rand(layer.weight.shape, generator=generator) < density
            for i, (layer, density) in enumerate(zip(layers, DENSITIES, strict=True))
        }
        masks["0.bias"] = torch.ones(widths[0][1], dtype=torch.bool)
        self.lr = torch.tensor(1e-2, device=device.torch)
        mask = talos.Mask.from_dense(masks)
        self.optimizer = talos.SparseAdam(self.model, mask, lr=self.lr, weight_decay=0.01)
        if compact:
            self.optimizer.compact_gradients()
        self.batch = torch.randn(32, 64, generator=generator).to(device.torch)
        self.wanted = torch.randn(32, 64, generator=generator).to(device.torch)

    def loss(self) -> Tensor:
        return functional.mse_loss(self.model(self.batch), self.wanted)

    def iterate(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()

    def bits(self) -> list[Tensor]:
        """Return copies of all weights and of the optimizer's state."""
        state = self.optimizer.state_dict()["state"]
        held = [value for each in state.values() for value in each.values()]
        tensors = [*self.model.state_dict().values(), *held]
        return [each.detach().clone() for each in tensors if isinstance(each, Tensor)]


def assert_same_training(one: Training, other: Training) -> None:
    for actual, wanted in zip(one.bits(), other.bits(), strict=True):
        assert_bit_equal(actual, wanted)


def never_waits(device: Device, *, compact: bool) -> dict[str, object]:
    """Check that the host waits for nothing in what a loop calls between two batches."""
    training = Training(device, compact=compact)
    optimizer = training.optimizer
    scaler = torch.amp.GradScaler(device.kind, init_scale=16.0)

    def backward() -> None:
        scaler.scale(training.loss()).backward()

    operations: dict[str, Run] = {
        "backward": backward,
        "scaler.unscale_": lambda: scaler.unscale_(optimizer),
        "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1.0),
        "scaler.step, unscaled": lambda: scaler.step(optimizer),
        "scaler.update": scaler.update,
        "zero_grad": optimizer.zero_grad,
        "a second backward": backward,
        "scaler.step": lambda: scaler.step(optimizer),
        "a second scaler.update": scaler.update,
        "step": optimizer.step,
        "zero_grad, kept": lambda: optimizer.zero_grad(set_to_none=False),
        "the last zero_grad": optimizer.zero_grad,
    }
    for _ in range(2):  # compiles, and fills tables
        for work in operations.values():
            work()
    measure.synchronise()
    waited = []
    for name, work in operations.items():
        try:
            with device.no_host_sync():
                work()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waited.append(name)
            with contextlib.suppress(RuntimeError):  # part of it may have been done
                work()
    if waited:
        raise AssertionError(f"the host waits in {', '.join(waited)}")
    return {"operations": list(operations)}


def replays_bit_for_bit(device: Device, *, compact: bool) -> dict[str, object]:
    """Check that a captured iteration, replayed, gives an eager one's bits; its lr is a tensor."""
    eager, captured = (Training(device, compact=compact) for _ in range(2))
    for _ in range(WARMUP):
        eager.iterate()
    replay = device.capture(captured.iterate)
    for _ in range(REPLAYS):
        for training, iterate in ((eager, eager.iterate), (captured, replay)):
            training.lr.mul_(0.7)
            iterate()
    measure.synchronise()
    assert_same_training(captured, eager)
    return {"replays": REPLAYS}


def another_stream(device: Device, *, compact: bool) -> dict[str, object]:
    """Check the bits of a backward on a side stream that lags and a step on the usual one."""
    plain, aside = (Training(device, compact=compact) for _ in range(2))
    width = DELAY if device.kind == "cuda" else 2
    busy = torch.ones(width, width, device=device.torch)
    for _ in range(REPLAYS):
        plain.iterate()
        aside.optimizer.zero_grad()
        with device.side_stream():
            busy @ busy
            aside.loss().backward()
        aside.optimizer.clip_grad_norm_(1.0)
        aside.optimizer.step()
    measure.synchronise()
    assert_same_training(aside, plain)
    return {"iterations": REPLAYS}


def launches(device: Device, *, compact: bool) -> dict[str, object]:
    """Count the kernels, copies and fills of each part of an iteration; on the CPU operators."""
    training = Training(device, compact=compact)
    for _ in range(2):
        training.iterate()
    optimizer = training.optimizer
    vector = optimizer.task_vector()
    counts = {
        "backward": measure.launches(lambda: training.loss().backward()),
        "clip_grad_norm_": measure.launches(lambda: optimizer.clip_grad_norm_(1.0)),
        "step": measure.launches(optimizer.step),
    }
    base = Training(device, compact=False).model
    with talos.ResidentVectors(base, {"one": vector}, force=True) as resident:
        resident.swap("one")
        resident.swap(None)
        counts["swap, from the base"] = measure.launches(lambda: resident.swap("one"))
        counts["swap, from a vector"] = measure.launches(lambda: resident.swap("one", 0.5))
    return {"launches": counts}


CHECKS: dict[str, Callable[..., dict[str, object]]] = {
    "no host sync": never_waits,
    "captured step": replays_bit_for_bit,
    "side stream": another_stream,
    "launches": launches,
}
