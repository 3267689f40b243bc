"""Squared gradients of single losses, which scores of a whole batch must equal."""

import torch
from torch import Tensor

from talos.errors import TalosRuntimeError
from talos.params import Candidates

__all__ = ["REMEDY", "compare", "dtypes_of"]

REMEDY = "leave it out with params= or requires_grad_(False)"

# Of the self-test, by norm: far above rounding, in float32 and where a gradient has 16 bits, and
# far below what a use missed or counted twice makes.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1


def compare(
    selection: Candidates, scores: dict[str, Tensor], losses: list[Tensor], scale: float
) -> None:
    """Refuse scores that differ from the squared gradients of single losses.

    Args:
        selection: what was scored.
        scores: of these losses.
        losses: 0-dim, of a forward whose parameters autograd sees.
        scale: what the losses of the scores were multiplied by, where no gradient is fp16.

    Raises:
        TalosRuntimeError: they differ by more than rounding.
    """
    params = [each.param for each in selection.values()]
    expected = {name: torch.zeros_like(score) for name, score in scores.items()}
    dtypes = dtypes_of(losses[0])
    lift = 1.0 if torch.float16 in dtypes else scale
    for loss in losses:
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(loss * lift, params, retain_graph=True, allow_unused=True)
        for score, grad in zip(expected.values(), grads, strict=True):
            if grad is not None:
                score.addcmul_(grad.float(), grad.float())
    tolerance = _HALF_TOLERANCE if dtypes & {torch.float16, torch.bfloat16} else _TOLERANCE
    # What a loss does not depend on, a bias of keys, has a gradient of rounding errors alone.
    largest = max(float(score.mean()) for score in expected.values() if score.numel())
    for name, each in selection.items():
        rows = slice(*(each.rows or (None,)))
        ours, wanted = scores[name][rows].double(), expected[name][rows].double()
        error, size = float((ours - wanted).norm()), float(wanted.norm())
        noise = tolerance**2 * largest * wanted.numel() ** 0.5
        if not error <= tolerance * size + noise:
            raise TalosRuntimeError(
                f"scores of {name} must equal those of single backwards, got a relative "
                f"difference of {error / max(size, 1e-300):.2g} on {len(losses)} samples: the "
                f"model uses it in a way that is not seen here; {REMEDY}"
            )


def dtypes_of(losses: Tensor) -> set[torch.dtype]:
    """The dtypes that the backward of `losses` goes through, be it by autocast or by the model."""
    nodes, seen, found = [losses.grad_fn], set(), {losses.dtype}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {output.dtype for output in node._input_metadata}
        nodes.extend(following for following, _ in node.next_functions)
    return found
