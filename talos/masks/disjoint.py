"""Disjoint selections for several tasks: no entry belongs to two of them.

- From scores, a draft: the tasks take turns, and each takes its lowest free entries, as many as one
  turn has. Turns of one entry are the plain round robin. It is a chain of decisions, each of which
  depends on all before, so larger turns trade its order for speed: nothing loops over entries.
- From selections alone, the entries of one tensor after the other: what several tasks select is
  dealt to them by turns. Each set of tasks has turns of its own, so that each of them gets the same
  share of what exactly they select, to within one entry.
"""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.masks.lowest import lowest_entries
from talos.tensors import true_places
from talos_kernels import TensorIndex

__all__ = ["check_shapes", "deal", "draft"]

Indices = Mapping[str, TensorIndex]
TURNS = 1024  # turns of the task with the smallest budget: a thousandth of it a turn
_MOST_TASKS = 62  # a set of tasks is one int64


def draft(
    scores: Mapping[str, tuple[Mapping[str, Tensor], int]], density: float, turn: int | None
) -> dict[str, dict[str, TensorIndex]]:
    """Let the tasks take their lowest-scored free entries by turns.

    Args:
        scores: of each task, as `marked_scores` returns them. Equal scores are taken in (tensor,
            position) order.
        density: the share of its entries that each task gets.
        turn: how many entries a task takes at its turn; None: a 1024th of the smallest budget.

    Returns:
        The selections, by task and tensor.

    Raises:
        TalosValueError: a task gets no entry, or all together want more than one of them scores.
    """
    budgets = {task: round(density * entries) for task, (_, entries) in scores.items()}
    wanted, offered = sum(budgets.values()), min(entries for _, entries in scores.values())
    if wanted > offered or not all(budgets.values()):
        raise TalosValueError(
            f"density must give {len(budgets)} tasks at least one entry each and together at most "
            f"{offered}, got {density}, which gives {wanted}"
        )
    numels: dict[str, int] = {}
    for each, _ in scores.values():
        numels.update({name: score.numel() for name, score in each.items()})
    first = dict(zip(numels, accumulate(numels.values(), initial=0), strict=False))
    size = max(1, min(budgets.values()) // TURNS) if turn is None else turn
    orders = {task: _lowest_first(each, first, wanted) for task, (each, _) in scores.items()}
    owners = torch.zeros(sum(numels.values()), dtype=torch.int16, device="cpu")  # 0: free
    left, place = dict(budgets), dict.fromkeys(scores, 0)
    while any(left.values()):
        for number, (task, order) in enumerate(orders.items(), 1):
            want = min(size, left[task])
            left[task] -= want
            while want:
                ahead = order[place[task] : place[task] + 4 * size]
                places = true_places(owners[ahead] == 0)[:want]
                owners[ahead[places]] = number
                want -= len(places)
                place[task] += len(ahead) if want else int(places[-1]) + 1
    return {
        task: {
            name: TensorIndex.encode(owners[first[name] : first[name] + numels[name]] == number)
            for name in each
        }
        for number, (task, (each, _)) in enumerate(scores.items(), 1)
    }


def deal(masks: Mapping[str, Indices]) -> dict[str, dict[str, TensorIndex]]:
    """Deal what several tasks select to them by turns.

    Args:
        masks: the selections, by task and tensor.

    Returns:
        The same without shared entries.

    Raises:
        TalosValueError: there are more than 62 tasks.
    """
    if len(masks) > _MOST_TASKS:
        raise TalosValueError(f"tasks must be at most {_MOST_TASKS}, got {len(masks)}")
    dealt: dict[str, dict[str, TensorIndex]] = {task: {} for task in masks}
    turns: dict[int, int] = {}
    for name in dict.fromkeys(name for each in masks.values() for name in each):
        own = {task: each[name].decode() for task, each in masks.items() if name in each}
        count = torch.stack(list(own.values())).sum(0, dtype=torch.uint8)
        shared = true_places(count > 1)
        claims = torch.zeros(len(shared), dtype=torch.int64, device="cpu")
        for number, task in enumerate(masks):
            if task in own:
                claims |= own[task][shared].long() << number
        owners = torch.empty_like(claims)
        for claim in claims.unique().tolist():
            numbers = [number for number in range(len(masks)) if claim >> number & 1]
            places = true_places(claims == claim)
            since = turns.get(claim, 0)
            turns[claim] = since + len(places)
            turn = torch.arange(since, turns[claim], dtype=torch.int64, device="cpu")
            whose = torch.tensor(numbers, dtype=torch.int64, device="cpu")
            owners[places] = whose[turn % len(numbers)]
        for number, task in enumerate(masks):
            if task in own:
                own[task][shared] &= owners == number
                dealt[task][name] = TensorIndex.encode(own[task])
    return dealt


def check_shapes(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse tasks that differ in the shape of a tensor."""
    known: dict[str, tuple[int, ...]] = {}
    for each in shapes.values():
        for name, shape in each.items():
            if known.setdefault(name, shape) != shape:
                raise TalosValueError(
                    f"tasks must agree on the shape of {name}, got {known[name]} and {shape}"
                )


def _lowest_first(scores: Mapping[str, Tensor], first: Mapping[str, int], count: int) -> Tensor:
    """Return the flat numbers of the `count` lowest-scored entries of all, lowest first."""
    names = sorted(scores, key=lambda name: first[name])  # one order of ties for all tasks
    chosen = lowest_entries({name: scores[name] for name in names}, count)
    places = {name: true_places(chosen[name].cpu().flatten()) for name in names}
    values = torch.cat([scores[name].detach().cpu().flatten()[places[name]] for name in names])
    numbers = torch.cat([places[name] + first[name] for name in names])
    if values.dtype == torch.float64 or int(numbers[-1]) >= 2**31:
        return numbers[values.argsort(stable=True)]
    # Integers are sorted faster. Bits of a float that is not negative have its order.
    keys = values.float().abs_().view(torch.int32).long() << 32 | numbers
    keys.numpy().sort()
    return keys & 0xFFFFFFFF
