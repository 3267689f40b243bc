"""What a batch is: how a model is called on it, and where its labels are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import TalosTypeError, TalosValueError
from .params import unwrapped

__all__ = ["default_logits", "labels_of"]

LABELS = ("labels", "label")


def default_logits(model: nn.Module, batch: Any) -> Tensor:
    """Call a model on a batch.

    A tensor is the input; of a pair the first is. A mapping goes to `forward` by keyword, without
    its labels, or whole where `forward` takes one argument only. An encoder-decoder of transformers
    gets its label sequences too, for it makes the decoder's inputs of them.

    Args:
        model: returns logits, or an object with `.logits` (transformers).
        batch: a tensor, a pair (inputs, labels), or a mapping.

    Returns:
        `[B, C]` or `[B, T, V]`, floating point.

    Raises:
        TalosTypeError: the model returned neither; pass a `logits_fn`.

    Example:
        >>> import torch
        >>> default_logits(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4))).shape
        torch.Size([4, 3])
    """
    if isinstance(batch, Mapping):
        output = _call_with_mapping(model, batch)
    elif isinstance(batch, tuple | list):
        if len(batch) > 2:
            raise TalosTypeError(
                "batch must be a tensor, a pair (inputs, labels) or a mapping, got "
                f"{len(batch)} parts; pass logits_fn=lambda model, batch: model(*batch[:-1])"
            )
        output = model(batch[0])
    else:
        output = model(batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise TalosTypeError(
            f"model must return logits [B, C] or [B, T, V], got {type(output).__name__}"
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else ''}; "
            "pass logits_fn=lambda model, batch: ..."
        )
    return logits


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: its key `labels`, or the second of a pair.

    Raises:
        TalosValueError: the batch has no labels.
    """
    if isinstance(batch, Mapping):
        for key in LABELS:
            if key in batch:
                labels: Tensor = batch[key]
                return labels
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        second: Tensor = batch[1]
        return second
    raise TalosValueError(
        f"batch must be a mapping with 'labels' or a pair (inputs, labels), got "
        f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}; pass loss_fn"
    )


def _call_with_mapping(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    parameters = list(inspect.signature(unwrapped(model).forward).parameters.values())
    whole = len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_KEYWORD
    if whole and parameters[0].name not in batch:
        return model(batch)
    inputs = {key: value for key, value in batch.items() if key not in LABELS}
    if _decodes_labels(model, batch):
        inputs["labels"] = batch["labels"].contiguous()  # their loss takes a view of them
    return model(**inputs)


def _decodes_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    config = getattr(unwrapped(model), "config", None)
    labels = batch.get("labels")
    return (
        getattr(config, "is_encoder_decoder", False) is True
        and isinstance(labels, Tensor)
        and labels.dim() > 1
        and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch)
    )
