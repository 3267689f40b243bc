"""Tasks from the standard library and from files: determinism, no leakage, balance, errors."""

import ast
import csv
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from talos.app.tasks import Example, Task, available_tasks, load_file, load_task, registry
from talos.app.tasks.sources import MAX_CHARS, library_folder, list_files, read_source
from talos.app.tasks.splits import (
    DEFAULT_SIZES,
    SPLITS,
    Candidate,
    cut_regions,
    deduplicate,
    join_repeats,
    split_groups,
    text_key,
)
from talos.app.tasks.standard_library import (
    MIN_PACKAGE_FILES,
    MIN_TOPIC_FILES,
    PACKAGES,
    TEST_WORDS,
)
from talos.errors import TalosOSError, TalosTypeError, TalosValueError

WITHOUT_TESTS = {
    "docstring_topic",
    "code_package",
    "function_purpose",
    "fragment_kind",
    "character_kind",
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name) for name in available_tasks()}


class Characters:
    """A tokenizer with one id per character, 1 at the start and 2 at the end."""

    pad_token_id: int | None = 0

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text, *, padding, truncation, max_length):
        assert truncation
        assert not padding
        self.calls += 1
        ids = [[3 + ord(character) for character in t][: max_length - 2] for t in text]
        return {"input_ids": [[1, *row, 2] for row in ids]}


def digest(task: Task) -> str:
    rows = [(e.text, e.label, e.origin) for split in SPLITS for e in task.examples(split)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def library(folder: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_no_text_and_no_origin_is_in_two_splits(tasks):
    assert set(tasks) >= WITHOUT_TESTS
    for name, task in tasks.items():
        for what in (lambda e: e.text, lambda e: text_key(e.text), lambda e: e.origin):
            seen = [{what(example) for example in task.examples(split)} for split in SPLITS]
            assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2], name
        texts = [e.text for split in SPLITS for e in task.examples(split)]
        assert len(set(texts)) == len(texts), name
        # a header may stand before the lines of a function
        assert all(text.strip() and len(text) <= 2 * MAX_CHARS for text in texts), name


def test_only_files_of_a_class_with_few_files_are_cut_into_regions(tasks):
    limits = {"docstring_topic": MIN_TOPIC_FILES, "code_package": MIN_PACKAGE_FILES}
    for name in WITHOUT_TESTS - {"character_kind"}:
        task = tasks[name]
        files: dict[int, set[str]] = {label: set() for label in range(len(task.class_names))}
        cut = set()
        for split in SPLITS:
            for example in task.examples(split):
                path, _, region = example.origin.partition("#")
                files[example.label].add(path)
                if region:
                    cut.add(example.label)
        assert all(len(files[label]) < limits.get(name, 0) for label in cut), name


def test_splits_are_balanced_large_and_labelled_in_range(tasks):
    for name, task in tasks.items():
        n_classes = len(task.class_names)
        assert len(task.class_texts) == n_classes == len(set(task.class_texts)), name
        for split, smallest, largest in zip(SPLITS, (1200, 72, 300), (1600, 96, 400), strict=True):
            counts = Counter(example.label for example in task.examples(split))
            assert sorted(counts) == list(range(n_classes)), name
            assert max(counts.values()) - min(counts.values()) <= 1, name
            assert smallest <= sum(counts.values()) <= largest, name


def test_docstrings_do_not_name_their_module(tasks):
    for example in tasks["docstring_topic"].train:
        module = Path(example.origin.partition("#")[0]).stem
        assert len(module) <= 2 or module.lower() not in example.text.lower()


def test_code_does_not_name_its_package(tasks):
    for example in tasks["code_package"].test:
        package = example.origin.partition("/")[0]
        assert package not in example.text.lower()


def test_function_names_and_giveaway_words_are_gone(tasks):
    assert all(
        e.text.startswith(("def f(", "async def f(")) for e in tasks["function_purpose"].test
    )
    words = r"\b(letter|digit|number|combining|mathematical|symbol|sign|mark|punctuation)s?\b"
    assert not any(re.search(words, e.text) for e in tasks["character_kind"].train)


def test_test_or_library_holds_no_word_that_names_the_answer():
    folder = library_folder()
    if not list_files(folder, tests=True):
        with pytest.raises(TalosValueError, match="at least 100 texts of each class"):
            load_task("test_or_library")
        return
    task = load_task("test_or_library")
    assert not any(TEST_WORDS.search(example.text) for example in task.train)
    assert all(
        Path(example.origin).name.startswith("test_") == bool(example.label)
        for example in task.validation
    )


def test_same_seed_same_task_other_seed_other_task(tasks):
    for name, task in tasks.items():
        assert digest(load_task(name, seed=0)) == digest(task), name
        other = load_task(name, seed=1)
        assert digest(other) != digest(task), name
        assert {e.origin for e in other.test} != {e.origin for e in task.test}, name


@pytest.mark.slow
def test_another_process_with_other_hashes_makes_the_same_task(tasks):
    code = (
        "import sys, json, hashlib\n"
        "from talos.app.tasks import load_task\n"
        "for name in sys.argv[1:]:\n"
        "    task = load_task(name)\n"
        "    rows = [(e.text, e.label, e.origin) for s in ('train', 'validation', 'test')\n"
        "            for e in task.examples(s)]\n"
        "    print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *tasks],
        env={**os.environ, "PYTHONHASHSEED": "1234"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [digest(task) for task in tasks.values()]


def test_sizes_are_kept_to():
    task = load_task("character_kind", sizes=(61, 13, 6))
    assert [len(task.examples(split)) for split in SPLITS] == [61, 13, 6]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"name": "docstring_topics"}, TalosValueError, "did you mean 'docstring_topic'"),
        ({"name": "nothing"}, TalosValueError, "name must be a known task, got 'nothing'; known"),
        ({"seed": 0.5}, TalosValueError, "seed must be an integer of at least 0, got 0.5"),
        ({"sizes": (10, 10)}, TalosValueError, r"sizes must be three numbers .* got \(10, 10\)"),
        ({"sizes": (60, 5, 60)}, TalosValueError, "at least 6, one example per class"),
        ({"sizes": (60, "5", 60)}, TalosTypeError, "sizes must be three integers"),
    ],
)
def test_load_task_refuses(arguments, error, match):
    with pytest.raises(error, match=match):
        load_task(**{"name": "character_kind", **arguments})


