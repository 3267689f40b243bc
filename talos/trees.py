"""Nested mappings and sequences of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

__all__ = ["tensors_in"]


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples.

    Args:
        tree: any; what is none of these holds no tensor.

    Yields:
        Each, in order.

    Example:
        >>> import torch
        >>> [each.numel() for each in tensors_in({"a": [torch.zeros(2)], "b": (3, torch.ones(1))})]
        [2, 1]
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from tensors_in(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from tensors_in(each)
