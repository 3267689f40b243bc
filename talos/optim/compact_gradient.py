"""A gradient that stores its selected entries only and that torch accepts as a dense one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from talos.errors import TalosTypeError
from talos_kernels import Index, gather_grad_, scatter_

__all__ = ["CompactGradient"]

aten = torch.ops.aten
_data: Any = Tensor.data
_SET_DATA = _data.__set__

# These work on the entries alone: zeros stay zeros and add nothing to a norm.
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
# Elementwise, though torch does not tag them so.
_POINTWISE = {
    aten.abs_.default,
    aten.copy_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
    aten.threshold_.default,
}


class CompactGradient(Tensor):
    """A parameter's gradient that holds its selected entries only; all others count as zero.

    It has the shape, dtype and device of its parameter, so that it can be `param.grad`, but no
    memory besides `entries`. A dense gradient added to it is gathered. Norms, scaling, clipping,
    GradScaler's check and other elementwise operations that keep zeros work on the entries; other
    operands count at the selected entries only. Every other reader gets a dense copy, whose views
    are read-only. Every other writer is refused.

    Attributes:
        entries: float32 `[nnz]`, float64 for float64 weights; the selected ones in rank order.
        selection: the index of one tensor that selects them.

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
    def of(cls, param: Tensor, selection: Index, entries: Tensor) -> "CompactGradient":
        """Make the gradient of a parameter.

        Args:
            param: the parameter.
            selection: its selected entries, of one tensor.
            entries: float32 `[nnz]`, the gradient there, in rank order; kept, not copied.
        """
        made: CompactGradient = Tensor._make_wrapper_subclass(
            cls, param.shape, param.stride(), dtype=param.dtype, device=param.device
        )
        made.entries, made.selection = entries, selection
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Show the size; printing the entries would make it dense."""
        return f"CompactGradient({self.entries.numel()} of {self.numel()} entries, {self.dtype})"

    def to_dense(self, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        """Return the dense gradient, zero where nothing is selected."""
        dense = torch.zeros(self.shape, dtype=self.entries.dtype, device=self.device)
        scatter_([dense], self.selection, self.entries)
        return dense.to(dtype or self.dtype)

    def gathered(self, dense: Tensor) -> Tensor:
        """Return the selected entries of a tensor of this shape: `[nnz]`, floats as `entries`."""
        if not dense.is_floating_point():
            (part,) = self.selection.unpack()
            return dense.reshape(-1)[part.positions_int64().to(dense.device)]
        out = torch.empty_like(self.entries)
        gather_grad_(out, [dense], self.selection)
        return out

    def numpy(self, *, force: bool = False) -> Any:
        """Return the dense gradient as a read-only array."""
        array = self.to_dense().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the dense gradient to NumPy's functions."""
        return self.numpy(force=True).__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """Return the dense gradient as nested lists."""
        return self.to_dense().tolist()

    def __setitem__(self, where: Any, value: Any) -> None:
        """Assign selected entries; refuse values that other entries would have to hold."""
        dense = self.to_dense(self.entries.dtype)
        dense[where] = _dense(value)
        written = self.gathered(dense)
        scatter_([dense], self.selection, torch.zeros_like(written))
        if dense.count_nonzero():
            raise _refusal("assigning other items than its entries")
        self.entries.copy_(written)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the dense gradient, which every reader understands."""
        return self.to_dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        """Give a read-only dense gradient to functions that return views."""
        kwargs = kwargs or {}
        if func == _SET_DATA and isinstance(args[0], CompactGradient):
            return args[0].copy_(args[1])
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except _ViewError:
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):
                raise
        read = [_dense(each, read_only=True) for each in args]
        return func(*read, **{key: _dense(each, read_only=True) for key, each in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        """Run an operation on the entries where the result is the same, else on a dense copy."""
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
    if func is aten.add_.Tensor and not kwargs and _is_plain(args[1], first):
        # what autograd does with every further gradient
        gather_grad_(first.entries, [args[1]], first.selection, accumulate=True)
        return first
    written = _written(func, args, kwargs)
    whole = func is not aten.linalg_vector_norm.default or len(args) < 3 or args[2] is None
    if func in _ON_ENTRIES and whole:
        found = func(*map(_entries, args), **kwargs)
        if written:
            increment_version([each.entries for each in written])
        return first if isinstance(first, CompactGradient) and found is first.entries else found
    if written and _write_entries(func, args, kwargs):
        increment_version([each.entries for each in written])
        return None if isinstance(first, list | tuple) else written[0]
    if written:
        raise _refusal(str(func))
    if not _writes(func) and any(each.alias_info is not None for each in func._schema.returns):
        raise _refusal(f"a view, {func}", _ViewError)
    return func(*map(_dense, args), **{name: _dense(each) for name, each in kwargs.items()})


class _ViewError(TalosTypeError):
    """A view was asked of a gradient that has no dense memory."""


def _refusal(what: str, kind: type[TalosTypeError] = TalosTypeError) -> TalosTypeError:
    return kind(
        f"a compact gradient must not be changed by {what}: it holds its selected entries only; "
        "write grad.entries, or call optimizer.compact_gradients(False)"
    )


def _write_entries(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Run an in-place operation on the entries; return False where the result would differ.

    It is the same for elementwise operations that keep zeros or take another operand, whose
    selected entries count.
    """
    name = func._schema.name.removeprefix("aten::")
    foreach = name.startswith("_foreach_")
    out = kwargs.get("out")
    if not (name.endswith("_") or isinstance(out, CompactGradient)) or not (
        foreach or func in _POINTWISE or torch.Tag.pointwise in func.tags
    ):
        return False
    first, *rest = args
    gradients = list(first) if foreach else [first if out is None else out]
    others = {key: each for key, each in kwargs.items() if key != "out"}
    operands = [*rest, *others.values()]
    if not (foreach or isinstance(first, CompactGradient)):
        operands.append(first)
    known = func in (aten.mul_.Tensor, aten.div_.Tensor)  # 0 times infinity is left out
    if not known and not any(_has_entries(each) for each in operands):
        zeros = [torch.zeros(1, dtype=torch.float32, device=each.device) for each in gradients]
        target = {} if out is None else {"out": zeros[0]}
        func(zeros if foreach else zeros[0], *rest, **others, **target)
        if any(bool(each != 0) for each in zeros):
            return False

    def of(operand: Any) -> Any:
        if foreach and isinstance(operand, list | tuple):
            return [_operand(*pair) for pair in zip(gradients, operand, strict=True)]
        return _operand(gradients[0], operand)

    entries = [_entries(each) for each in gradients]
    values = {key: of(each) for key, each in others.items()}
    if out is None:
        func(entries if foreach else entries[0], *map(of, rest), **values)
    else:
        func(*map(of, args), **values, out=entries[0])
    return True


def _has_entries(operand: Any) -> bool:
    if isinstance(operand, list | tuple):
        return any(map(_has_entries, operand))
    return isinstance(operand, Tensor) and operand.dim() > 0


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[CompactGradient]:
    """Return the compact gradients that an operation would write."""
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


def _operand(gradient: Tensor, other: Any) -> Any:
    """Return an operand for the entries that stands for one of the dense gradient."""
    if not isinstance(gradient, CompactGradient):
        return _dense(other)
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


def _dense(arg: Any, *, read_only: bool = False) -> Any:
    if isinstance(arg, CompactGradient):
        dense = arg.to_dense()
        if not read_only:
            return dense
        with torch.inference_mode():  # tensors made here are read-only outside
            return dense.clone()
    if isinstance(arg, list | tuple):
        return type(arg)([_dense(each, read_only=read_only) for each in arg])
    return arg