@pytest.fixture
def other_library(tmp_path, monkeypatch):
    """Another folder in the place of the standard library's."""
    registry._candidates.cache_clear()
    monkeypatch.setattr(registry, "library_folder", lambda: tmp_path)
    yield tmp_path
    registry._candidates.cache_clear()


def test_a_task_without_enough_text_is_not_listed_and_its_lack_is_named(other_library):
    source = 'def f(x):\n    """One two three four five six."""\n'
    folder = library(other_library, {"xml/sax.py": source})
    assert available_tasks() == ["character_kind"]
    with pytest.raises(TalosValueError, match=r"markup 1, programs 0 in .*; install") as caught:
        load_task("docstring_topic")
    assert str(folder) in str(caught.value)


def test_files_of_another_library_are_read(other_library):
    files = {
        f"{pattern.split('*')[0]}m{i}.py": "\n".join(
            f"def f{j}(value):\n"
            f"    return value.{package[::-1]}_{chr(97 + i)}(other_{'abcdefghij'[j]}, "
            f"some_more_arguments_to_make_it_long_enough)\n"
            for j in range(10)
        )
        for package, (pattern, *_) in PACKAGES.items()
        for i in range(12)
    }
    library(other_library, files)
    assert available_tasks() == ["character_kind", "code_package"]
    task = load_task("code_package", sizes=(70, 14, 14))
    assert [len(task.examples(split)) for split in SPLITS] == [70, 14, 14]
    assert {e.origin.split("/")[0] for e in task.train if e.label == 1} == {"email"}


SAMPLE = '''
# Copyright line one
# and line two of it.

X = """
# This is no comment at all.
"""
PATTERN = re.compile(r"[a-z]+ *= *[0-9]+")


class Thing:
    """A thing that does something useful.

    More about it.
    """

    async def act(
        self,
        how,
    ):
        """Acts in the way that was asked for.

        >>> 1
        """
        # Not part of the code.
        if how:
            raise ValueError(f"how must be a way, got {how!r} instead")

            def inner():
                """An inner docstring is not read."""
        raise TypeError("%s is not a way to act on this" % how)


try:
    pass
except ImportError:
    def fallback(x): return x
'''


