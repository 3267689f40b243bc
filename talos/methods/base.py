"""The interface between the methods of fine-tuning and the one training loop.

A `Method` holds a method's settings. `start` prepares a model and returns a `Phase`: what is
trained, by which optimizer, on which module the loss is computed, and the task vector. A method of
several phases returns the next one from `following`. `talos.fine_tune` runs the loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from talos.distributed import is_sharded
from talos.errors import TalosValueError
from talos.names import named_parameters
from talos.optim import average_gradients
from talos.params import check_one_memory
from talos.task_vectors import TaskVector

__all__ = [
    "Hyperparameters",
    "LogitsFunction",
    "Method",
    "Phase",
    "Setup",
    "check_unsharded",
    "logits_with",
    "trainable",
    "untrained",
]

Hyperparameters = dict[str, Any]
"""lr, betas, eps and weight_decay, as `torch.optim.AdamW` takes them."""

LogitsFunction = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to logits, `[B, C]` or `[B, T, V]`."""


@dataclass(frozen=True)
class Setup:
    """What a method trains with.

    Attributes:
        model: the model to train, in place.
        hyper: of the optimizer.
        logits_fn: maps a model and a batch to logits.
        metadata: of the task vector.
    """

    model: nn.Module
    hyper: Hyperparameters
    logits_fn: LogitsFunction
    metadata: Mapping[str, Any]


class Phase(ABC):
    """Training of one set of weights, from its first step to its last.

    Attributes:
        module: the module of which the loss is computed.
        logits_fn: maps it and a batch to logits.
        metadata: of the task vector.
        optimizer: takes the steps; the loop sets its groups' `lr` before each.
        trained: what the optimizer trains, by name and in its order.
        others: the parameters that require a gradient and are not trained.
        lr: the phase's own peak learning rate; None: that of the training.
    """

    optimizer: torch.optim.Optimizer
    trained: Mapping[str, Tensor]
    others: Sequence[nn.Parameter] = ()
    lr: float | None = None

    def __init__(self, setup: Setup) -> None:
        self.module, self.logits_fn = setup.model, setup.logits_fn
        self.metadata = setup.metadata

    def freeze(self) -> None:
        """Turn gradients off where nothing is trained; called before the first step."""
        for param in self.others:
            param.requires_grad_(False)

    def release(self) -> None:
        """Turn them on again; called at the end, also after an error."""
        for param in self.others:
            param.requires_grad_(True)

    @abstractmethod
    def task_vector(self) -> TaskVector:
        """Return trained minus initial weights."""

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient, now or in `step`, so that its norm is at most `max_norm`.

        Args:
            max_norm: the largest norm; infinity: no scaling.

        Returns:
            The norm before, 0-dim.
        """

    def average(self) -> None:
        """Average the gradient over all ranks, which all call this."""
        average_gradients(self.optimizer)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def check_gradients(self) -> None:
        """Warn of what is wrong with the gradients of the first backward pass."""
        return

    def step(self) -> None:
        """Change the weights."""
        self.optimizer.step()

    def following(self) -> "Phase | None":
        """Return the next phase; None: training is over."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return what has changed since the phase was made, for a checkpoint.

        Returns:
            `weights/NAME` for everything that is trained, and `state/NAME/KEY` for each part of the
            optimizer's state; they may share its memory.
        """
        names = list(self.trained)
        states = self.optimizer.state_dict()["state"]
        return {f"weights/{name}": self._values(name) for name in names} | {
            f"state/{names[number]}/{key}": value
            for number, parts in states.items()
            for key, value in parts.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go to where `state` was called, on another phase that was made in the same way.

        Args:
            state: what it returned, on the CPU.

        Raises:
            TalosValueError: it belongs to other weights.
        """
        for name in self.trained:
            own, saved = self._values(name), state.get(f"weights/{name}")
            if saved is None or (saved.shape, saved.dtype) != (own.shape, own.dtype):
                found = "none" if saved is None else f"{saved.dtype} {list(saved.shape)}"
                raise TalosValueError(
                    f"state must hold {name} as {own.dtype} {list(own.shape)}, got {found}"
                )
        saved_parts: dict[str, dict[str, Tensor]] = {}
        for place, value in state.items():
            if place.startswith("state/"):
                name, _, key = place.removeprefix("state/").rpartition("/")
                saved_parts.setdefault(name, {})[key] = value
        if not saved_parts:
            raise TalosValueError("state must hold the moments of what is trained, got none")
        for name, moments in saved_parts.items():
            if name not in self.trained:
                raise TalosValueError(f"state must hold what is trained, got {name}")
            self._check_moments(name, moments)
        own_state = self.optimizer.state_dict()
        parts: dict[int, dict[str, Tensor]] = {n: dict(e) for n, e in own_state["state"].items()}
        for number, name in enumerate(self.trained):
            if name in saved_parts:
                # Fused AdamW walks moments and weights in the order of their memory.
                laid_out = {
                    key: _laid_out(value, self.trained[name])
                    for key, value in saved_parts[name].items()
                }
                parts[number] = {**parts.get(number, {}), **laid_out}
        self.optimizer.load_state_dict({**own_state, "state": parts})
        with torch.no_grad():
            for name in self.trained:
                self._set_values(name, state[f"weights/{name}"])

    def _check_moments(self, name: str, found: Mapping[str, Tensor]) -> None:
        """Refuse a state that no step makes: torch's fused AdamW would write outside of it."""
        shape, wanted = self._values(name).shape, self._moments(name)
        right = set(found) == {"step", *wanted} and all(
            (found[key].shape, found[key].dtype) == (shape, dtype) for key, dtype in wanted.items()
        )
        if not right or found["step"].shape or not found["step"].is_floating_point():
            parts = {key: f"{each.dtype} {list(each.shape)}" for key, each in found.items()}
            raise TalosValueError(
                f"state must hold step as one number and {', '.join(wanted)} of {name} as "
                f"{next(iter(wanted.values()))} {list(shape)}, got {parts}"
            )

    def _moments(self, name: str) -> dict[str, torch.dtype]:
        """Return the dtype of each part of the optimizer's state in a weight's shape, by key."""
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), self._values(name).dtype)

    def resumed(self, state: Mapping[str, Tensor]) -> "Phase":
        """Return the phase that a state belongs to, this one or a later one, where it was."""
        self.load(state)
        return self

    def _values(self, name: str) -> Tensor:
        """Return what is trained under a name, as it is now."""
        return self.trained[name].detach()

    def _set_values(self, name: str, weights: Tensor) -> None:
        """Write it."""
        self.trained[name].copy_(weights)


