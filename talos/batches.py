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

    A prompt runs once for all of its answers. Those of a decoder lie behind it in one row; each
    sees the prompt and itself. A decoder that takes no mask of its own, such as a recurrent one,
    gets a row for each answer of several tokens instead. Logits are made only at the positions that
    predict an answer, if the model's `forward` takes `logits_to_keep`.

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
    if not _is_encoder_decoder(bare):
        return _decoder_choices(model, ids, mask, choices)
    answers = choices.flatten(0, 1)  # [B * C, L]
    hidden = bare.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    hidden, seen = (each.repeat_interleave(choices.shape[1], 0) for each in (hidden, mask))
    logits = model(encoder_outputs=(hidden,), attention_mask=seen, labels=answers).logits
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


def _decoder_choices(model: nn.Module, ids: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
    """Return the log-probabilities [B, C] of the answers behind their prompts.

    Args:
        model: a decoder.
        ids: int64 [B, S], the prompts.
        mask: their attention mask.
        choices: int64 [B, C, L], padded with -100.
    """
    shape = choices.shape[:2]
    order = mask.long().argsort(stable=True, dim=1)  # padding goes left: the prompts end together
    ids, seen = ids.gather(1, order), mask.long().gather(1, order)
    counted = choices != IGNORED
    # An answer's last token predicts nothing that counts, so it is no input.
    used = counted[:, :, 1:].flatten(1).any(0)  # [C * (L - 1)]
    if shape[1] > 1 and bool(used.any()) and not _takes_branches(model, ids.shape[1], used):
        ids, seen = (each.repeat_interleave(shape[1], 0) for each in (ids, seen))
        choices = choices.flatten(0, 1)[:, None]  # [B * C, 1, L]
        counted = choices != IGNORED
        used = counted[:, :, 1:].flatten(1).any(0)
    count, longest = choices.shape[1:]
    follows = counted[:, :, 1:].flatten(1)[:, used].long()
    numbers = torch.arange(count * (longest - 1), dtype=torch.int64, device=ids.device)[used]
    branch, depth = numbers // max(longest - 1, 1), numbers % max(longest - 1, 1)
    places = (seen.cumsum(1) - 1).clamp_min(0)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([ids, choices[:, :, :-1].flatten(1)[:, used].clamp_min(0)], 1),
        "attention_mask": torch.cat([seen, follows], 1),
        "position_ids": torch.cat([places, seen.sum(1, keepdim=True) + depth], 1),
    }
    if count > 1 and len(branch):
        dtype = next(model.parameters()).dtype
        inputs["attention_mask"] = _branched(inputs["attention_mask"], branch, dtype)
    last = 1 + len(branch)  # the end of the prompt, and the answers
    options = {"logits_to_keep": last, "use_cache": False}
    taken = inspect.signature(unwrapped(model).forward).parameters
    inputs |= {key: value for key, value in options.items() if key in taken}
    logits: Tensor = model(**inputs).logits[:, -last:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    where = torch.zeros(count, longest, dtype=torch.int64, device=ids.device)  # predicts a token
    where[:, 1:] = used.cumsum(0).view(count, longest - 1)
    rows = torch.arange(len(ids), dtype=torch.int64, device=ids.device)[:, None, None]
    found = logits[rows, where, choices.clamp_min(0)] - logits.logsumexp(2)[:, where]
    return found.masked_fill(~counted, 0).sum(2).view(shape)


def _takes_branches(model: nn.Module, prompt: int, used: Tensor) -> bool:
    """Return whether a decoder of transformers takes a mask for each position, and positions.

    Args:
        model: the decoder.
        prompt: the tokens of a prompt.
        used: whether there is a token at each place behind it.
    """
    bare: Any = unwrapped(model)
    config = getattr(bare, "config", None)
    windows = ("sliding_window", "attention_chunk_size", "window_size")  # they count places in rows
    narrowest = min((getattr(config, name, None) or prompt + len(used)) for name in windows)
    return (
        not getattr(bare, "_is_stateful", True)
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and not getattr(config, "alibi", False)
        and "position_ids" in inspect.signature(bare.forward).parameters
        and prompt + len(used) <= narrowest
    )


def _branched(seen: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores [B, 1, T, T]: 0, or the lowest number.

    Args:
        seen: int64 [B, T], whether there is a token.
        branch: int64 [K], the answer of each of the last K places; the others are the prompt's.
        dtype: of the scores.
    """
    total = seen.shape[1]
    groups = torch.full((total,), -1, dtype=torch.int64, device=seen.device)
    groups[total - len(branch) :] = branch
    visible = (groups == -1) | (groups[:, None] == groups)  # [query, key]
    visible = visible.tril() & (seen != 0)[:, None]
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # a softmax may be float32
    added = torch.zeros(visible.shape, dtype=dtype, device=seen.device)
    return added.masked_fill(~visible, lowest)[:, None]


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
