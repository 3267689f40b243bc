"""Squares of per-sample gradients, summed over samples: the diagonal of the Fisher information.

For a linear layer y = x W^T, T rows (tokens) a sample and dY the gradient of its output,

    score[o, i] += share * sum_b ( sum_t dY[b, t, o] X[b, t, i] )^2.

A sample's gradient never reaches memory. The op costs the floating-point operations of the weight
gradient in an ordinary backward, and replaces it. Rows of a batch come as [outer, samples, inner]:
[1, B, T] if samples come first, [T, B, 1] if the sequence does.

Two cheaper functions score vectors (a bias, or a norm's gain with dY = dy * xhat) and tables:

    score[p]    += share * sum_b ( sum_t dY[b, t, p] )^2
    score[v, d] += share * sum_b ( sum_{t: ids[b, t] = v} dY[b, t, d] )^2

Source: TaLoS, arXiv 2504.02620, section 4.1 (the sensitivity of a parameter).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._ops import define
from .errors import TalosTypeError, TalosValueError

__all__ = [
    "fisher_diag_",
    "fisher_diag_embedding_",
    "fisher_diag_reference",
    "fisher_diag_vector_",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fisher_diag_reference(
    scores: Sequence[Tensor], dys: Sequence[Tensor], xs: Sequence[Tensor], share: float
) -> None:
    """Define the op, one sample after another; float64 inputs are multiplied in float64."""
    for score, dy, x in zip(scores, dys, xs, strict=True):
        wide = torch.promote_types(dy.dtype, torch.float32)
        for sample in range(dy.shape[1]):
            rows = dy[:, sample].flatten(0, 1).to(wide)
            inputs = x[:, sample].flatten(0, 1).to(wide)
            score.add_((rows.T @ inputs).square_(), alpha=share)


define(
    "fisher_diag_",
    "(Tensor(a!)[] scores, Tensor[] dys, Tensor[] xs, float share) -> ()",
    fisher_diag_reference,
)


def fisher_diag_(
    scores: Sequence[Tensor], dys: Sequence[Tensor], xs: Sequence[Tensor], *, share: float = 1.0
) -> None:
    """Add the squared per-sample weight gradients of linear layers to their scores, in place.

    One launch serves many layers. Sums over samples have a fixed order, so two calls give the same
    bits. A CPU skips rows of `dys` that are zero, such as padding's, whatever `xs` holds there.
    float32 inputs are multiplied in float32, or in TF32 if `torch.backends.cuda.matmul` permits it.

    Args:
        scores: float32 `[O, I]`, one for each layer; the columns of a row are adjacent.
        dys: gradients of the layers' outputs, `[outer, samples, inner, O]`, floating point; all
            of one dtype and device.
        xs: inputs of the layers, `[outer, samples, inner, I]`, of the same dtype and device.
        share: what the squares are multiplied by.

    Raises:
        TalosValueError: a number of tensors, a shape, a device or a layout does not fit.
        TalosTypeError: a dtype is not supported, or one differs.

    Example:
        >>> score = torch.zeros(2, 1)
        >>> dy = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).view(1, 2, 1, 2)  # 2 samples, 1 token
        >>> fisher_diag_([score], [dy], [torch.ones(1, 2, 1, 1)])
        >>> score.flatten()
        tensor([10.,  4.])
    """
    if not len(scores) == len(dys) == len(xs):
        raise TalosValueError(
            f"scores, dys and xs must be equally long, got {len(scores)}, {len(dys)} and {len(xs)}"
        )
    for i, (score, dy, x) in enumerate(zip(scores, dys, xs, strict=True)):
        _check_score(f"scores[{i}]", score, 2, dy.device)
        for name, tensor, features in (("dys", dy, 0), ("xs", x, 1)):
            _check_rows(f"{name}[{i}]", tensor, score, features)
        if x.shape[:3] != dy.shape[:3]:
            raise TalosValueError(
                f"xs[{i}] must have the rows of dys[{i}], got {list(x.shape)} and {list(dy.shape)}"
            )
        for name, tensor in (("dys", dy), ("xs", x)):
            if tensor.dtype != dys[0].dtype or tensor.device != dys[0].device:
                raise TalosTypeError(
                    f"{name}[{i}] must be {dys[0].dtype} on {dys[0].device} as dys[0] is, got "
                    f"{tensor.dtype} on {tensor.device}; make one call a dtype and device"
                )
    if not dys:
        return
    rows, inputs = [_dense_rows(dy) for dy in dys], [_dense_rows(x) for x in xs]
    with torch.no_grad():
        if dys[0].dtype == torch.float64:  # rare: the definition runs on every device
            fisher_diag_reference(scores, rows, inputs, share)
        else:
            torch.ops.talos.fisher_diag_(scores, rows, inputs, share)
    increment_version(scores)


def fisher_diag_vector_(score: Tensor, dy: Tensor, *, share: float = 1.0) -> None:
    """Add the squared per-sample gradients of a vector added to every row, in place.

    Args:
        score: float32, P entries of any shape.
        dy: floating point `[outer, samples, inner, P]`.
        share: what the squares are multiplied by.

    Raises:
        TalosValueError: a shape or a device does not fit.
        TalosTypeError: a dtype is not supported.

    Example:
        >>> score = torch.zeros(1)
        >>> fisher_diag_vector_(score, torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 1))
        >>> score  # (1 + 2)^2 + (3 + 4)^2
        tensor([58.])
    """
    _check_score("score", score, None, dy.device)
    _check_rows("dy", dy, score.view(-1), 0)
    wide = torch.promote_types(dy.dtype, torch.float32)
    with torch.no_grad():
        sums = dy.sum((0, 2), dtype=wide)  # [samples, P]
        score.add_(sums.square_().sum(0).view_as(score), alpha=share)


def fisher_diag_embedding_(
    score: Tensor, dy: Tensor, ids: Tensor, *, share: float = 1.0, padding_idx: int | None = None
) -> None:
    """Add the squared per-sample gradients of an embedding table to its score, in place.

    Rows are sorted by (id, sample) and summed by segments, so memory grows with the tokens, not
    with the table. Sums have a fixed order.

    Args:
        score: float32 `[V, D]`.
        dy: gradients of the looked-up rows, floating point `[outer, samples, inner, D]`.
        ids: the looked-up rows, integer `[outer, samples, inner]`.
        share: what the squares are multiplied by.
        padding_idx: a row without gradient, as in `torch.nn.functional.embedding`.

    Raises:
        TalosValueError: a shape, a device or an id does not fit.
        TalosTypeError: a dtype is not supported.

    Example:
        >>> score = torch.zeros(3, 1)
        >>> dy = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 1)
        >>> fisher_diag_embedding_(score, dy, torch.tensor([[[0, 0], [0, 2]]]))
        >>> score.flatten()  # (1 + 2)^2 + 3^2 and 4^2
        tensor([18.,  0., 16.])
    """
    _check_score("score", score, 2, dy.device)
    _check_rows("dy", dy, score, 1)
    if ids.shape != dy.shape[:3] or ids.device != dy.device:
        raise TalosValueError(
            f"ids must be {list(dy.shape[:3])} on {dy.device}, got {list(ids.shape)} on "
            f"{ids.device}"
        )
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TalosTypeError(f"ids must be integers, got {ids.dtype}")
    if dy.numel() == 0:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= len(score):
        raise TalosValueError(
            f"ids must lie in 0 to {len(score) - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    wide = torch.promote_types(dy.dtype, torch.float32)
    with torch.no_grad():
        samples = torch.arange(dy.shape[1], device=ids.device, dtype=torch.int64)[:, None]
        keys = (ids.long() * dy.shape[1] + samples).flatten()
        keys, order = keys.sort(stable=True)
        sums, keys = _sum_runs(dy.reshape(-1, dy.shape[3])[order].to(wide), keys)
        squares, rows = _sum_runs(sums.square_(), keys // dy.shape[1])
        if padding_idx is not None:
            squares[rows == padding_idx % len(score)] = 0
        score[rows] += share * squares.to(score.dtype)  # no row comes twice


def _sum_runs(values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows of `values` [n, D] over each run of equal `keys` [n]; return the keys, too."""
    runs, lengths = keys.unique_consecutive(return_counts=True)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0), runs