@dataclass(frozen=True)
class Method(ABC):
    """A method of fine-tuning and its settings; a frozen dataclass.

    Attributes:
        name: as `talos.fine_tune` and the command line take it.
        phases: how often the steps are taken.
        usual_lr: a peak learning rate that suits a small sentence encoder.
    """

    name: ClassVar[str]
    phases: ClassVar[int] = 1
    usual_lr: ClassVar[float]

    def start(self, model: nn.Module, hyper: Hyperparameters, logits_fn: LogitsFunction) -> Phase:
        """Prepare the first phase; the model stays as it is until `freeze`.

        Args:
            model: the model to train, in place.
            hyper: of the optimizer.
            logits_fn: maps a model and a batch to logits.

        Raises:
            TalosValueError: the method finds nothing to train in this model.
        """
        return self._first_phase(Setup(model, hyper, logits_fn, self.metadata))

    @abstractmethod
    def _first_phase(self, setup: Setup) -> Phase:
        """See `start`."""

    def _store(self, **settings: Any) -> None:
        """Store settings in the form in which they were read."""
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    @property
    def metadata(self) -> dict[str, Any]:
        """The method's name and settings, for its task vectors.

        `seed` is called `method_seed` there, because a training has a seed of its own. Settings
        that are None are left out.
        """
        settings = {key: value for key, value in asdict(self).items() if value is not None}
        if "seed" in settings:
            settings["method_seed"] = settings.pop("seed")
        return {"method": self.name, **settings}


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with the strides of another one of its shape, else itself."""
    if value.shape != like.shape or value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name.

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
    """Return the parameters that require a gradient and are not trained."""
    own = {id(param) for param in trained}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in own]


def check_unsharded(params: Mapping[str, Tensor], method: str) -> None:
    """Refuse weights that ranks hold parts of, for a method that computes with whole ones."""
    if sharded := [name for name, param in params.items() if is_sharded(param)]:
        raise TalosValueError(
            f"model must have whole weights for the method {method}, got {len(sharded)} that are "
            f"sharded, e.g. {sharded[0]}; train it without fully_shard, or by another method"
        )


def logits_with(
    model: nn.Module, logits_fn: LogitsFunction, weights: Mapping[str, Tensor], batch: Any
) -> Tensor:
    """Return a model's logits of a batch with other tensors in place of its own.

    Args:
        model: the model; it stays as it is.
        logits_fn: maps it and a batch to logits.
        weights: the other tensors by the names of `model.named_parameters()` and of its buffers.
        batch: as `logits_fn` takes it.
    """
    swapped = {f"model.{name}": tensor for name, tensor in weights.items()}
    output: Tensor = torch.func.functional_call(_Caller(model, logits_fn), swapped, (batch,))
    return output


class _Caller(nn.Module):
    """A module whose output is the logits, as `functional_call` needs it."""

    def __init__(self, model: nn.Module, logits_fn: LogitsFunction) -> None:
        super().__init__()
        self.model, self.logits_fn = model, logits_fn

    def forward(self, batch: Any) -> Tensor:
        return self.logits_fn(self.model, batch)
