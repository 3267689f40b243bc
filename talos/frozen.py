"""Frozen weights held once in autocast's dtype, instead of being cast at each use.

`torch.autocast` casts a weight for every matrix product that takes it. Its cache keeps the cast
only of leaves that require a gradient: a frozen weight is cast anew at each use, and the backward
keeps every one of those casts until it has run. Held, a weight of `n` entries costs

    bytes                            fp32 under autocast    held in bf16
    the weight                       4n                     2n
    kept of each use, for backward   2n                     0: the weight itself
    moved by the cast for each use   4n read, 2n written    0

and outputs and gradients keep their bits: the product sees the same operands. The fp32 originals
wait: where they are on a CPU, 6n bytes in all, and in page-locked memory of the host where the
model is on a GPU, from where giving them back copies 4n bytes. Who else holds such a parameter
finds it there.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from talos.casts import Trial, Watch, same_bits
from talos.errors import TalosRuntimeError, TalosTypeError
from talos.names import named_modules, named_parameters
from talos.tensors import equal_bits

__all__ = ["HeldWeights", "hold_frozen"]


@dataclass
class _Held:
    """A parameter that another one stands for.

    It is another object, because compiled code looks at a parameter's identity, not at its dtype.
    """

    original: nn.Parameter
    held: nn.Parameter
    version: int
    dtype: torch.dtype
    places: list[tuple[nn.Module, str]]

    @classmethod
    def hold(
        cls, original: nn.Parameter, places: list[tuple[nn.Module, str]], dtype: torch.dtype
    ) -> "_Held":
        held = nn.Parameter(original.detach().to(dtype), requires_grad=False)
        if original.device.type != "cpu":
            aside = original.detach().cpu()
            original.data = aside.pin_memory() if held.is_cuda else aside
        for module, name in places:
            module._parameters[name] = held
        return cls(original, held, held._version, dtype, places)

    def give_back(self) -> bool:
        """Returns whether somebody wrote the held parameter, replaced or unfroze it."""
        if self.original.device != self.held.device:
            self.original.data = self.original.detach().to(self.held.device)
        there = all(module._parameters.get(name) is self.held for module, name in self.places)
        for module, name in self.places:
            module._parameters[name] = self.original
        if not there or self.held._version != self.version or self.held.requires_grad:
            return True
        return not equal_bits(self.held, self.original.to(self.dtype))  # `.data` has no version


class HeldWeights:
    """What `hold_frozen` returns: the held weights, as a context or until `release`.

    Attributes:
        names: the held parameters.
        left: the frozen fp32 parameters that are as they were, and why.

    Example:
        >>> model = torch.nn.Linear(4, 3).requires_grad_(False)
        >>> held = hold_frozen(model, lambda: model(torch.randn(2, 4)))
        >>> held.names, model.weight.dtype
        (('weight', 'bias'), torch.bfloat16)
        >>> held.release()
        >>> model.weight.dtype
        torch.float32
    """

    def __init__(self, held: Mapping[str, _Held], left: Mapping[str, str]) -> None:
        self.names = tuple(held)
        self.left = dict(left)
        self._held = dict(held)
        self._written: list[str] = []
        self._hooks = ExitStack()
        for each in held.values():
            for module, name in each.places:
                hand_out = _HandOut(name, each.original, each.held)
                hook = module.register_state_dict_post_hook(hand_out)
                self._hooks.callback(hook.remove)

    def release(self) -> None:
        """Give the weights back as they were, bit for bit; a second call does nothing.

        Raises:
            TalosRuntimeError: a weight was written or unfrozen while it was held. All are given
                back first, so that what was written is gone.
        """
        for name in list(self._held):
            if self._held[name].give_back():
                self._written.append(name)
            del self._held[name]  # what a lack of memory keeps back can be asked for again
        self._hooks.close()
        if self._written:
            written, self._written = self._written, []
            raise TalosRuntimeError(
                "held weights must not be written or unfrozen, got changes of "
                f"{', '.join(written[:5])}, which are lost; load, edit or unfreeze after release"
            )

    def __enter__(self) -> "HeldWeights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except TalosRuntimeError:
            if error is None:  # else the error that ends the context is the one to hear of
                raise


@dataclass
class _HandOut:
    """A hook that puts the fp32 values into the state that a module saves.

    A copy of the module has a copy of it, which does so only until that weight is written.
    """

    name: str
    original: nn.Parameter
    held: nn.Parameter

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object
    ) -> None:
        key = f"{prefix}{self.name}"
        ours = key in state and module._parameters.get(self.name) is self.held
        if ours and torch.equal(self.held, self.original.to(self.held)):
            state[key] = self.original.detach()


def hold_frozen(
    model: nn.Module, forward: Callable[[], Any], dtype: torch.dtype = torch.bfloat16
) -> HeldWeights:
    """Hold the frozen weights in autocast's dtype, where a trial shows no bit of a result change.

    Which weights these are, a run of `forward` tells: those that matrix products under autocast
    take and nothing else does. So it must do what training will do, in the same modes. The result
    is tried: `forward` runs again and must return the same bits. Where the model's code reads a
    weight's dtype, or multiplies without a history (`torch.no_grad`, an `autograd.Function`), the
    gradients of the trained weights must keep their bits too; if they do not, or do not repeat on
    this device, the weight is left as it is. All this costs three forwards once, and where there
    are such doubts a forward and backward, and one more for each set of weights that share them;
    the gradients are kept meanwhile. Random states (torch's and Python's) and buffers are as before
    afterwards.

    The trial is one batch. Not seen is what only other batches show (a branch that they take, a
    value that the weight's dtype rounds), what hooks read of a weight in the backward, and an
    `autograd.Function` that multiplies under `torch.enable_grad` and uses the weight in another way
    in its backward: there a held weight, which is rounded, changes results.

    While they are held,
    - the model must run under `torch.autocast` of this dtype; without, torch refuses mixed dtypes;
    - `state_dict()` has the fp32 weights (on the CPU, of a model that is elsewhere);
    - other parameters stand for them: they must not be written or unfrozen by the model's means,
      so call `release` before `load_state_dict` and `TaskVector.apply_`;
    - code that was compiled before is compiled again, for what it finds.

    Args:
        model: any module; what requires a gradient, and what the optimizer is to train, is as it
            was. Make the optimizer first: `SparseAdam` freezes what its mask leaves out.
        forward: runs the model on a batch and returns the loss, or tensors; it must not call
            `backward`. Autocast is on around it.
        dtype: autocast's, `torch.bfloat16` or `torch.float16`.

    Returns:
        A handle and context manager; at its end, after an error too, the weights are given back.

    Raises:
        TalosTypeError: `dtype` is another one, or `forward` returns no tensor.

    Example:
        >>> body, head = torch.nn.Linear(4, 8).requires_grad_(False), torch.nn.Linear(8, 3)
        >>> model = torch.nn.Sequential(body, head)
        >>> x = torch.randn(2, 4)
        >>> with hold_frozen(model, lambda: model(x).sum()) as held:
        ...     with torch.autocast("cpu", torch.bfloat16):
        ...         model(x).sum().backward()
        >>> held.names
        ('0.weight', '0.bias')
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise TalosTypeError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype!r}")
    frozen = {
        name: param
        for name, param in named_parameters(model).items()
        if not param.requires_grad and param.dtype == torch.float32 and not param.is_meta
    }
    if not frozen:
        warnings.warn(
            "no float32 parameter is frozen, so none is held; make the optimizer first, which "
            "freezes what its mask leaves out",
            stacklevel=2,
        )
        return HeldWeights({}, {})
    left = _not_its_own(model, frozen)
    trial = Trial(model, forward, dtype)
    watch = Watch({name: param for name, param in frozen.items() if name not in left}, dtype)
    trial.run(watch)
    groups: dict[frozenset[CodeType], dict[str, nn.Parameter]] = {}
    for name, param in frozen.items():
        if (function := watch.others.get(id(param))) is not None:
            left[name] = f"is used by {function}"
        elif id(param) in watch.used:
            doubts = frozenset(watch.doubts.get(id(param), ()))
            groups.setdefault(doubts, {})[name] = param
        else:
            left.setdefault(name, "is not used by forward")
    held = _try(trial, groups, _places(model), dtype, left)
    return HeldWeights({name: held[name] for name in frozen if name in held}, left)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, and what they call it, by the parameter's id."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in named_modules(model):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(param), []).append((module, name))
    return places


