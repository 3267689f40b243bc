"""Classification tasks in three splits, and their batches."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from talos.app.tasks.splits import SPLITS
from talos.errors import TalosValueError
from talos.options import integer

if TYPE_CHECKING:  # the command line lists the tasks before it imports torch
    from torch import Tensor

Collate = Callable[[Sequence[int]], "dict[str, Tensor]"]


class Labelled(Protocol):
    """An example of any kind."""

    @property
    def label(self) -> int:
        """Index into the task's `class_names`."""


E = TypeVar("E", bound=Labelled)


@dataclass(frozen=True)
class Example:
    """A text with its class.

    Attributes:
        text: the text.
        label: index into the task's `class_names`.
        origin: where the text was found, for example a file of the standard library.
        answers: what this text can be answered with, one text per class, where the answers differ
            from text to text; only a language model chooses among them. Empty: the answers are the
            task's `class_texts`.
    """

    text: str
    label: int
    origin: str = ""
    answers: tuple[str, ...] = ()


@dataclass
class Batches:
    """Batches of examples, which can be iterated as often as needed, in the same order.

    Attributes:
        labels: the label of each example.
        collate: `collate(places)` returns the inputs of the examples at these places.
        batch_size: examples per batch; the last batch holds the rest.
        lengths: the number of tokens of each example.
        seed: shuffles the examples; None keeps their order.
        epoch: gives another order for the same seed.
        chosen: the places of the examples to take, in this order; None takes all.
        window: of so many batches in a row, examples of similar length share a batch; 1 leaves
            the order as it is.
    """

    labels: Sequence[int]
    collate: Collate
    batch_size: int
    lengths: Sequence[int]
    seed: int | None = None
    epoch: int = 0
    chosen: Sequence[int] | None = None
    window: int = 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order of the next iterations."""
        self.epoch = epoch

    def shortest_first(self) -> "Batches":
        """Return batches of similar length, which need little padding, shortest first.

        Returns:
            The batches, in an order that no seed changes.
        """
        places = range(len(self.labels)) if self.chosen is None else self.chosen
        return replace(self, chosen=sorted(places, key=lambda place: self.lengths[place]))

    def similar_lengths(self, window: int = 8) -> "Batches":
        """Return shuffled batches of similar length: little padding, the same examples.

        Of every `window` batches, the examples are sorted by length, and the full batches that
        this gives are shuffled. So after so many batches the same examples have been seen, each as
        often as without this.

        Args:
            window: how many batches share their examples.
        """
        return replace(self, window=window)

    def first(self, count: int) -> "Batches":
        """Return batches of the first `count` examples of this epoch's order."""
        return replace(self, chosen=self.order()[:count])

    def order(self) -> Sequence[int]:
        """Return the places of the examples in the order of this epoch."""
        if self.chosen is not None:
            return self.chosen
        places = list(range(len(self.labels)))
        draw = random.Random(f"talos {self.seed} {self.epoch}")
        if self.seed is not None:
            draw.shuffle(places)
        if self.window == 1:
            return places
        found, size = [], self.batch_size
        for start in range(0, len(places), self.window * size):
            part = places[start : start + self.window * size]
            part.sort(key=lambda place: self.lengths[place], reverse=True)
            whole = [part[i : i + size] for i in range(0, len(part) // size * size, size)]
            draw.shuffle(whole)
            found += [place for batch in whole for place in batch] + part[len(whole) * size :]
        return found

    def __len__(self) -> int:
        return -(-len(self.order()) // self.batch_size)

    def __iter__(self) -> "Iterator[dict[str, Tensor]]":
        import torch

        order = self.order()
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            labels = [self.labels[place] for place in places]
            yield {
                **self.collate(places),
                "labels": torch.tensor(labels, dtype=torch.int64, device="cpu"),
            }


@dataclass(frozen=True)
class LabelledSplits(ABC, Generic[E]):
    """A classification task: examples in three splits that share none.

    Attributes:
        reads: what the examples are.
        name: the task's name.
        description: what is classified, and how the splits are kept apart.
        class_names: one short name per class.
        class_texts: one text per class; a zero-shot head is made of their embeddings.
        train: examples to fine-tune and calibrate on.
        validation: examples to choose scaling coefficients on.
        test: examples to report.
        source: the name of the file or folder that holds the examples; empty for built-in tasks.
        repeats: how many examples were dropped because they repeat another one.
    """

    name: str
    description: str
    class_names: tuple[str, ...]
    class_texts: tuple[str, ...]
    train: list[E] = field(repr=False)
    validation: list[E] = field(repr=False)
    test: list[E] = field(repr=False)
    source: str = field(default="", kw_only=True)
    repeats: int = field(default=0, kw_only=True)

    reads: ClassVar[Literal["texts", "images"]]

    def examples(self, split: str) -> list[E]:
        """Return the examples of "train", "validation" or "test".

        Raises:
            TalosValueError: there is no such split.
        """
        if split not in SPLITS:
            raise TalosValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        found: list[E] = getattr(self, split)
        return found

    def batches(
        self,
        split: str,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        max_length: int = 48,
        seed: int | None = None,
    ) -> Batches:
        """Return the batches of a split.

        A batch of texts holds `input_ids` and `attention_mask`, both int64 [B, T], and, where
        texts have answers of their own, `choice_ids`, int64 [B, C, L], padded with -100. A batch of
        images holds `pixel_values`, float32 [B, 3, H, W]. Both hold `labels`, int64 [B].

        Args:
            split: "train", "validation" or "test".
            tokenizer: for texts a tokenizer of transformers; for images a function from a PIL
                image to float32 [3, H, W].
            batch_size: examples per batch.
            max_length: most tokens per text, special ones included; the rest is cut off.
            seed: shuffles the examples; None keeps their order.

        Returns:
            The batches.

        Raises:
            TalosValueError: there is no such split, `batch_size` is below 1, `max_length` is
                below 3, or the tokenizer has no token for padding. Or the texts have answers of
                their own, and the tokenizer is not that of a language model.

        Example:
            >>> task = Task("t", "", ("a", "b"), ("a", "b"), [Example("x y z", 1)], [], [])
            >>> class Words:
            ...     pad_token_id = 0
            ...     def __call__(self, text, *, padding, truncation, max_length):
            ...         return {"input_ids": [[len(w) for w in t.split()] for t in text]}
            >>> next(iter(task.batches("train", Words())))["input_ids"]
            tensor([[1, 1, 1]])
        """
        labels = [example.label for example in self.examples(split)]
        integer("batch_size", batch_size, 1)
        collate, lengths = self._inputs(split, tokenizer, max_length)
        return Batches(labels, collate, batch_size, lengths, seed)

    def fingerprint(self, split: str = "test") -> str:
        """Return 16 hex digits of a split's examples: texts, or pixels and names of files.

        Args:
            split: "train", "validation" or "test".

        Raises:
            TalosValueError: there is no such split.
        """
        digest = hashlib.sha256()
        for example in self.examples(split):
            raw = self._content(example)
            digest.update(len(raw).to_bytes(8, "little") + raw + str(example.label).encode())
        return digest.hexdigest()[:16]

    @abstractmethod
    def _content(self, example: E) -> bytes:
        """Return what tells an example from others."""

    @abstractmethod
    def _inputs(self, split: str, tokenizer: Any, max_length: int) -> tuple[Collate, Sequence[int]]:
        """Return how a batch of the split is collated, and the length of each example."""


@dataclass(frozen=True)
class Task(LabelledSplits[Example]):
    """A text classification task; see `LabelledSplits`."""

    reads = "texts"
    # Token ids by split, length and tokenizer. The tokenizer is kept, so that its id stays its own.
    _tokens: dict[tuple[str, int, int], tuple[Any, list[list[int]], "list[Tensor]"]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def _content(self, example: Example) -> bytes:
        return "\0".join((example.text, *example.answers)).encode()

    def _inputs(self, split: str, tokenizer: Any, max_length: int) -> tuple[Collate, Sequence[int]]:
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
        texts = [example.text for example in self.examples(split)]
        if key not in self._tokens:
            options = {"padding": False, "truncation": True, "max_length": max_length}
            token_ids = tokenizer(texts, **options)["input_ids"] if texts else []
            self._tokens[key] = (tokenizer, token_ids, self._choices(split, tokenizer))
        _, token_ids, choices = self._tokens[key]
        collate = partial(_padded, token_ids, choices, tokenizer.pad_token_id)
        return collate, [len(ids) for ids in token_ids]

    def _choices(self, split: str, tokenizer: Any) -> "list[Tensor]":
        """Return the tokens of each text's own answers, int64 [C, L]; none where it has none."""
        answers = [example.answers for example in self.examples(split)]
        if not any(answers):
            return []
        if not hasattr(tokenizer, "answer_ids"):
            raise TalosValueError(
                f"tokenizer must be that of a language model, got {type(tokenizer).__name__}: the "
                f"texts of {self.name} have answers of their own; take another model or task"
            )
        classes = len(self.class_names)
        for place, each in enumerate(answers):
            if len(each) != classes:
                raise TalosValueError(
                    f"answers must be one for each of {classes} classes, got {len(each)} in "
                    f"example {place} of {split}; give each text as many answers"
                )
        rows: Tensor = tokenizer.answer_ids([answer for each in answers for answer in each])
        return list(rows.unflatten(0, (len(answers), classes)))


def _padded(
    token_ids: Sequence[Sequence[int]],
    choices: "Sequence[Tensor]",
    pad_token_id: int,
    places: Sequence[int],
) -> "dict[str, Tensor]":
    """Return the inputs of the texts at these places, padded to the longest one of them."""
    import torch

    shape = len(places), max(len(token_ids[place]) for place in places)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64, device="cpu")
    attention_mask = torch.zeros(shape, dtype=torch.int64, device="cpu")
    for row, place in enumerate(places):
        ids = token_ids[place]
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
        attention_mask[row, : len(ids)] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if choices:
        answers = torch.stack([choices[place] for place in places])  # [B, C, L]
        longest = int((answers >= 0).sum(-1).max())
        batch["choice_ids"] = answers[..., :longest].contiguous()  # a loss takes a view of it
    return batch