def test_reader_separates_docstrings_comments_functions_and_messages(tmp_path):
    folder = library(tmp_path, {"sample.py": SAMPLE})
    file = read_source(folder, "sample.py")
    assert file.docstrings == (
        "A thing that does something useful. More about it.",
        "Acts in the way that was asked for.",
    )
    assert file.comments == ("Copyright line one and line two of it.",)
    assert [f.name for f in file.functions] == ["act"]
    assert file.functions[0].header == "async def act( self, how, ):"
    assert file.functions[0].body.startswith("if how:\n    raise ValueError(")
    assert sorted(file.messages) == [
        "%s is not a way to act on this",
        "how must be a way, got %s instead",
    ]
    ast.parse(file.functions[0].body)


@pytest.mark.parametrize("data", [b"def f(:\n", b"\xff\xfe\x00", b"x = '\xe9'\n", b"\0"])
def test_a_file_that_cannot_be_parsed_gives_no_text(tmp_path, data):
    (tmp_path / "bad.py").write_bytes(data)
    file = read_source(tmp_path, "bad.py")
    assert not file.docstrings + file.comments + file.messages
    assert not file.functions


def test_reading_warns_of_nothing_and_imports_nothing(tmp_path):
    folder = library(tmp_path, {"odd_module.py": 'X = "\\d"\nraise SystemExit("was executed")\n'})
    read_source(folder, "odd_module.py")
    assert "odd_module" not in sys.modules


def test_tests_caches_and_installed_packages_are_no_library(tmp_path):
    library(
        tmp_path,
        {
            "a.py": "",
            "p/b.py": "",
            "test/test_a.py": "",
            "p/tests/test_b.py": "",
            "p/tests/data.py": "",
            "site-packages/c.py": "",
            "__pycache__/d.py": "",
            "_sysconfigdata__linux.py": "",
        },
    )
    folder = tmp_path
    assert list_files(folder, tests=False) == ("a.py", "p/b.py")
    assert list_files(folder, tests=True) == ("p/tests/test_b.py", "test/test_a.py")


def test_deduplicate_keeps_the_first_and_drops_texts_with_two_labels():
    found = [
        Candidate(text, label, origin, origin)
        for text, label, origin in [
            ("One text.", 0, "a"),
            ("one  TEXT", 0, "b"),
            ("both", 0, "a"),
            ("Both!", 1, "b"),
            ("123", 1, "b"),
            ("other", 1, "b"),
        ]
    ]
    assert [(c.text, c.origin) for c in deduplicate(found)] == [("One text.", "a"), ("other", "b")]


def test_regions_are_consecutive_and_only_of_classes_with_few_files():
    few = [Candidate(f"few {i}", 0, "big.py", "big.py") for i in range(40)]
    many = [Candidate(f"many {i}", 1, f"{i % 12}.py", f"{i % 12}.py") for i in range(40)]
    cut = cut_regions(few + many, 2, min_files=10)
    assert [c.group for c in cut[:40]] == [f"big.py#{i // 16}" for i in range(40)]
    assert [c.group for c in cut[40:]] == [c.group for c in many]


def test_groups_of_texts_that_share_twelve_words_are_joined():
    text = "one two three four five six seven eight nine ten eleven twelve"
    rows = [
        (f"Aa. {text}", "a"),
        ("something else", "b"),
        (f"Cc cc! {text.title()} and more", "c"),
        ("other words of the third group", "c"),
        (text.removesuffix("twelve"), "d"),
        (f"Dd {'x ' * 60} {text}", "e"),
        ("other words of group c in a text of twelve words or of more", "f"),
        ("words of group c in a text of twelve words or of more", "b"),
    ]
    joined = join_repeats([Candidate(text, 0, group, group) for text, group in rows])
    assert [each.group for each in joined] == [*"abaadebb"]
    assert [(each.text, each.origin) for each in joined] == rows