def _not_its_own(model: nn.Module, frozen: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The parameters whose memory somebody else holds too, or that are more than a tensor."""
    plain = [
        each.untyped_storage().data_ptr()
        for each in (*model.parameters(), *model.buffers())
        if type(each.data) is Tensor and each.layout == torch.strided and not each.is_meta
    ]
    counts = Counter(plain)
    left = {}
    for name, param in frozen.items():
        if type(param) is not nn.Parameter or type(param.data) is not Tensor:
            left[name] = "is of another class"
        elif param.layout != torch.strided or counts[param.untyped_storage().data_ptr()] != 1:
            left[name] = "shares its memory"
    return left


def _try(
    trial: Trial,
    groups: Mapping[frozenset[CodeType], Mapping[str, nn.Parameter]],
    places: Mapping[int, list[tuple[nn.Module, str]]],
    dtype: torch.dtype,
    left: dict[str, str],
) -> dict[str, _Held]:
    """Hold the groups that change nothing, those that leave no doubts first."""
    expected: dict[bool, list[Tensor | None] | None] = {False: trial.run()}
    if any(groups):
        expected[True] = trial.attempt(gradients=True)
    held: dict[str, _Held] = {}
    try:
        for doubts, group in sorted(groups.items(), key=lambda each: len(each[0])):
            for name, param in group.items():
                held[name] = _Held.hold(param, places[id(param)], dtype)
            gradients = bool(doubts)
            if not same_bits(trial.attempt(gradients=gradients), expected[gradients]):
                code = ", ".join(sorted(each.co_qualname for each in doubts)) or "forward"
                for name in group:
                    held.pop(name).give_back()
                    left[name] = f"results do not repeat: {code} may mind its dtype"
    except BaseException:
        for each in held.values():
            each.give_back()
        raise
    return held
