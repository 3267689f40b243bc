"""Divide candidates into train, validation and test; no group is in two of them."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from talos.options import integer

E = TypeVar("E")

SPLITS = ("train", "validation", "test")
# Of a built-in task: what the demo can judge in minutes, and the same rows in every command.
DEFAULT_SIZES = (1600, 96, 400)
# Of a class in a user's data: one example for each split.
MIN_CLASS = 3

# So many words in a row of the first ones of two texts make one a repeat of the other.
REPEAT, REPEAT_WITHIN = 12, 60

# Consecutive texts of a file that stay together when the file is cut into regions.
REGION = 16


class Grouped(Protocol):
    """An example that a task may use, with its class and its group."""

    @property
    def label(self) -> int:
        """Index of its class."""

    @property
    def group(self) -> str:
        """Examples of one group are always in the same split."""


G = TypeVar("G", bound=Grouped)


@dataclass(frozen=True)
class Candidate:
    """A text that a task may use.

    Attributes:
        text: the text.
        label: index of its class.
        origin: where it was found: a file's path below the library's folder, or a region's name.
        group: candidates of one group are always in the same split.
    """

    text: str
    label: int
    origin: str
    group: str


def text_key(text: str) -> str:
    r"""Return the letters of a text, case folded; texts with equal keys count as one.

    Example:
        >>> text_key("x = f(1)  # One") == text_key("X = F(2)\n# one")
        True
    """
    return re.sub(r"[\W\d_]+", " ", text.casefold()).strip()


def deduplicate(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Keep the first of equal texts, and none of those that occur with two labels."""
    return deduplicate_by(lambda candidate: text_key(candidate.text), candidates)


def deduplicate_by(key_of: Callable[[G], Hashable], candidates: Iterable[G]) -> list[G]:
    """Keep the first of candidates with equal keys, and none of those that have two labels.

    Args:
        key_of: returns what is compared; a candidate whose key is empty is dropped.
        candidates: the candidates.
    """
    first: dict[Hashable, G] = {}
    ambiguous = set()
    for candidate in candidates:
        key = key_of(candidate)
        known = first.setdefault(key, candidate)
        if known.label != candidate.label:
            ambiguous.add(key)
    return [c for key, c in first.items() if key and key not in ambiguous]


def cut_regions(candidates: Sequence[Candidate], n_classes: int, min_files: int) -> list[Candidate]:
    """Group by file; cut the files of a class with fewer than `min_files` into disjoint regions.

    With few files in a split, one of them would decide what is in it. A file must hold candidates
    of one class only.
    """
    files: dict[int, set[str]] = {label: set() for label in range(n_classes)}
    for candidate in candidates:
        files[candidate.label].add(candidate.origin)
    cut = {label for label, paths in files.items() if len(paths) < min_files}
    seen: Counter[str] = Counter()
    result = []
    for c in candidates:
        group = c.origin
        if c.label in cut:
            group = f"{c.origin}#{seen[c.origin] // REGION}"
            seen[c.origin] += 1
        result.append(Candidate(c.text, c.label, group, group))
    return result


