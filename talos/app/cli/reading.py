"""What was read of the data, in a line, and what a tokenizer makes of it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from types import MappingProxyType
from typing import Any

from talos.app.cli.console import note
from talos.app.models import Encoder
from talos.app.models.heads import saved_head
from talos.app.nearest import several
from talos.app.provenance import USUAL_LENGTH, differences, other_tasks, tokens_of
from talos.app.tasks import ImageTask, Task
from talos.app.tasks.files import SUFFIXES
from talos.app.tasks.splits import SPLITS
from talos.errors import TalosValueError

__all__ = [
    "TokenCounts",
    "count_tokens",
    "show_data",
    "show_other_tasks",
    "show_rows",
    "summary",
    "tokens_for",
]

_SAMPLE = 1000  # texts that are tokenised to describe a task
_WHOLE = 2**30  # a length that cuts nothing; with None transformers warns of long texts
_CUT_SHARE = 0.05  # of the texts: what is worth a warning
_UNKNOWN_SHARE = 0.05  # of the tokens
_MOST_LABELS = 8


@dataclass(frozen=True)
class TokenCounts:
    """What a tokenizer makes of some texts.

    Attributes:
        lengths: the tokens of each text, special ones included.
        unknown: the share of the tokens that stand for anything unknown.
        examples: a few words that are unknown.
    """

    lengths: Sequence[int]
    unknown: float
    examples: Sequence[str]

    def cut(self, max_length: int) -> float:
        """Return the share of the texts that have more tokens."""
        return sum(length > max_length for length in self.lengths) / len(self.lengths)

    def holding(self, share: float) -> int:
        """Return a length, a multiple of 8, that this share of the texts does not exceed."""
        longest = sorted(self.lengths)[min(int(share * len(self.lengths)), len(self.lengths) - 1)]
        return -(-longest // 8) * 8


def count_tokens(task: Task, tokenizer: Any) -> TokenCounts:
    """Tokenise the texts of a task, at most 1,000 that are spread evenly over them.

    Args:
        task: the task.
        tokenizer: of transformers.
    """
    texts = [example.text for split in SPLITS for example in task.examples(split)]
    texts = texts[:: -(-len(texts) // _SAMPLE)]
    ids = _ids(tokenizer, texts)
    empty = set(_ids(tokenizer, [""])[0])  # of special tokens alone
    unknown = total = 0
    doubtful = []
    for text, row in zip(texts, ids, strict=True):
        own = [each for each in row if each not in empty]
        missing = own.count(tokenizer.unk_token_id) if own else 1
        unknown, total = unknown + missing, total + max(1, len(own))
        if missing:
            doubtful.append(text)
    words = list(dict.fromkeys(word for text in doubtful[:50] for word in text.split()))[:200]
    examples = [
        word
        for word, row in zip(words, _ids(tokenizer, words), strict=True)
        if tokenizer.unk_token_id in row or not set(row) - empty
    ]
    return TokenCounts([len(row) for row in ids], unknown / total, examples[:3])


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    options = {"padding": False, "truncation": True, "max_length": _WHOLE}
    found: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return found


def summary(task: Task | ImageTask, counts: TokenCounts | None, max_length: int) -> str:
    """Describe what was read of a task: examples, labels, splits, what was dropped and cut.

    Args:
        task: the task.
        counts: of its texts; None: it holds images.
        max_length: the tokens of a text that are kept.

    Example:
        >>> from talos.app.tasks import Example
        >>> rows = [Example("a", 0), Example("b", 1)]
        >>> task = Task("t", "", ("x", "y"), ("x", "y"), rows, rows, rows, source="t.csv")
        >>> summary(task, TokenCounts([3, 9, 3], 0.0, ()), 8)
        't.csv: 6 rows, 2 labels (x 3, y 3); 2 train, 2 validation, 2 test; 33 % of the texts cut \
at 8 tokens (median 3)'
    """
    found = Counter(each.label for split in SPLITS for each in task.examples(split))
    what = "images" if counts is None else "rows" if task.source else "texts"
    sizes = ", ".join(f"{len(task.examples(split)):,} {split}" for split in SPLITS)
    parts = [
        f"{task.source or task.name}: {found.total() + task.repeats:,} {what}, "
        f"{len(task.class_names)} labels{_labels(task, found)}",
        sizes,
    ]
    if task.repeats:
        parts.append(f"{task.repeats:,} repeat{'s' if task.repeats > 1 else ''} dropped")
    if counts is not None and (share := counts.cut(max_length)):
        middle = f"(median {median_low(counts.lengths)})"
        parts.append(f"{_percent(share)} of the texts cut at {max_length} tokens {middle}")
    return "; ".join(parts)


def _labels(task: Task | ImageTask, found: Counter[int]) -> str:
    if len(task.class_names) > _MOST_LABELS:
        least, most = min(found.values()), max(found.values())
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f", {each} each"
    named = (f"{name} {found[label]:,}" for label, name in enumerate(task.class_names))
    return f" ({', '.join(named)})"


def tokens_for(
    task: Task | ImageTask,
    encoder: Encoder,
    max_length: int | None,
    made: Iterable[Mapping[str, Any]] = (),
) -> int:
    """Return the tokens of a text that a command keeps.

    Args:
        task: the data.
        encoder: the model.
        max_length: the option --max-length, if given.
        made: the metadata of the masks or vectors at hand.

    Raises:
        TalosValueError: the model has fewer positions, or it reads images.
    """
    if task.reads == "images":
        if max_length is not None:
            raise TalosValueError(
                f"--max-length must be left out with images, got {max_length}; it cuts texts"
            )
        return USUAL_LENGTH
    made = [*made, *(head.made for head in encoder.heads.values())]
    tokens = tokens_of(task.name, made) if max_length is None else max_length
    most = encoder.most_tokens(task.class_texts)
    if most is not None and tokens > most:
        if max_length is None and tokens == USUAL_LENGTH:
            return most
        raise TalosValueError(
            f"--max-length must be at most {most}, the tokens that {encoder.name} takes, got "
            f"{tokens}"
        )
    return tokens


def show_data(
    task: Task | ImageTask,
    encoder: Encoder,
    max_length: int,
    made: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
) -> int | None:
    """Print on stderr what was read, and warnings of what does not fit the model or a file.

    Args:
        task: the data.
        encoder: the model.
        max_length: the tokens of a text that are kept.
        made: the masks or vectors at hand, with their metadata.

    Returns:
        The length that cuts less, if it is told.

    Raises:
        TalosValueError: the tokenizer knows less than half of the texts.
    """
    head = saved_head(encoder, task)
    own = [] if head is None else [(encoder.name, head.made)]
    for file, metadata in (*made.items(), *own):
        for line in differences(task, max_length, file, metadata):
            note(f"warning: {line}")
    if encoder.heads and head is None:
        note(
            f"warning: {encoder.name} holds no head of the labels of {task.name} (it holds "
            f"{', '.join(encoder.heads)}); one is made with its edited weights, which is not that "
            f"of the base; export the base again with --data {task.source or task.name}, too"
        )
    if alike := _alike(task):
        note(f"warning: labels of {task.source or task.name} are all but equal: {alike}")
    if isinstance(task, ImageTask):
        note(summary(task, None, max_length))
        return None
    counts = _known_tokens(task, encoder)
    note(summary(task, counts, max_length))
    if not task.source:
        return None
    longer = None
    if counts.cut(max_length) > _CUT_SHARE:
        line, longer = _longer(counts, max_length, encoder, task)
        note(f"warning: {line}")
    if numbers := [text for text in task.class_texts if _is_number(text)]:
        which = "the labels" if len(numbers) == len(task.class_texts) else "some labels"
        note(
            f"warning: {which} of {task.source} are numbers ({', '.join(numbers[:3])}), which "
            "describe no class; "
            + (
                "write what each means into a third column label_text, one row of each label is "
                "enough"
                if task.source.lower().endswith(SUFFIXES)
                else "say in a recipe's class_texts what each means"
            ),
        )
    return longer


def show_other_tasks(
    tasks: Iterable[Task | ImageTask], made: Mapping[Path, Mapping[str, Any]]
) -> None:
    """Warn on stderr of masks and vectors that were made for none of the tasks at hand."""
    names = [task.name for task in tasks]
    for file, metadata in made.items():
        if others := other_tasks(names, metadata):
            note(
                f"warning: {file} was made for {several(others)}, not for {several(names)}; "
                "whether it was made with rows of this data is not known"
            )


def show_rows(task: Task | ImageTask, encoder: Encoder, max_length: int) -> None:
    """Print on stderr what was read to predict, and a warning of texts that are not understood.

    Args:
        task: whose test examples they are.
        encoder: the model.
        max_length: the tokens of a text that are kept.

    Raises:
        TalosValueError: the tokenizer knows less than half of the texts, or the model has fewer
            positions.
    """
    if isinstance(task, ImageTask):
        note(f"{task.source}: {len(task.test):,} images")
        return
    most = encoder.most_tokens(task.class_texts)
    if most is not None and max_length > most:
        raise TalosValueError(
            f"--model must take the {max_length:,} tokens of its head, got {encoder.name}, which "
            f"takes {most:,}; export it again"
        )
    cut = _known_tokens(task, encoder).cut(max_length)
    line = f"; {_percent(cut)} of the texts cut at {max_length} tokens" if cut else ""
    note(f"{task.source}: {len(task.test):,} rows{line}")


def _known_tokens(task: Task, encoder: Encoder) -> TokenCounts:
    """Count the tokens of a task; refuse a tokenizer that knows few of them, or warn."""
    counts = count_tokens(task, encoder.tokenizer)
    name = task.source or task.name
    if counts.unknown > 0.5:
        raise TalosValueError(
            f"--model must have a tokenizer that knows the texts of {name}, got {encoder.name}, to "
            f"which {_percent(counts.unknown)} of the tokens are unknown{_quoted(counts)}; copy "
            "the files of its own tokenizer into its folder, or take a model of this language"
        )
    if counts.unknown > _UNKNOWN_SHARE:
        note(
            f"warning: to the tokenizer of {encoder.name} {_percent(counts.unknown)} of the tokens "
            f"of {name} are unknown{_quoted(counts)}; take a model of this language or subject",
        )
    return counts


def _longer(
    counts: TokenCounts, max_length: int, encoder: Encoder, task: Task
) -> tuple[str, int | None]:
    """Return what is cut, and the length that cuts less; None: there is none."""
    most, wanted = encoder.most_tokens(task.class_texts), counts.holding(0.95)
    limited = most is not None and wanted > most
    wanted = min(wanted, most or wanted)
    lead = f"{_percent(counts.cut(max_length))} of the texts of {task.source} are cut"
    if counts.cut(wanted) == counts.cut(max_length) and wanted > max_length:
        lead += f" as at {wanted} tokens, the most that {encoder.name} takes; shorten them"
        return lead, None
    if wanted <= max_length:
        lead += f" at {max_length} tokens, the most that {encoder.name} takes; shorten them"
        return lead, None
    kept = _percent(1 - counts.cut(wanted))
    limit = f", the most that {encoder.name} takes," if limited else ""
    return f"{lead}; --max-length {wanted}{limit} keeps {kept} of them whole", wanted


def _alike(task: Task | ImageTask) -> str:
    """Return labels whose texts differ in nothing but case and spaces, as "Cat and cat"."""
    first: dict[str, str] = {}
    pairs = []
    for name, text in zip(task.class_names, task.class_texts, strict=True):
        known = first.setdefault(" ".join(text.casefold().split()), name)
        if known != name:
            pairs.append(f"{known} and {name}")
    return ", ".join(pairs[:3])


def _quoted(counts: TokenCounts) -> str:
    return f" ({', '.join(counts.examples)})" if counts.examples else ""


def _percent(share: float) -> str:
    """Return a share in percent; what is not 0 is not shown as 0."""
    return "under 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
