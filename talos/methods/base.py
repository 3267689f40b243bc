"""What every method of fine-tuning is to the one training loop.

A `Method` holds a method's settings. `start` prepares a model for it and returns a `Phase`, which
says what is trained, by which optimizer, of which module the loss is computed, and what the task
vector is; a method of several phases names the next one in `following`. `talos.fine_tune` runs
them; nothing here loops.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from talos.errors import TalosValueError
from talos.names import named_parameters, unwrapped
from talos.params import check_one_memory
from talos.task_vectors import TaskVector

__all__ = ["Hyperparameters", "LogitsFunction", "Method", "Phase"]

Hyperparameters = dict[str, Any]
"""lr, betas, eps and weight_decay, as `torch.optim.AdamW` takes them."""

LogitsFunction = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to logits, `[B, C]` or `[B, T, V]`."""


class Phase(ABC):
    """Training of one set of weights, from its first step to its last.

    Attributes:
        module: what the loss is computed of.
        logits_fn: how its logits are had.
        optimizer: what takes the steps; its groups' `lr` is set before each.
        others: the parameters that require a gradient and are not trained.
        lr: the phase's own peak learning rate; None: that of the training.
    """

    module: nn.Module
    logits_fn: LogitsFunction
    optimizer: torch.optim.Optimizer
    others: Sequence[nn.Parameter] = ()
    lr: float | None = None

    def freeze(self) -> None:
        """Turn gradients off where nothing is trained; called before the first step."""
        for param in self.others:
            param.requires_grad_(False)

    def release(self) -> None:
        """Turn them on again; called at the end, however it comes."""
        for param in self.others:
            param.requires_grad_(True)

    @abstractmethod
    def task_vector(self) -> TaskVector:
        """Trained minus initial weights."""

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient, at once or in `step`, so that its norm is at most `max_norm`.

        Args:
            max_norm: the largest norm; infinity: any.

        Returns:
            The norm before, 0-dim.
        """

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def check_gradients(self) -> None:
        """Look at the gradients of the first backward pass, and warn of what is wrong."""
        return

    def step(self) -> None:
        """Change the weights."""
        self.optimizer.step()

    def following(self) -> "Phase | None":
        """The phase that comes after this one; None: training is over."""
        return None


@dataclass(frozen=True)
class Method(ABC):
    """A way of fine-tuning and its settings; a frozen dataclass.

    Attributes:
        name: as `talos.fine_tune` and the command line take it.
        phases: how often the steps are taken.
        usual_lr: a peak learning rate that suits a small sentence encoder.
    """

    name: ClassVar[str]
    phases: ClassVar[int] = 1
    usual_lr: ClassVar[float]

    @abstractmethod
    def start(self, model: nn.Module, hyper: Hyperparameters, logits_fn: LogitsFunction) -> Phase:
        """Prepare the first phase; the model is left as it is until `freeze`.

        Args:
            model: what is trained, in place.
            hyper: of the optimizer.
            logits_fn: `logits_fn(model, batch)`.

        Returns:
            The phase.

        Raises:
            TalosValueError: the model has nothing that the method could train.
        """

    @property
    def metadata(self) -> dict[str, Any]:
        """The method's name and settings, as its task vectors carry them.

        `seed` is called `method_seed` there: beside it a training's own seed is kept. A setting
        that is None is left out.
        """
        settings = {key: value for key, value in asdict(self).items() if value is not None}
        if "seed" in settings:
            settings["method_seed"] = settings.pop("seed")
        return {"method": self.name, **settings}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name.

    Raises:
        TalosValueError: there is none, or one shares memory with another parameter.
    """
    params = named_parameters(model)
    found = {name: param for name, param in params.items() if param.requires_grad}
    if not found:
        raise TalosValueError("model must have a parameter with requires_grad=True, got none")
    check_one_memory(named_parameters(model, remove_duplicate=False), found)
    return found


def untrained(model: nn.Module, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that require a gradient and are not among those trained."""
    own = {id(param) for param in trained}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in own]


def check_bare(model: nn.Module, name: str) -> None:
    """Refuse a wrapper, whose forward pass knows nothing of other weights."""
    if unwrapped(model) is not model:
        raise TalosValueError(
            f"model must not be wrapped for the method {name}, got {type(model).__name__}; "
            "pass the module inside it"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a real number: no bool, no text, no tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_density(density: object) -> None:
    """Refuse a density outside (0, 1], before anything is done with it."""
    if not (is_number(density) and 0.0 < density <= 1.0):
        raise TalosValueError(f"density must lie in (0, 1], got {density!r}")


def check_positive(name: str, value: object) -> None:
    """Refuse what is not a positive, finite number."""
    if not (is_number(value) and 0 < value < math.inf):
        raise TalosValueError(f"{name} must be positive and finite, got {value!r}")


def check_seed(seed: object) -> None:
    """Refuse what `torch.Generator.manual_seed` does not take as it is."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise TalosValueError(f"seed must be an integer of 64 bits, got {seed!r}")