def join_repeats(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Join the groups of texts that repeat each other: a mail or an article under another title.

    Two texts do if they share twelve words in a row of their first 60.

    Returns:
        The candidates; one whose group is joined has that of the first text in it.
    """
    joined = {candidate.group: candidate.group for candidate in candidates}

    def first_of(group: str) -> str:
        while joined[group] != group:
            joined[group] = joined[joined[group]]
            group = joined[group]
        return group

    places = {group: place for place, group in enumerate(joined)}
    known: dict[tuple[str, ...], str] = {}
    for candidate in candidates:
        found = text_key(candidate.text).split()[:REPEAT_WITHIN]
        for start in range(len(found) - REPEAT + 1):
            other = known.setdefault(tuple(found[start : start + REPEAT]), candidate.group)
            pair = sorted({first_of(candidate.group), first_of(other)}, key=places.__getitem__)
            joined[pair[-1]] = pair[0]
    return [replace(candidate, group=first_of(candidate.group)) for candidate in candidates]


def split_groups(
    candidates: Sequence[G], n_classes: int, seed: int, sizes: tuple[int, int, int]
) -> tuple[list[G], list[G], list[G]]:
    """Draw three splits of at most `sizes` candidates, each with every class equally often.

    Groups go, the largest first, to the split that lacks most of its share of their classes. So
    the largest groups are in the largest split, and the other splits hold many small ones.
    Where a class has too few candidates, all splits and all classes shrink: the splits stay
    balanced but get smaller.

    The shares are always those of `DEFAULT_SIZES`, and a smaller split is a part of a larger one.
    So what is trained on with some sizes is in no test split of other sizes.
    """
    draw = _generator(seed)
    groups: dict[str, list[G]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.group].append(candidate)
    totals = Counter(candidate.label for candidate in candidates)
    names = sorted(groups)
    draw.shuffle(names)
    names.sort(key=lambda name: -len(groups[name]))
    shares = [size / sum(DEFAULT_SIZES) for size in DEFAULT_SIZES]
    filled = [Counter[int]() for _ in SPLITS]
    assigned: list[list[str]] = [[] for _ in SPLITS]
    for name in names:
        counts = Counter(candidate.label for candidate in groups[name])

        def room(split: int, counts: Counter[int] = counts) -> float:
            return sum(
                count / totals[label] * (shares[split] - filled[split][label] / totals[label])
                for label, count in counts.items()
            )

        best = max(range(len(SPLITS)), key=room)
        assigned[best].append(name)
        filled[best].update(counts)
    train, validation, test = (
        _draw(draw, [groups[name] for name in names], n_classes, usual, size)
        for names, usual, size in zip(assigned, DEFAULT_SIZES, sizes, strict=True)
    )
    return train, validation, test


def split_classes(classes: Sequence[Sequence[E]], seed: int) -> tuple[list[E], list[E], list[E]]:
    """Draw three splits, 80/10/10 within each class, with at least one example of it in each."""
    draw = _generator(seed)
    splits: tuple[list[E], list[E], list[E]] = ([], [], [])
    for members in classes:
        examples = list(members)
        draw.shuffle(examples)
        held_out = max(1, round(0.1 * len(examples)))
        splits[1].extend(examples[:held_out])
        splits[2].extend(examples[held_out : 2 * held_out])
        splits[0].extend(examples[2 * held_out :])
    for drawn in splits:
        draw.shuffle(drawn)
    return splits


def by_turns(labels: Sequence[int]) -> list[int]:
    """Return the places of labels so that the classes take turns, each in its own order.

    Example:
        >>> by_turns([0, 0, 0, 1, 1])
        [0, 3, 1, 4, 2]
    """
    seen = Counter[int]()
    ranks = []
    for place, label in enumerate(labels):
        ranks.append((seen[label], place))
        seen[label] += 1
    return [place for _, place in sorted(ranks)]


def words(name: str) -> str:
    """Return a name with spaces for underscores and hyphens; a number keeps its sign.

    Example:
        >>> words("sci-fi_film"), words("-5")
        ('sci fi film', '-5')
    """
    return re.sub(r"_|-(?!\d)|(?<=\S)-", " ", name)


def _generator(seed: int) -> random.Random:
    return random.Random(f"talos {integer('seed', seed, 0)}")


def _draw(
    draw: random.Random, groups: Sequence[Sequence[G]], n_classes: int, usual: int, size: int
) -> list[G]:
    """Draw `size` candidates, equally many of each class, spread over the groups.

    What `draw` gives next does not depend on `size`. Candidates of the `usual` size come first.
    """
    pools: list[list[tuple[int, float, G]]] = [[] for _ in range(n_classes)]
    for group in groups:
        ranks = Counter[int]()
        for candidate in draw.sample(group, len(group)):
            pools[candidate.label].append((ranks[candidate.label], draw.random(), candidate))
            ranks[candidate.label] += 1
    for pool in pools:
        pool.sort(key=lambda item: item[:2])
    places = _places(pools, usual)
    draw.shuffle(places)
    wanted = dict.fromkeys(_places(pools, size))
    places = [place for place in places if place in wanted]
    return [pools[label][at][-1] for label, at in dict.fromkeys([*places, *wanted])]


def _places(pools: Sequence[Sequence[object]], size: int) -> list[tuple[int, int]]:
    """Return the class and the place in its pool of `size` candidates, or of fewer."""
    smallest = min(map(len, pools))
    quota = min(size // len(pools), smallest)
    rest = size - quota * len(pools) if quota < smallest else 0
    return [(label, at) for label in range(len(pools)) for at in range(quota + (label < rest))]
