"""What a batch is: how a model is called on it, and where its labels are."""

import hashlib
import inspect
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from talos.errors import TalosTypeError, TalosValueError
from talos.names import unwrapped

__all__ = [
    "choice_logits",
    "default_logits",
    "digest_of",
    "evaluation_mode",
    "known_length",
    "labels_of",
    "logits_and_positions",
]

LABELS = ("labels", "label")
IGNORED = -100  # a label that does not count, as in torch's cross_entropy


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def default_logits(model: nn.Module, batch: Any) -> Tensor:
    """Call a model on a batch.

    A tensor is the input, and so is the first of a pair. A mapping goes to `forward` by keyword
    without its labels, or whole if `forward` takes one argument only. An encoder-decoder of
    transformers gets its label sequences too: it makes the decoder's inputs from them.

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


def logits_and_positions(model: nn.Module, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Call a model on a batch, and find the positions of a sequence that are not padding.

    Args:
        model: as `default_logits` takes it.
        batch: as `default_logits` takes it.

    Returns:
        Logits [B, C]; or [B, T, V] and, if the batch is a mapping that marks padding, a bool
        [B, T]: where labels of an encoder-decoder are not -100, else where `attention_mask` is 1.

    Example:
        >>> logits_and_positions(nn.Linear(2, 3), torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """
    logits = default_logits(model, batch)
    if logits.dim() != 3 or not isinstance(batch, Mapping):
        return logits
    if _decodes_labels(model, batch):
        counted = batch["labels"] != IGNORED
    elif "decoder_attention_mask" in batch:
        counted = batch["decoder_attention_mask"] != 0
    else:
        mask = batch.get("attention_mask")
        counted = mask != 0 if isinstance(mask, Tensor) else None
    if counted is None or counted.shape != logits.shape[:2] or bool(counted.all()):
        return logits
    return logits, counted.to(logits.device)


def choice_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probability of each answer to choose among: a language model as a classifier.

    Logits are made only at the positions that predict an answer, if the model's `forward` takes
    `logits_to_keep` as the decoders of transformers do.

    Args:
        model: an encoder-decoder or a decoder of transformers.
        batch: `input_ids` and `attention_mask`, int64 [B, S], and `choice_ids`, int64 [B, C, L],
            the tokens of the answers, padded with -100 at their ends.

    Returns:
        [B, C], the sum over an answer's tokens of their log-probabilities.

    Raises:
        TalosTypeError: `model` is no module.
        TalosValueError: a part of the batch is missing or has another shape, or an answer is empty.

    Example:
        >>> import transformers
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> answers = torch.tensor([[[4, -100], [5, 6]]])
        >>> batch = {"input_ids": ids, "attention_mask": ids > 0, "choice_ids": answers}
        >>> choice_logits(model, batch).shape
        torch.Size([1, 2])
    """
    bare: Any = unwrapped(model)
    ids, mask, choices = _checked_choices(batch)
    answers = choices.flatten(0, 1)  # [B * C, L]
    prompts, seen = (each.repeat_interleave(choices.shape[1], 0) for each in (ids, mask))
    if _is_encoder_decoder(bare):
        encoder = bare.get_encoder()  # once a prompt, not once an answer
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden.repeat_interleave(choices.shape[1], 0)
        logits = model(encoder_outputs=(hidden,), attention_mask=seen, labels=answers).logits
    else:
        logits = _decoder_logits(model, prompts, seen, answers)
    losses = functional.cross_entropy(
        logits.transpose(1, 2), answers, ignore_index=IGNORED, reduction="none"
    )
    return -losses.sum(1).view(choices.shape[:2])


def _checked_choices(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's `input_ids`, `attention_mask` and `choice_ids`."""
    missing = [key for key in ("input_ids", "attention_mask", "choice_ids") if key not in batch]
    if missing:
        raise TalosValueError(
            "batch must hold input_ids, attention_mask and choice_ids, but "
            f"{' and '.join(missing)} is missing; tokenise prompts and answers apart"
        )
    ids, mask, choices = batch["input_ids"], batch["attention_mask"], batch["choice_ids"]
    if choices.dim() != 3 or len(choices) != len(ids) or mask.shape != ids.shape:
        raise TalosValueError(
            f"choice_ids must be [B, C, L] and attention_mask [B, S] as input_ids, got "
            f"{list(choices.shape)}, {list(mask.shape)} and {list(ids.shape)}"
        )
    counted = choices != IGNORED
    if not bool(counted.any(-1).all()) or bool((counted[..., 1:] & ~counted[..., :-1]).any()):
        raise TalosValueError(
            "choice_ids must begin with an answer's tokens and be padded with -100 behind them, "
            "got an empty answer or padding before a token"
        )
    return ids, mask, choices


def _decoder_logits(model: nn.Module, prompts: Tensor, seen: Tensor, answers: Tensor) -> Tensor:
    """Return the logits [B * C, L, V] that predict the answers behind their prompts.

    Args:
        model: a decoder.
        prompts: int64 [B * C, S].
        seen: the prompts' attention mask.
        answers: int64 [B * C, L], padded with -100.
    """
    seen = seen.long()
    order = seen.argsort(stable=True, dim=1)  # padding goes left: the prompts end together
    prompts, seen = prompts.gather(1, order), seen.gather(1, order)
    seen = torch.cat([seen, (answers != IGNORED).long()], 1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([prompts, answers.clamp_min(0)], 1),
        "attention_mask": seen,
        "position_ids": (seen.cumsum(1) - 1).clamp_min(0),
    }
    last = answers.shape[1] + 1  # the end of the prompt, and the answer
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        inputs["logits_to_keep"] = last
    logits: Tensor = model(**inputs).logits
    return logits[:, -last:-1]


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch: its key `labels` or `label`, or the second of a pair.

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


def _is_encoder_decoder(bare: nn.Module) -> bool:
    return getattr(getattr(bare, "config", None), "is_encoder_decoder", False) is True


def _decodes_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    return (
        _is_encoder_decoder(unwrapped(model))
        and isinstance(labels, Tensor)
        and labels.dim() > 1
        and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch)
    )


def known_length(batches: Any) -> int | None:
    """Return the number of batches without going through them; None if it is unknown.

    A DataLoader of a stream has a `__len__` that raises, so it is called to find out.

    Example:
        >>> known_length([1, 2]), known_length(iter([1, 2]))
        (2, None)
    """
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def digest_of(batch: Any) -> str:
    """Return a hash of the content of a batch: 16 hex digits.

    Raises:
        TalosTypeError: its content cannot be read: it holds itself, or tensors without strides.

    Example:
        >>> import torch
        >>> digest_of((torch.zeros(2), [1])) == digest_of((torch.zeros(2), [1]))
        True
    """
    try:
        return _hashed(repr(_content(batch)).encode())
    except Exception as error:  # whatever reading a foreign object raises
        kind = type(error).__name__
        raise TalosTypeError(
            "batches must hold dense tensors, arrays, numbers and texts, in lists and dicts, so "
            f"that ranks can compare them, got {type(batch).__name__}, and {kind} when it was "
            "read; make such batches in a collate_fn"
        ) from error


def _content(value: Any) -> object:
    """Return what a batch holds, with hashes in the place of tensors and arrays."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1)
        return (
            str(value.dtype),
            tuple(value.shape),
            _hashed(plain.view(torch.uint8).numpy().tobytes()),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, _hashed(value.tobytes())
    if isinstance(value, Mapping):
        return {str(key): _content(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_content(each) for each in value]
    if hasattr(value, "__dict__"):
        return type(value).__name__, _content(vars(value))
    return _hashed(pickle.dumps(value))


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