def _dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor with adjacent features in a row, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _check_score(name: str, score: Tensor, dims: int | None, device: torch.device) -> None:
    if score.dtype != torch.float32:
        raise TalosTypeError(f"{name} must be float32, got {score.dtype}")
    if dims is not None and score.dim() != dims:
        raise TalosValueError(f"{name} must have {dims} dimensions, got {list(score.shape)}")
    rows = score.stride(-1) == 1 or score.shape[-1] <= 1 if score.dim() else True
    if score.dim() == 2 and len(score) > 1 and score.stride(0) < score.shape[1]:
        rows = False  # rows that share memory
    if not rows or (dims is None and not score.is_contiguous()):
        raise TalosValueError(
            f"{name} must have the columns of a row next to each other, got strides "
            f"{score.stride()}"
        )
    if score.device != device:
        raise TalosValueError(f"{name} must be on {device}, got {score.device}")


def _check_rows(name: str, rows: Tensor, score: Tensor, features: int) -> None:
    if rows.dtype not in _DTYPES:
        raise TalosTypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {rows.dtype}"
        )
    if rows.dim() != 4 or rows.shape[3] != score.shape[features]:
        raise TalosValueError(
            f"{name} must be [outer, samples, inner, {score.shape[features]}], got "
            f"{list(rows.shape)}"
        )