@given(
    groups=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), max_size=40),
    seed=st.integers(0, 3),
    sizes=st.tuples(st.integers(3, 60), st.integers(3, 30), st.integers(3, 30)),
)
def test_split_groups_never_splits_a_group_and_keeps_balance(groups, seed, sizes):
    candidates = [
        Candidate(f"{g} {i}", label, f"{g}", f"{g}")
        for g, labels in enumerate(groups)
        for i, label in enumerate(labels)
    ]
    splits = split_groups(candidates, 3, seed, sizes)
    found = [{c.group for c in split} for split in splits]
    assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    for split, size in zip(splits, sizes, strict=True):
        counts = Counter(c.label for c in split)
        assert len(split) <= size
        assert len(set(split)) == len(split)
        assert max(counts[k] for k in range(3)) - min(counts[k] for k in range(3)) <= 1
    larger = split_groups(candidates, 3, seed, (sizes[0] + 7, sizes[1] + 1, sizes[2] + 40))
    for split, more in zip(splits, larger, strict=True):
        assert set(split) <= set(more)
    usual = split_groups(candidates, 3, seed, DEFAULT_SIZES)
    for split, other in itertools.permutations(range(3), 2):
        assert not {*splits[split]} & {*usual[other]}


@pytest.fixture
def small() -> Task:
    train = [Example("x" * length, length % 2) for length in (3, 9, 1, 5, 7, 2, 4)]
    return Task("small", "", ("even", "odd"), ("even", "odd"), train, [], [])


def test_batches_hold_every_example_padded_to_the_longest(small):
    batches = list(small.batches("train", Characters(), batch_size=3, max_length=8))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 8), (3, 8), (1, 6)]
    row = batches[0]["input_ids"][0].tolist()
    assert row == [1, 123, 123, 123, 2, 0, 0, 0]
    assert batches[0]["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 8, [1] * 3 + [0] * 5]
    assert torch.cat([b["labels"] for b in batches]).tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert {b[key].dtype for b in batches for key in b} == {torch.int64}


def test_batches_can_be_iterated_again_and_are_tokenised_once(small):
    tokenizer = Characters()
    batches = small.batches("train", tokenizer, batch_size=2, seed=3)
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    list(small.batches("train", tokenizer, batch_size=4))
    assert tokenizer.calls == 1
    list(small.batches("train", tokenizer, max_length=5))
    list(small.batches("train", Characters(), max_length=5))
    assert tokenizer.calls == 2


def test_seed_and_epoch_shuffle(small):
    def lengths(epoch=0, **arguments):
        batches = small.batches("train", Characters(), batch_size=7, **arguments)
        batches.set_epoch(epoch)
        return next(iter(batches))["attention_mask"].sum(1).sub(2).tolist()

    assert lengths() == [3, 9, 1, 5, 7, 2, 4]
    assert lengths(seed=0) != lengths(seed=0, epoch=1) != lengths(seed=1, epoch=1)
    assert sorted(lengths(seed=5)) == [1, 2, 3, 4, 5, 7, 9]


def test_batches_of_similar_length_hold_the_same_examples_in_each_window(small):
    plain = small.batches("train", Characters(), batch_size=2, seed=3)
    similar = plain.similar_lengths(window=2)
    longest_first = set()
    for epoch in range(4):
        plain.set_epoch(epoch)
        similar.set_epoch(epoch)
        order = similar.order()
        assert sorted(order[:4]) == sorted(plain.order()[:4])
        assert sorted(order) == list(range(7))
        one, two, three, four = (
            [similar.lengths[place] for place in order[start : start + 2]] for start in (0, 2, 4, 6)
        )
        assert min(one) > max(two) or min(two) > max(one)
        assert min(three) > max(four)  # the rest is last
        longest_first.add(min(one) > max(two))
    assert longest_first == {True, False}


def test_an_empty_split_has_no_batches(small):
    assert list(small.batches("test", Characters())) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"split": "valid"}, "split must be one of train, validation, test, got 'valid'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"max_length": 2}, "max_length must be at least 3, got 2"),
    ],
)
def test_batches_refuse(small, arguments, match):
    with pytest.raises(TalosValueError, match=match):
        small.batches(**{"split": "train", "tokenizer": Characters(), **arguments})


