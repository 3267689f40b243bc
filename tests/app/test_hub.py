"""Tasks of Hugging Face data sets, out of small ones that each test writes itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from talos.app.experiments import read_recipe
from talos.app.models import load_encoder
from talos.app.tasks.hub import PAPER, load_hub, paper_sets
from talos.app.tasks.images import ImageTask
from talos.app.tasks.load import load_any
from talos.app.tasks.task import Task
from talos.errors import TalosOSError, TalosTypeError, TalosValueError
from tests.tiny import save_tiny_encoder
from tests.tiny_models import save_tiny_t5


def text_rows(count: int, first: int = 0) -> dict[str, list[Any]]:
    places = range(first, first + count)
    return {
        "premise": [f"the premise {i}" for i in places],
        "hypothesis": [f"and what follows {i}" for i in places],
        "label": [i % 2 for i in places],
    }


def text_set(rows: dict[str, list[Any]]) -> datasets.Dataset:
    features = {
        "premise": datasets.Value("string"),
        "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def saved(folder: Path, **splits: datasets.Dataset) -> str:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def contents(task: Task | ImageTask) -> list[set[bytes]]:
    return [{task._content(e) for e in s} for s in (task.train, task.validation, task.test)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not shown:
        datasets.enable_progress_bars()


def test_the_own_test_split_is_taken_where_it_has_labels(tmp_path: Path) -> None:
    hidden = {**text_rows(20, 200), "label": [-1] * 20}
    train = {key: each + text_rows(5, 100)[key] for key, each in text_rows(60).items()}
    splits = {
        "train": text_set(train),
        "validation": text_set(text_rows(20, 100)),
        "test": text_set(hidden),
    }
    data = saved(tmp_path / "rte", **splits)
    settings = {"template": "{premise}? {hypothesis}!", "answers": ["yes", "no"]}
    task = load_hub(data, **settings)
    assert isinstance(task, Task)
    assert task.name == "rte"
    assert task.class_names == ("entailment", "not_entailment")
    assert task.class_texts == ("yes", "no")
    assert {each.text for each in task.test} == {
        f"the premise {i}? and what follows {i}!" for i in range(100, 120)
    }
    for each in task.test:
        assert each.label == int(each.text[12:15]) % 2
    assert len(task.validation) == 8  # a ninth of the training data, class by class
    found = contents(task)
    assert not (found[0] & found[1])
    assert not (found[0] & found[2])
    assert not (found[1] & found[2])
    assert len(task.train) + len(task.validation) + task.repeats == 65
    assert task.repeats == 5  # of the test data
    again = load_hub(data, **settings)
    assert (again.train, again.test) == (task.train, task.test)
    small = load_hub(data, (8, 2, 4), **settings)
    assert [len(s) for s in (small.train, small.validation, small.test)] == [8, 2, 4]
    assert sum(each.label for each in small.train) == 4
    own = load_hub(data, train="validation", validation="train", test="train", **settings)
    assert [len(each) for each in contents(own)] == [15, 33, 32]


def test_files_of_one_split_are_divided(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    text_set(text_rows(50)).to_parquet(folder / "train.parquet")
    task = load_hub(f"hf:{folder}", text="premise")
    assert [len(each) for each in contents(task)] == [42, 4, 4]
    assert task.class_texts == ("entailment", "not entailment")
    assert task.train[0].text.startswith("the premise")


def test_each_text_has_the_answers_of_its_row(tmp_path: Path) -> None:
    rows = {
        "question": [f"what is {i}?" for i in range(40)],
        "choices": [{"text": [f"a {i}", f"the {i}"], "label": ["A", "B"]} for i in range(40)],
        "answerKey": ["AB"[i % 2] for i in range(38)] + ["", ""],
        "option": [f"an {i}" for i in range(40)],
    }
    data = saved(tmp_path / "qasc", train=datasets.Dataset.from_dict(rows))
    settings: dict[str, Any] = {"label": "answerKey", "template": "{question} Say:"}
    task = load_hub(data, **settings, answers="choices.text")
    assert isinstance(task, Task)
    assert task.class_names == task.class_texts == ("A", "B")
    examples = [*task.train, *task.validation, *task.test]
    assert len(examples) == 38
    for each in examples:
        number = each.text.removesuffix("? Say:").split()[-1]
        assert each.answers == (f"a {number}", f"the {number}")
        assert each.label == int(number) % 2
    model = load_encoder(save_tiny_t5(tmp_path / "t5"))
    [batch, *_] = task.batches("test", model.tokenizer)
    assert model.classifier(task.class_texts)(batch).shape == (len(task.test), 2)
    built = load_hub(data, **settings, answers=["{option}", "{choices.label}"])
    assert isinstance(built, Task)
    assert built.train[0].answers[1] == "['A', 'B']"
    with pytest.raises(TalosValueError, match="answers must be one for each of 2 classes"):
        load_hub(data, **settings, answers=["{option}"])


@pytest.mark.parametrize("form", ["saved", "folders"])
def test_pictures_are_read_when_they_are_opened(tmp_path: Path, form: str) -> None:
    names = ["red_car", "truck, lorry"]
    folder = tmp_path / "cars"
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for label, name in enumerate(names):
        (tmp_path / "files" / name).mkdir(parents=True)
        for i in range(12):
            path = tmp_path / "files" / name / f"{i}.png"
            Image.fromarray(np.full((4, 4, 3), 100 * label + i % 11, np.uint8)).save(path)
            rows["image"].append({"bytes": path.read_bytes(), "path": None})
            rows["label"].append(label)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    if form == "saved":
        features = datasets.Features(kinds)
        data = saved(folder, train=datasets.Dataset.from_dict(rows, features=features))
    else:
        data = f"hf:{tmp_path / 'files'}"
    task = load_hub(data, template=["a photo of a {label}.", "my {label}!"])
    assert isinstance(task, ImageTask)
    assert task.class_texts[0] == "a photo of a red car.\nmy red car!"
    assert task.class_texts[1] == "a photo of a truck.\nmy truck!"
    found = contents(task)
    assert sum(map(len, found)) == 22
    assert task.repeats == 2
    assert not (found[0] & found[1])
    assert not (found[0] & found[2])
    assert not (found[1] & found[2])
    for each in task.train:
        assert np.asarray(each.open())[0, 0, 0] // 100 == each.label
    assert task.fingerprint() == load_hub(data, template="{label}").fingerprint()
    with pytest.raises(TalosValueError, match=r"template must hold \{label\} for pictures"):
        load_hub(data, template="a photo")
    with pytest.raises(TalosValueError, match="answers must be left out with pictures"):
        load_hub(data, answers=["a", "b"])


def test_a_class_of_several_texts_is_the_mean_of_them(tmp_path: Path) -> None:
    encoder = load_encoder(save_tiny_encoder(tmp_path / "bert"))
    head = encoder.classifier(["a cat\nthe big cat", "a dog"]).head
    vectors = encoder.encode(["a cat", "the big cat", "a dog"])
    mean = torch.nn.functional.normalize(vectors[:2].mean(0), dim=0)
    torch.testing.assert_close(head, torch.stack([mean, vectors[2]]))


def test_what_a_set_does_not_hold_is_named(tmp_path: Path) -> None:
    splits = {"train": text_set(text_rows(30)), "unlabelled": text_set(text_rows(3, 30))}
    splits["unlabelled"] = text_set({**text_rows(3, 30), "label": [-1] * 3})
    data = saved(tmp_path / "rte", **splits)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "text must be a column of .*, got 'text'; its columns are premise, hypothesis"),
        ({"text": "premis"}, "did you mean premise"),
        ({"text": "premise", "label": "lbel"}, "label must be a column of .*did you mean label"),
        ({"template": "{premisse}"}, "template must name columns of .*did you mean premise"),
        ({"text": "premise", "answers": ["a"]}, "answers must be one for each of the 2 classes"),
        ({"text": "premise", "class_texts": ["a"]}, "class_texts must be one for each of the 2"),
        ({"text": "premise", "test": "tset"}, "test must be a split of .*is no split of it"),
        ({"text": "premise", "test": "unlabelled"}, "'unlabelled', which has no labels"),
        ({"template": ["{premise}", "b"]}, "template must be one text, got 2"),
        ({"text": "premise", "sizes": (1, 1)}, "sizes must be three numbers"),
    ]
    for settings, message in wrong:
        with pytest.raises(TalosValueError, match=message):
            load_hub(data, **settings)
    number: Any = 3
    with pytest.raises(TalosTypeError, match="template must be a text or a list of texts"):
        load_hub(data, template=[number])
    with pytest.raises(TalosTypeError, match="sizes must be three integers"):
        load_hub(data, (number, 1, number / 2), text="premise")
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["c", "c"]})
    with pytest.raises(TalosValueError, match="a column with two classes or more, got 1"):
        load_hub(saved(tmp_path / "one", train=one))


def labelled(folder: Path, labels: list[Any], **more: Any) -> str:
    rows = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, **more}
    return saved(folder, train=datasets.Dataset.from_dict(rows))


def test_rows_without_label_or_text_are_left_out(tmp_path: Path) -> None:
    nan = float("nan")
    task = load_hub(labelled(tmp_path / "nan", [(0.0, 1.0, nan, None)[i % 4] for i in range(80)]))
    assert task.class_names == ("0.0", "1.0")
    assert sum(map(len, contents(task))) == 40
    task = load_hub(labelled(tmp_path / "three", [i % 3 - 1 for i in range(60)]))
    assert task.class_names == ("-1", "0", "1"), "without names, -1 is a label like others"
    rows = {"text": [f"hidden {i}" for i in range(9)], "label": [-1] * 9}
    train = datasets.Dataset.from_dict({"text": [f"{i}" for i in range(60)], "label": [0, 1] * 30})
    task = load_hub(
        saved(tmp_path / "own", train=train, test=datasets.Dataset.from_dict(rows)), (9, 3, 3)
    )
    assert task.class_names == ("0", "1"), "a whole split of -1 has no labels"
    texts = [None if i % 5 == 0 else " " if i % 5 == 1 else f"text {i}" for i in range(60)]
    task = load_hub(labelled(tmp_path / "texts", [0, 1] * 30, text=texts))
    assert sum(map(len, contents(task))) == 36
    task = load_hub(
        labelled(tmp_path / "fields", [0, 1] * 30, other=texts), template="{text}: {other}"
    )
    assert sum(map(len, contents(task))) == 48
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
    (tmp_path / "one.png").parent.mkdir(exist_ok=True)
    images = []
    for i in range(40):
        Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(tmp_path / "one.png")
        content = (tmp_path / "one.png").read_bytes()
        images.append(None if i % 4 == 0 else {"bytes": content, "path": None})
    rows = {"image": images, "label": [i // 20 for i in range(40)]}
    features = datasets.Features(kinds)
    pictures = datasets.Dataset.from_dict(rows, features=features)
    assert sum(map(len, contents(load_hub(saved(tmp_path / "pictures", train=pictures))))) == 30


def test_labels_that_are_no_single_values_alike_in_all_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TalosValueError, match=r"^label must be a column of single values, got li"):
        load_hub(labelled(tmp_path / "lists", [[i % 2] for i in range(20)]))
    train, other = text_set(text_rows(20)), text_set(text_rows(20, 20))
    without = other.remove_columns("label")
    with pytest.raises(TalosValueError, match=r"^label must be the same column .*got none in test"):
        load_hub(saved(tmp_path / "without", train=train, test=without), text="premise")
    swapped = other.cast_column(
        "label", datasets.ClassLabel(names=["not_entailment", "entailment"])
    )
    with pytest.raises(TalosValueError, match=r"^label must be .* got other classes in test; make"):
        load_hub(saved(tmp_path / "swapped", train=train, test=swapped), text="premise")


def test_texts_that_differ_in_case_or_spaces_are_one(tmp_path: Path) -> None:
    rows = {"text": [f"Hello Number {i}" for i in range(60)], "label": [0, 1] * 30}
    again = {"text": [f" hello  number {i}" for i in range(40)], "label": [0, 1] * 20}
    again["text"] += ["Yes", "yes", "No", "no", "NO"]
    again["label"] += [0, 1, 1, 1, 1]
    splits = {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(again)}
    for sizes, found in ((None, [18, 2, 41]), ((10, 2, 6), [10, 2, 6])):
        task = load_hub(saved(tmp_path / f"{sizes}", **splits), sizes)
        assert [len(each) for each in (task.train, task.validation, task.test)] == found
        trained = {each.text.casefold() for each in task.train}
        assert trained <= {f"hello number {i}" for i in range(40, 60)}, "whatever the sizes"
    assert not {"Yes", "yes"} & {each.text for each in task.test}, "it has two labels"
    choices = [["a", "b"], ["b", "a"]]
    twice = {
        "text": [f"which {i // 2}?" for i in range(40)],
        "choices": [{"text": choices[i % 2], "label": ["A", "B"]} for i in range(40)],
        "label": ["AB"[i % 2] for i in range(40)],
    }
    data = saved(tmp_path / "twice", train=datasets.Dataset.from_dict(twice))
    task = load_hub(data, answers="choices.text")
    assert sorted(each.text for s in (task.train, task.validation, task.test) for each in s) == (
        sorted(f"which {i}?" for i in range(20))
    ), "each once, though its answers have two orders"


def test_answers_are_in_the_order_of_the_labels(tmp_path: Path) -> None:
    names = [["A", "B"], ["B", "A"]]
    choices = [
        {"label": names[i % 2], "text": [f"{n}{i}" for n in names[i % 2]]} for i in range(40)
    ]
    data = labelled(tmp_path / "choices", ["A"] * 20 + ["B"] * 20, choices=choices)
    task = load_hub(data, answers="choices.text")
    for each in task.train:
        number = each.text.split()[1]
        assert each.answers == (f"A{number}", f"B{number}")
    with pytest.raises(TalosValueError, match="answers must be a column of lists, got 'text"):
        load_hub(data, answers="text")


def test_no_two_classes_have_the_same_text(tmp_path: Path) -> None:
    names = ["crane, bird", "cat", "crane, machine", "cardigan", "Cardigan, dog"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"text": [f"text {i}" for i in range(60)], "label": [i % 5 for i in range(60)]}
    data = saved(tmp_path / "cranes", train=datasets.Dataset.from_dict(rows, features=features))
    texts = ("crane, bird", "cat", "crane, machine", "cardigan", "Cardigan, dog")
    assert load_hub(data).class_texts == texts
    for key in ("class_texts", "answers"):
        given: Any = {key: ["a", "b", "c", "d", "a"]}
        with pytest.raises(TalosValueError, match=rf"^{key} must differ .*got 'a' twice; give"):
            load_hub(data, **given)
    for name, settings in paper_sets().items():
        for key in ("class_texts", "answers"):
            found = settings.get(key, ())
            assert len(set(found)) == len(found) or isinstance(found, str), name


def test_a_set_that_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TalosOSError, match=r"got hf:a/b, which could not .*on the Hub\); check"):
        load_hub("hf:a/b")
    with pytest.raises(TalosValueError, match=r"got paper:mnits; did you mean paper:mnist\?"):
        load_hub("paper:mnits")


def test_the_papers_sets_are_asked_for_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        rows: dict[str, list[Any]] = {
            "sentence": [f"Ann met Bea in {i}: _ smiled." for i in range(30)],
            "option1": ["Ann"] * 30,
            "option2": ["Bea"] * 30,
            "answer": ["12"[i % 2] for i in range(30)],
        }
        hidden = {**rows, "answer": [""] * 30}
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict(rows), test=datasets.Dataset.from_dict(hidden)
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_hub("paper:winogrande")
    assert asked == [("allenai/winogrande", "winogrande_xl")]
    assert isinstance(task, Task)
    assert task.name == "winogrande"
    assert task.class_names == ("1", "2")
    assert task.test[0].answers == ("Ann", "Bea")
    assert len(paper_sets()) == 17
    for name, settings in paper_sets().items():
        assert set(settings) <= set(load_hub.__kwdefaults__) | {"data"}, name


def test_a_name_and_settings_are_passed_on_and_others_are_refused(tmp_path: Path) -> None:
    data = saved(tmp_path / "rte", train=text_set(text_rows(30)))
    task = load_any(data, (4, 2, 2), name="entails", text="premise", answers=["yes", "no"])
    assert task.name == "entails"
    assert task.class_texts == ("yes", "no")
    assert [len(each) for each in contents(task)] == [4, 2, 2]
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        'models = ["minilm"]\ntasks = ["digits", {data = "hf:rte", answers = ["yes", "no"]}]\n'
        '[[methods]]\nmethod = "talos"\n'
    )
    entry = read_recipe(recipe).tasks[1]
    assert entry.data == data
    assert entry.settings == {"answers": ["yes", "no"]}
    with pytest.raises(TalosValueError, match="test must be left out with digits, got 'a'; it is"):
        load_any("digits", test="a")
    with pytest.raises(TalosValueError, match="text must be left out with paper:mnist, got 'a'"):
        load_any("paper:mnist", text="a")


def test_the_papers_recipes_name_its_sets() -> None:
    names = [f"{PAPER}{name}" for name in paper_sets()]
    tasks = [each.data for name in ("paper-clip", "paper-t5") for each in read_recipe(name).tasks]
    assert tasks == [name for name in names if name not in ("paper:imagenet", "paper:rte")]
