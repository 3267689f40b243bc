"""Classification tasks in three splits, and the batches of texts."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from talos.app.tasks.splits import SPLITS
from talos.errors import TalosValueError


class Tokenizer(Protocol):
    """What `Task.batches` needs of a tokenizer; those of transformers have it."""

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills rows up to the longest of a batch."""

    def __call__(self, text: list[str], *, padding: bool, truncation: bool, max_length: int) -> Any:
        """Returns a mapping whose `input_ids` are one list of ids per text."""


@dataclass(frozen=True)
class Example:
    """A text with its class.

    Attributes:
        text: The text.
        label: Index into the task's `class_names`.
        origin: Where the text comes from, for example a file of the standard library.
    """

    text: str
    label: int
    origin: str = ""


E = TypeVar("E")


@dataclass(frozen=True)
class LabelledSplits(Generic[E]):
    """A classification task: examples in three splits that share none.

    Attributes:
        reads: What the examples are.
        name: Name, as `load_task` knows it.
        description: What is to be told from what, and how the splits are kept apart.
        class_names: One short name per class.
        class_texts: One text per class, from whose embeddings a zero-shot head is made.
        train: Examples to fine-tune and calibrate on.
        validation: Examples to choose scaling coefficients with.
        test: Examples to report.
    """

    name: str
    description: str
    class_names: tuple[str, ...]
    class_texts: tuple[str, ...]
    train: list[E] = field(repr=False)
    validation: list[E] = field(repr=False)
    test: list[E] = field(repr=False)

    reads: ClassVar[Literal["texts", "images"]]

    def examples(self, split: str) -> list[E]:
        """Returns the examples of "train", "validation" or "test".

        Args:
            split: Name of the split.

        Returns:
            The split's own list.

        Raises:
            TalosValueError: There is no such split.
        """
        if split not in SPLITS:
            raise TalosValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        found: list[E] = getattr(self, split)
        return found


@dataclass(frozen=True)
class Task(LabelledSplits[Example]):
    """A text classification task with three splits that share no text; see `LabelledSplits`."""

    reads = "texts"
    # Token ids by split, length and tokenizer, which is kept so that its id stays its own.
    _tokens: dict[tuple[str, int, int], tuple[Tokenizer, list[list[int]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def batches(
        self,
        split: str,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        max_length: int = 48,
        seed: int | None = None,
        epoch: int = 0,
    ) -> "Batches":
        """Returns the split's batches, which can be iterated as often as one likes.

        The texts are tokenised at the first call with a tokenizer and length, and kept.

        Args:
            split: "train", "validation" or "test".
            tokenizer: Turns texts into token ids.
            batch_size: Examples per batch; the last batch holds what is left.
            max_length: Most tokens per text, the special ones included; the rest is cut off.
            seed: Shuffles the examples; None keeps their order.
            epoch: Shuffles in another order for the same seed; see `Batches.set_epoch`.

        Returns:
            The batches.

        Raises:
            TalosValueError: There is no such split, `batch_size` is below 1, `max_length` is below
                3, or the tokenizer has no token for padding.

        Example:
            >>> task = Task("t", "", ("a", "b"), ("a", "b"), [Example("x y z", 1)], [], [])
            >>> class Words:
            ...     pad_token_id = 0
            ...     def __call__(self, text, *, padding, truncation, max_length):
            ...         return {"input_ids": [[len(w) for w in t.split()] for t in text]}
            >>> next(iter(task.batches("train", Words())))["input_ids"]
            tensor([[1, 1, 1]])
        """
        examples = self.examples(split)
        if batch_size < 1:
            raise TalosValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_length < 3:
            raise TalosValueError(
                f"max_length must be at least 3, got {max_length}; two tokens only mark start "
                "and end"
            )
        if tokenizer.pad_token_id is None:
            raise TalosValueError(
                "tokenizer must have a token for padding, got pad_token_id None; set its pad_token"
            )
        key = (split, max_length, id(tokenizer))
        if key not in self._tokens:
            texts = [example.text for example in examples]
            encoded = (
                tokenizer(texts, padding=False, truncation=True, max_length=max_length)["input_ids"]
                if texts
                else []
            )
            self._tokens[key] = (tokenizer, encoded)
        return Batches(
            self._tokens[key][1],
            [example.label for example in examples],
            batch_size=batch_size,
            pad_token_id=tokenizer.pad_token_id,
            seed=seed,
            epoch=epoch,
        )


class Batches:
    """Batches of tokenised texts: the same ones in the same order each time they are iterated.

    Each is a dict of int64 tensors: `input_ids` [B, T], `attention_mask` [B, T] (1 for tokens, 0
    for padding, T the longest text of the batch) and `labels` [B].

    Args:
        token_ids: One list of token ids per text.
        labels: One label per text.
        batch_size: Texts per batch.
        pad_token_id: Fills rows up to the longest.
        seed: Shuffles; None keeps the order.
        epoch: Together with the seed decides the order.
    """

    def __init__(
        self,
        token_ids: Sequence[Sequence[int]],
        labels: Sequence[int],
        *,
        batch_size: int,
        pad_token_id: int,
        seed: int | None = None,
        epoch: int = 0,
    ) -> None:
        self.token_ids = token_ids
        self.labels = labels
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iterations; without a seed it stays the same.

        Args:
            epoch: Number of the epoch.
        """
        self.epoch = epoch

    def shortest_first(self, stride: int = 1) -> "Batches":
        """Returns batches of texts of like length, which need little padding.

        Args:
            stride: Only every so many-th text is taken, of all lengths.

        Returns:
            The batches, shortest text first, whatever the seed.
        """
        order = sorted(range(len(self.labels)), key=lambda i: len(self.token_ids[i]))
        return self._of(order[::stride])

    def first(self, count: int) -> "Batches":
        """Returns batches of the texts that come first in the order of this epoch.

        Args:
            count: How many texts.

        Returns:
            The batches, in that order, whatever the seed.
        """
        return self._of(ordered(len(self.labels), self.seed, self.epoch)[:count])

    def _of(self, chosen: Sequence[int]) -> "Batches":
        return Batches(
            [self.token_ids[i] for i in chosen],
            [self.labels[i] for i in chosen],
            batch_size=self.batch_size,
            pad_token_id=self.pad_token_id,
        )

    def __len__(self) -> int:
        return -(-len(self.token_ids) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = ordered(len(self.token_ids), self.seed, self.epoch)
        for start in range(0, len(order), self.batch_size):
            yield self._batch(order[start : start + self.batch_size])

    def _batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        longest = max(len(self.token_ids[i]) for i in chosen)
        input_ids = torch.full(
            (len(chosen), longest), self.pad_token_id, dtype=torch.int64, device="cpu"
        )
        attention_mask = torch.zeros(len(chosen), longest, dtype=torch.int64, device="cpu")
        for row, i in enumerate(chosen):
            ids = self.token_ids[i]
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
            attention_mask[row, : len(ids)] = 1
        labels = torch.tensor([self.labels[i] for i in chosen], dtype=torch.int64, device="cpu")
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def ordered(count: int, seed: int | None, epoch: int) -> list[int]:
    """Returns the order of an epoch's examples: their own without a seed, else a shuffled one."""
    order = list(range(count))
    if seed is not None:
        random.Random(f"talos {seed} {epoch}").shuffle(order)
    return order
