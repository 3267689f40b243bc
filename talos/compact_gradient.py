"""A gradient of which only the selected entries are kept, and which torch takes for a dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from talos_kernels import Index, gather_grad_, scatter_

from .errors import TalosTypeError

__all__ = ["CompactGradient"]

aten = torch.ops.aten

# On these the entries stand for the whole gradient: zeros stay zeros and add nothing to a norm.
_ON_ENTRIES = {
    aten.zero_.default,
    aten.mul_.Scalar,
    aten.div_.Scalar,
    aten.neg_.default,
    aten.linalg_vector_norm.default,
    aten.norm.Scalar,
    aten._foreach_zero_.default,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.ScalarList,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.ScalarList,
    aten._foreach_div_.Tensor,
    aten._foreach_neg_.default,
    aten._foreach_norm.Scalar,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}
# Of the other operand of these the selected entries count; the others are never trained.
_WITH_OPERAND = {
    aten.add_.Tensor,
    aten.sub_.Tensor,
    aten.mul_.Tensor,
    aten.div_.Tensor,
    aten.copy_.default,
}


class CompactGradient(Tensor):
    """A parameter's gradient that holds its selected entries only; all others count as zero.

    It has the shape, dtype and device of its parameter, so that it can be `param.grad`, and no
    memory of its own beside `entries`. A dense gradient that is added to it is gathered; norms,
    scaling and GradScaler's check work on the entries. Any other operation gets the dense gradient,
    made for it; one that would change that in place, or view it, is refused.

    Attributes:
        entries: float32 `[nnz]`, the selected ones in rank order.
        selection: which those are, of one tensor.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> index = Index.pack([TensorIndex.encode(torch.eye(2) > 0)])
        >>> weight.grad = CompactGradient.of(weight, index, torch.zeros(2))
        >>> (weight * torch.tensor([[3.0, 1.0], [1.0, 4.0]])).sum().backward()
        >>> weight.grad.entries
        tensor([3., 4.])
        >>> torch.nn.utils.clip_grad_norm_(weight, 10.0)
        tensor(5.)
        >>> weight.grad.to_dense()
        tensor([[3., 0.],
                [0., 4.]])
    """

    entries: Tensor
    selection: Index

    @classmethod
    def of(cls, param: Tensor, selection: Index, entries: Tensor) -> CompactGradient:
        """The gradient of a parameter.

        Args:
            param: the parameter.
            selection: its selected entries, of one tensor.
            entries: float32 `[nnz]`, the gradient there, in rank order; kept, not copied.
        """
        made: CompactGradient = Tensor._make_wrapper_subclass(
            cls, param.shape, dtype=param.dtype, device=param.device
        )
        made.entries, made.selection = entries, selection
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Its size: printing the entries would make it dense."""
        return f"CompactGradient({self.entries.numel()} of {self.numel()} entries, {self.dtype})"

    def to_dense(self, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        """The dense gradient, with zeros where nothing is selected."""
        dense = torch.zeros(self.shape, device=self.device)
        scatter_([dense], self.selection, self.entries)
        return dense.to(dtype or self.dtype)

    def gathered(self, dense: Tensor) -> Tensor:
        """The selected entries of a tensor of this shape: float32 `[nnz]`."""
        out = torch.empty_like(self.entries)
        gather_grad_(out, [dense], self.selection)
        return out

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        """Runs an operation on the entries where that is the same, else on the dense gradient."""
        return _dispatch(*args, **kwargs)


def _dispatch(
    func: Any,
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    kwargs = kwargs or {}
    first = args[0]
    if func in (aten.detach.default, aten.alias.default):
        return CompactGradient.of(first, first.selection, first.entries)
    if func is aten.clone.default:
        return CompactGradient.of(first, first.selection, first.entries.clone())
    written = _written(func, args, kwargs)
    if func in _WITH_OPERAND and isinstance(first, CompactGradient):
        if func is aten.add_.Tensor and _is_plain(args[1], first) and not kwargs:
            # what autograd does with every further gradient
            gather_grad_(first.entries, [args[1]], first.selection, accumulate=True)
        else:
            func(first.entries, *(_operand(first, each) for each in args[1:]), **kwargs)
            increment_version(first.entries)
        return first
    whole = func is not aten.linalg_vector_norm.default or len(args) < 3 or args[2] is None
    if func in _ON_ENTRIES and whole:
        found = func(*map(_entries, args), **kwargs)
        if written:
            increment_version([each.entries for each in written])
        return first if isinstance(first, CompactGradient) and found is first.entries else found
    view = any(each.alias_info is not None for each in func._schema.returns)
    if written or (view and not _writes(func)):
        raise TalosTypeError(
            f"a compact gradient must not be changed or viewed by {func}: it holds its "
            "selected entries only; read grad.to_dense(), write grad.entries, or call "
            "optimizer.compact_gradients(False)"
        )
    return func(*map(_dense, args), **{name: _dense(each) for name, each in kwargs.items()})


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[CompactGradient]:
    """The compact gradients that an operation would write."""
    if not _writes(func):
        return []
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else [value]
        found += [each for each in values if isinstance(each, CompactGradient)]
    return found


def _is_plain(other: object, like: Tensor) -> bool:
    return (
        isinstance(other, Tensor)
        and not isinstance(other, CompactGradient)
        and other.shape == like.shape
        and other.layout == torch.strided
    )


def _operand(gradient: CompactGradient, other: Any) -> Any:
    """What an elementwise operation on the entries takes for an operand of the dense one."""
    if isinstance(other, CompactGradient):
        if other.selection is gradient.selection:
            return other.entries
        other = other.to_dense()
    if isinstance(other, Tensor) and other.dim() > 0:
        return gradient.gathered(other.expand(gradient.shape))
    return other


def _entries(arg: Any) -> Any:
    if isinstance(arg, CompactGradient):
        return arg.entries
    return [_entries(each) for each in arg] if isinstance(arg, list | tuple) else arg


def _dense(arg: Any) -> Any:
    if isinstance(arg, CompactGradient):
        return arg.to_dense()
    return [_dense(each) for each in arg] if isinstance(arg, list | tuple) else arg