def test_a_tokenizer_without_padding_is_refused(small):
    tokenizer = Characters()
    tokenizer.pad_token_id = None
    with pytest.raises(TalosValueError, match="tokenizer must have a token for padding"):
        small.batches("train", tokenizer)


ROWS = [(f"{word} number {i}", word) for word in ("cat", "dog", "owl") for i in range(30)]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    if path.suffix == ".csv":
        lines = [
            "id,text,label",
            *(f'{i},"{text}",{label}' for i, (text, label) in enumerate(rows)),
        ]
    else:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_load_file_splits_each_class(tmp_path, suffix):
    path = write(tmp_path / f"pets{suffix}", [*ROWS, ROWS[0]])
    task = load_file(path)
    assert task.name == "pets"
    assert task.class_names == ("cat", "dog", "owl")
    for split, size in zip(SPLITS, (24, 3, 3), strict=True):
        assert Counter(e.label for e in task.examples(split)) == dict.fromkeys(range(3), size)
    rows = [(e.text, task.class_names[e.label]) for s in SPLITS for e in task.examples(s)]
    assert sorted(rows) == sorted(ROWS)
    assert digest(load_file(path)) == digest(task)
    assert digest(load_file(path, seed=1)) != digest(task)


def test_load_file_reads_texts_with_newlines_marks_and_whole_number_labels(tmp_path):
    path = tmp_path / "numbers.jsonl"
    rows = [{"text": f"a\nb\u2028{i}", "label": i % 11} for i in range(44)]
    path.write_bytes(
        b"\xef\xbb\xbf" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
    )
    task = load_file(path)
    assert task.class_names == tuple(str(i) for i in range(11))
    assert all(int(e.text.split("\u2028")[1]) % 11 == e.label for e in task.train)
    path = tmp_path / "lines.csv"
    path.write_text(
        "text,label\n" + "".join(f'"one\nline, {i}",a-b_c\n"other, {i}",b\n' for i in range(9))
    )
    task = load_file(path)
    assert task.class_texts == ("a b c", "b")
    assert {e.text.count("\n") for e in task.train} == {0, 1}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_load_file_finds_what_divides_the_columns(tmp_path, suffix, delimiter, end):
    path = tmp_path / f"rows{suffix}"
    rows = [["id", "text", "label"]]
    rows += [["1", f'one, two; "three"\tand\n{i} \u2028', "ab"[i % 2]] for i in range(8)]
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream, delimiter=delimiter, lineterminator=end).writerows(rows)
    task = load_file(path)
    texts = {e.text for split in SPLITS for e in task.examples(split)}
    assert texts == {row[1].strip() for row in rows[1:]}
    assert task.class_names == ("a", "b")


