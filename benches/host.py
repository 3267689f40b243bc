"""What the host spends on an optimizer: tiny tensors, kernels that are not launched.

On a GPU the host must prepare a step in less time than the kernels of the one before take. Without
one, our launchers run as they do there, and only what Triton does to launch a kernel is left out,
its reading of the arguments too. Torch's fused AdamW runs its op for the CPU, to which so few
entries are nothing, once with its count of steps and once without: on a CPU that is an op a tensor,
on a GPU a kernel of its own, so that a GPU's host spends something in between. Clipping by torch is
measured with its kernels on the CPU.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import talos
from benches import measure
from benches.table import OURS
from talos_kernels.triton import gather_grad, sparse_adam

SIDE = 4  # of a tensor
MAX_NORM = 1e9  # lets every gradient through, and scales it all the same
CALLS = 20  # timed one after another in a turn


def no_op(*args: object, **options: object) -> None:
    """Stands for an op."""


class NotLaunched:
    """Stands for a Triton kernel; counts its launches and makes none."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **options: object) -> None:
        self.launches += 1


@contextlib.contextmanager
def no_launches(device: torch.device) -> Iterator[NotLaunched | None]:
    """Lets the CPU take a GPU's path to the kernels, without them; on a GPU nothing changes."""
    if device.type != "cpu":
        yield None
        return
    kernel, library = NotLaunched(), torch.library.Library("talos", "IMPL")
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*may also be overridden", UserWarning)  # meant so
        stack.callback(library._destroy)
        for module, op, names in (
            (sparse_adam, "sparse_adam_", ("adam_scalars_kernel", "sparse_adam_kernel")),
            (gather_grad, "gather_grad_", ("gather_grad_kernel",)),
        ):
            library.impl(op, getattr(module, op), "CPU", allow_override=True)
            for name in names:
                stack.enter_context(mock.patch.object(module, name, kernel))
        yield kernel


@dataclass
class Form:
    """An optimizer of many tensors, and what is called of it."""

    optimizer: torch.optim.Optimizer
    clip: Callable[[], object]
    gradients: list[tuple[Tensor, list[Tensor]]]
    turn: int = 0

    def give_gradients(self) -> None:
        """What a backward pass leaves: each parameter's next gradient."""
        self.turn += 1
        self.optimizer.zero_grad()
        for param, kept in self.gradients:
            param.grad = kept[self.turn % len(kept)]

    def works(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        return {
            "step": self.optimizer.step,
            "clip_grad_norm_": self.clip,
            "clip_grad_norm_ and step": lambda: (self.clip(), self.optimizer.step()),
            "zero_grad": self.optimizer.zero_grad,
            "zero_grad in place": lambda: self.optimizer.zero_grad(set_to_none=False),
        }


def parameters(n: int, device: torch.device) -> dict[str, nn.Parameter]:
    return {str(i): nn.Parameter(torch.randn(SIDE, SIDE, device=device)) for i in range(n)}


def ours(
    n: int,
    device: torch.device,
    *,
    compact: bool = False,
    defer: bool = False,
    memories: int = 1,
) -> Form:
    """Half of the entries; gradients that lie in `memories` places in turn."""
    named = parameters(n, device)
    half = torch.arange(SIDE * SIDE).view(SIDE, SIDE) % 2 == 0
    mask = talos.Mask.from_dense(dict.fromkeys(named, half))
    optimizer = talos.SparseAdam(list(named.items()), mask)
    if compact:
        optimizer.compact_gradients()
    clip = partial(optimizer.clip_grad_norm_, MAX_NORM, defer=defer)
    return Form(optimizer, clip, made(named, memories))


def fused(n: int, device: torch.device, *, counted: bool = True) -> Form:
    """AdamW in one call; on a CPU the count of steps may be left out."""
    named = parameters(n, device)
    optimizer = torch.optim.AdamW(named.values(), fused=True)
    if not counted and device.type == "cpu":
        step, add = optimizer.step, torch._foreach_add_

        def uncounted() -> None:
            torch._foreach_add_ = no_op
            try:
                step()
            finally:
                torch._foreach_add_ = add

        optimizer.step = uncounted
    clip = partial(nn.utils.clip_grad_norm_, list(named.values()), MAX_NORM)
    return Form(optimizer, clip, made(named, memories=1))


def made(named: dict[str, nn.Parameter], memories: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Gradients of a backward pass, as the optimizer has them kept."""
    kept: list[tuple[Tensor, list[Tensor]]] = [(param, []) for param in named.values()]
    for _ in range(memories):
        for param, gradients in kept:
            param.grad = None
            (param * torch.randn_like(param)).sum().backward()
            gradients.append(param.grad)
    return kept


FORMS: dict[str, Callable[[int, torch.device], Form]] = {
    OURS: ours,
    f"{OURS}, clipped by the step": partial(ours, defer=True),
    f"{OURS}, compact gradients": partial(ours, compact=True),
    f"{OURS}, compact, clipped by the step": partial(ours, compact=True, defer=True),
    f"{OURS}, gradients elsewhere each time": partial(ours, memories=100),
    "fused AdamW": fused,
    "fused AdamW, no count of steps": partial(fused, counted=False),
}


def host_seconds(work: Callable[[], object], prepare: Callable[[], object]) -> list[float]:
    """Seconds of each of some calls, of which none waits for the device."""
    times = []
    for _ in range(CALLS):
        prepare()
        measure.synchronise()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def alternated(forms: dict[str, Form], name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of the calls of one of `Form.works`, the forms in turns."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        for key, form in forms.items():
            times[key] += host_seconds(form.works()[name], form.give_gradients)
    return times
