"""Which weights autocast does nothing with but cast: found by watching a forward.

Under `torch.autocast` a matrix product casts its fp32 operands. A weight that is an operand of
matrix products and of nothing else can be held in autocast's dtype: the cast of a constant is a
constant. What a model does with its weights is in its code, not in the types of its modules, so a
`torch.overrides.TorchFunctionMode` watches every function of torch that a parameter reaches.

Two things leave doubts. Code may read `weight.dtype`: T5 casts an MLP's hidden states to it, which
changes nothing, open_clip the residual stream of its text tower, which does. And a product without
a history may stand in the forward of an `autograd.Function`, whose backward, which is not watched,
may use the weight as it pleases. `Watch` notes the code; whether it minds is for a `Trial` to say.
"""

import inspect
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from talos.errors import TalosRuntimeError, TalosTypeError
from talos.tensors import KeptBuffers, equal_bits, tensors_in

__all__ = ["Trial", "Watch", "same_bits"]

_PRODUCTS = {
    functional.linear,
    *(getattr(torch, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("mm", "bmm", "matmul")),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("addmm", "baddbmm")),
    *(Tensor.__matmul__, Tensor.__rmatmul__),
}
"""What autocast runs in its own dtype on every device, each floating-point argument cast."""

_ATTENTION_PRODUCTS = {
    *("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"),
    *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_ATTENTION = inspect.signature(functional.multi_head_attention_forward)

_SAYS_NO_DTYPE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "layout", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad", "grad_fn")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "is_sparse", "is_quantized")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    Tensor.is_contiguous,
}
_SAYS_DTYPE = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "itemsize")),
    Tensor.element_size,
}


class Watch(TorchFunctionMode):
    """Notes what becomes of parameters while it is active.

    Args:
        params: to watch.
        dtype: autocast's.

    Attributes:
        used: the ids of those that a matrix product took under autocast.
        others: by id, the name of a function that did something else with the parameter.
        doubts: by id, the code that asked for the parameter's dtype or multiplied by it without a
            history.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        super().__init__()
        self._ids = {id(param) for param in params.values()}
        self._dtype = dtype
        self.used: set[int] = set()
        self.others: dict[int, str] = {}
        self.doubts: dict[int, set[CodeType]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Notes the parameters among the arguments, then calls the function."""
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) not in self._ids or func in _SAYS_NO_DTYPE:
                continue
            product = self._is_product(func, tensor, args, kwargs)
            if func in _SAYS_DTYPE or (product and not torch.is_grad_enabled()):
                self.doubts.setdefault(id(tensor), set()).add(sys._getframe(1).f_code)
            if product:
                self.used.add(id(tensor))
            elif func not in _SAYS_DTYPE:
                self.others[id(tensor)] = getattr(func, "__name__", str(func))
        return func(*args, **kwargs)

    def _is_product(
        self, func: Callable[..., Any], tensor: Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        device = tensor.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != self._dtype:
            return False
        if func is functional.multi_head_attention_forward:
            named = _ATTENTION.bind(*args, **kwargs).arguments
            return {name for name, each in named.items() if each is tensor} <= _ATTENTION_PRODUCTS
        return func in _PRODUCTS


class Trial:
    """A forward that can be run again under the same conditions, to compare what it computes.

    Args:
        model: what `forward` runs; its buffers are put back after each run.
        forward: returns tensors, nested or not.
        dtype: autocast's.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Any], dtype: torch.dtype) -> None:
        self._forward = forward
        self._dtype = dtype
        self._devices = {param.device for param in model.parameters()}
        self._trained = [param for param in model.parameters() if param.requires_grad]
        self._buffers = KeptBuffers(model)

    def run(
        self, watch: AbstractContextManager[Any] | None = None, *, gradients: bool = False
    ) -> list[Tensor | None]:
        """Run the forward once.

        Args:
            watch: what is active meanwhile.
            gradients: whether to run the backward too.

        Returns:
            The outputs; with `gradients`, also those of the trained parameters, of a weighted sum
            of the outputs. The parameters' own `.grad` is not touched.

        Raises:
            TalosTypeError: the forward returns no tensor.
            TalosRuntimeError: gradients are asked for and none reaches a trained parameter.
        """
        gpus = [device for device in self._devices if device.type == "cuda"]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            stack.callback(random.setstate, random.getstate())
            stack.enter_context(torch.enable_grad())
            if "torch._dynamo" in sys.modules:  # compiled code would not be seen
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                with ExitStack() as around:  # not around the backward, as in training
                    for kind in {device.type for device in self._devices}:
                        around.enter_context(torch.autocast(kind, self._dtype))
                    around.enter_context(watch or nullcontext())
                    outputs = list(tensors_in(self._forward()))
                found: list[Tensor | None] = [output.detach() for output in outputs]
                if gradients:
                    found += self._gradients([each for each in outputs if each.requires_grad])
            finally:
                self._buffers.restore()
        if not outputs:
            raise TalosTypeError("forward must return tensors, got none; return the loss")
        return found

    def _gradients(self, outputs: list[Tensor]) -> Sequence[Tensor | None]:
        if not outputs:
            return []
        weights = [
            torch.linspace(1, 2, each.numel(), device=each.device, dtype=torch.float32)
            .to(each.dtype)
            .view_as(each)
            for each in outputs
        ]
        grads: Sequence[Tensor | None] = [None]
        if self._trained:
            grads = torch.autograd.grad(outputs, self._trained, weights, allow_unused=True)
        if all(grad is None for grad in grads):  # a reentrant checkpoint hides what is in it
            raise TalosRuntimeError("no gradient reaches a trained parameter")
        return grads

    def attempt(self, *, gradients: bool) -> list[Tensor | None] | None:
        """Run the forward once.

        Args:
            gradients: as of `run`.

        Returns:
            What `run` does, None where the forward or backward fails.
        """
        try:
            return self.run(gradients=gradients)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None


def same_bits(a: Sequence[Tensor | None] | None, b: Sequence[Tensor | None] | None) -> bool:
    """Whether two runs succeeded and returned the same bits."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(map(_same_bits, a, b))


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return equal_bits(a, b)