def test_load_file_reads_long_texts_and_leaves_the_limit_of_csv(tmp_path):
    path, limit = tmp_path / "long.csv", csv.field_size_limit()
    path.write_text("text,label\n" + "".join(f"{i} {'x' * 300_000},{i % 2}\n" for i in range(6)))
    assert len(load_file(path).train[0].text) > 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b" Text;LABEL\na;b\n", "rename ' Text' to text and 'LABEL' to label"),
        ("a.csv", b"text|label\na|b\n", "got text.label in line 1 of .*; rename the columns"),
        ("a.tsv", b"text\tlabel\na\tb\tc\n", "put texts with tabs into quotes"),
        ("a.csv", b"text,label\n" + b"".join(b"%d,%d\n" % (i, i) for i in range(300)), "295 more"),
        ("a.csv", b"text\na\n", "got text in line 1 of .*; add the column label"),
        ("a.jsonl", b'{"label": "a"}\n', "got label in line 1 of .*; add the column text"),
        ("a.csv", b"text,text,label\na,b,c\n", "the column text once, got it 2 times in line 1"),
        ("a.csv", b"\r\n \n\na,b\n", "got a, b in line 4 of .*; rename the columns"),
        ("a.csv", b"\n\ntext,label\na,x\n,y\n", "got an empty one in line 5"),
        (
            "a.jsonl",
            b'{"text": "a\\ud800", "label": "b"}\n',
            r"valid Unicode, got '\\ud800' in line 1",
        ),
        ("a.csv", b"", "path must hold at least one row, got an empty"),
        ("a.csv", b"text,label\n", "path must hold at least one row, got an empty"),
        ("a.jsonl", b"\n\n", "path must hold at least one row, got an empty"),
        ("a.csv", b"txt,label\na,b\n", "must have the columns text and label, got txt, label in"),
        ("a.jsonl", b'{"text": "a"}\n', "must have the columns text and label, got text in line 1"),
        ("a.csv", b"text,label\na,x\nb,x\nc,x\n", r"at least two classes, got 1 \(x\)"),
        (
            "a.csv",
            b"text,label\na,x\na,x\nb,x\nc,y\n",
            "at least 3 different texts .* 'x' 2, 'y' 1",
        ),
        ("a.csv", b"text,label\na,x\nb,y\na,y\n", "got 'x' in line 2 and 'y' in line 4"),
        ("a.csv", b"text,label\na,x\n,y\n", "give each row a text, got an empty one in line 3"),
        ("a.csv", b"text,label\na,b,c\n", "as many columns in each row as in its header, 2, got"),
        ("a.csv", b'text,label\n"a,b\n', "must be a CSV file"),
        ("a.csv", b"text,label\n\xff,b\n", "must hold UTF-8 text, got byte 0xff at position 11"),
        ("a.jsonl", b'{"text": \n', "one JSON object per line, got a fault in line 1"),
        ("a.jsonl", b"[1, 2]\n", "one JSON object per line, got list in line 1"),
        ("a.jsonl", b'{"text": "a", "label": 0.5}\n', "strings .* got 'a' and 0.5 in line 1"),
        ("a.jsonl", b'{"text": null, "label": "b"}\n', "strings .* got None and 'b' in line 1"),
        ("a.pkl", b"\x80\x04.", r"path must end in .csv or .tsv or .jsonl, got .*a.pkl"),
    ],
)
def test_load_file_refuses(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TalosValueError, match=match):
        load_file(tmp_path / name)


def test_labels_like_numbers_are_read_as_they_are(tmp_path):
    """Two signs make no number, and Python reads none of thousands of digits."""
    for labels in (("--5", "3"), ("1" * 5000, "2")):
        path = write(
            tmp_path / "a.csv", [(f"{label} {i}", label) for label in labels for i in "abc"]
        )
        assert load_file(path).class_names == tuple(sorted(labels))
    path = write(tmp_path / "a.csv", [(f"{n} {i}", n) for n in ("10", "-5", "9") for i in "abc"])
    task = load_file(path)
    assert task.class_names == task.class_texts == ("-5", "9", "10")


def test_load_file_refuses_a_missing_file_and_wrong_arguments(tmp_path):
    with pytest.raises(TalosOSError, match=r"path must be a file that can be read, got .*none.csv"):
        load_file(tmp_path / "none.csv")
    path = write(tmp_path / "pets.csv", ROWS)
    with pytest.raises(TalosValueError, match="seed must be an integer of at least 0, got '1'"):
        load_file(path, seed="1")


def test_calibration_batches_hold_the_first_texts_of_the_order_by_length(tmp_path):
    from talos.app.experiments.judging import calibration_batches
    from talos.app.models import load_encoder
    from tests.tiny import save_tiny_encoder

    encoder = load_encoder(save_tiny_encoder(tmp_path / "tiny"))
    task = load_task("character_kind")
    options = {"count": 50, "batch_size": 8, "max_length": 32, "seed": 3}
    batches = calibration_batches(task, encoder, **options)
    given = task.batches("train", encoder.tokenizer, batch_size=50, max_length=32, seed=3)
    first = next(iter(given))
    rows = sorted(tuple(row[row > 0].tolist()) for batch in batches for row in batch["input_ids"])
    assert rows == sorted(tuple(row[row > 0].tolist()) for row in first["input_ids"])
    assert sorted(len(batch["labels"]) for batch in batches) == [2, 8, 8, 8, 8, 8, 8]
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    ranges = sorted((int(each.min()), int(each.max())) for each in lengths)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(ranges))
    assert [int(each.max()) for each in lengths] != sorted(int(each.max()) for each in lengths)
    again = calibration_batches(task, encoder, **options)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, again, strict=True))
