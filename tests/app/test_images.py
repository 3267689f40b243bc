"""Image tasks: folders and digits, splits that share no image, errors that name the file."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets

from talos.app.tasks import ImageExample, ImageTask, load_digits, load_image_folder
from talos.errors import TalosError, TalosOSError, TalosValueError
from tests.tiny_models import save_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_images(tmp_path / "pets", {"wild_cat": 30, "dog": 20})


def transform(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)


def test_splits_hold_every_image_once(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    (folder / "dog" / "notes.txt").write_text("no image")
    nested = folder / "dog" / "more"
    nested.mkdir()
    shutil.move(folder / "dog" / "003.png", nested / "003.PNG")
    task = load_image_folder(folder)
    assert task.name == "pets"
    assert task.class_names == ("dog", "wild_cat")
    assert task.class_texts == ("a photo of a dog", "a photo of a wild cat")
    splits = [task.train, task.validation, task.test]
    assert [Counter(example.label for example in split) for split in splits] == [
        {0: 16, 1: 24},
        {0: 2, 1: 3},
        {0: 2, 1: 3},
    ]
    files = [example.image for split in splits for example in split]
    assert sorted(files) == sorted(f for f in folder.rglob("*") if f.suffix.lower() == ".png")
    for split in splits:
        for example in split:
            assert task.class_names[example.label] in Path(example.image).parts
    again = load_image_folder(folder)
    assert [e.image for e in again.train] == [e.image for e in task.train]
    assert [e.image for e in load_image_folder(folder, seed=1).train] != files[:40]


def test_equal_images_come_once_and_never_in_two_classes(folder: Path) -> None:
    shutil.copy(folder / "dog" / "000.png", folder / "dog" / "copy.png")
    task = load_image_folder(folder)
    assert len(task.train) + len(task.validation) + len(task.test) == 50
    shutil.copy(folder / "dog" / "001.png", folder / "wild_cat" / "copy.png")
    with pytest.raises(
        TalosValueError, match=r"each image in one class, got .*001\.png and .*copy"
    ):
        load_image_folder(folder)


def test_batches(folder: Path) -> None:
    task = load_image_folder(folder)
    batches = task.batches("train", transform, batch_size=16, seed=3)
    assert len(batches) == 3
    first = list(batches)
    assert [len(batch["labels"]) for batch in first] == [16, 16, 8]
    assert first[0]["pixel_values"].shape == (16, 3, 24, 24)
    assert first[0]["pixel_values"].dtype == torch.float32
    bright = torch.cat([batch["pixel_values"] for batch in first]).mean((1, 2, 3)) > 125
    assert torch.equal(bright, torch.cat([batch["labels"] for batch in first]) == 0)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, batches, strict=True))
    batches.set_epoch(1)
    again = torch.cat([batch["pixel_values"] for batch in batches])
    assert not torch.equal(again, torch.cat([batch["pixel_values"] for batch in first]))
    labels = torch.cat([batch["labels"] for batch in batches.shortest_first()])
    assert labels.tolist() == [example.label for example in task.train]


def test_digits_are_scikit_learns() -> None:
    task = load_digits()
    assert (len(task.train), len(task.validation), len(task.test)) == (1439, 179, 179)
    assert task.class_texts[:2] == ("the digit zero", "the digit one")
    assert len(task.class_names) == 10
    reference = datasets.load_digits()
    known = {
        image.tobytes(): label
        for image, label in zip(
            np.round(reference.images * 255 / 16).astype(np.uint8), reference.target, strict=True
        )
    }
    for example in [*task.train, *task.validation, *task.test]:
        assert known[example.image.tobytes()] == example.label
    opened = task.train[0].open()
    assert (opened.mode, opened.size) == ("RGB", (8, 8))
    assert np.array_equal(np.asarray(opened)[..., 1], task.train[0].image)


def test_modes_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4)).save(path)
        assert ImageExample(path, 0).open().mode == "RGB"


def test_a_broken_image_is_named(folder: Path) -> None:
    task = load_image_folder(folder)
    broken = Path(task.test[0].image)
    whole = broken.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        broken.write_bytes(content)
        with pytest.raises(TalosValueError, match=f"images that can be read, got .*{broken.name}"):
            list(task.batches("test", transform))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_every_image_is_checked_before_the_work(folder: Path, suffix: str) -> None:
    load_image_folder(folder).check()
    broken = next(folder.iterdir()) / f"broken{suffix}"
    Image.effect_noise((64, 64), 50).save(broken)
    whole = broken.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) * 3 // 4]):
        broken.write_bytes(content)
        task = load_image_folder(folder)
        with pytest.raises(TalosValueError, match=f"images that can be read, got .*{broken.name}"):
            task.check()


def test_an_image_that_would_fill_the_memory_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TalosValueError, match=r"at most 100 pixels, got .*png with more; make it"):
        load_image_folder(folder).train[0].open()
    with pytest.raises(TalosValueError, match=r"at most 100 pixels, got .*png with more; make it"):
        load_image_folder(folder).check()


def test_folders_that_are_no_task_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match=r"path must be a folder that can be read, got .*none"):
        load_image_folder(tmp_path / "none")
    with pytest.raises(TalosValueError, match="at least two, got 0 in"):
        load_image_folder(folder / "dog")
    with pytest.raises(TalosValueError, match=r"seed must be an integer of at least 0, got 0\.5"):
        load_image_folder(folder, seed=0.5)
    for file in sorted((folder / "dog").iterdir())[2:]:
        file.unlink()
    with pytest.raises(TalosValueError, match=r"at least 3 different images .* got dog 2 in"):
        load_image_folder(folder)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"split": "dev"}, "split must be one of train, validation, test, got 'dev'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_batches_refuse(arguments: dict[str, object], match: str) -> None:
    task = ImageTask("t", "", ("a", "b"), ("a", "b"), [], [], [])
    with pytest.raises(TalosValueError, match=match):
        task.batches(**{"split": "train", "tokenizer": transform, **arguments})


@pytest.mark.parametrize(
    ("module", "remedy"),
    [("sklearn.datasets", 'pip install "scikit-learn"'), ("PIL.Image", 'pip install "pillow"')],
)
def test_a_missing_package_is_named(
    module: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TalosError, match=remedy):
        load_digits().train[0].open()
