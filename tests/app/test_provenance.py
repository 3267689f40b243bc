"""What masks and vectors say of how they were made, and what commands do with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from talos.app.cli import main
from talos.app.cli.loading import load_data
from talos.app.models import load_encoder
from talos.app.provenance import differences, made_with
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.app.test_reading import pets, write
from tests.tiny import save_tiny_encoder
from tests.tiny_models import CLIP, save_images, save_tiny_clip

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a mask and a vector of texts of 16 tokens."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_encoder(folder / "tiny")
    with Path(pets(folder / "pets.csv")).open("a") as stream:
        stream.write("meow and many more words than the others have,cat\n")  # one that is cut
    common = ["--model", str(folder / "tiny"), "--data", str(folder / "pets.csv")]
    mask, vector = folder / "mask.safetensors", folder / "vector.safetensors"
    scored = ["--samples", "16", "--rounds", "1", "--max-length", "16"]
    assert main(["calibrate", *common, *scored, "--out", str(mask)]) == 0
    trained = ["--mask", str(mask), "--steps", "8", "--lr", "0.01"]
    assert main(["train", *common, *trained, "--out", str(vector)]) == 0
    return folder


def words(folder: Path, data: str | None = None, *, model: str = "tiny") -> list[str]:
    return ["--model", str(folder / model), "--data", data or str(folder / "pets.csv")]


def train(
    folder: Path, tmp_path: Path, *options: str, data: str | None = None, steps: int = 2
) -> int:
    out = ["--overwrite", "--out", str(tmp_path / "out.safetensors")]
    return main(["train", *words(folder, data), "--steps", str(steps), *out, *options])


def test_files_hold_what_they_were_made_with(made: Path) -> None:
    mask, vector = (
        Mask.load(made / "mask.safetensors"),
        TaskVector.load(made / "vector.safetensors"),
    )
    facts = {
        "task": "pets",
        "model": "tiny",
        "class_names": ["cat", "dog"],
        "class_texts": ["cat", "dog"],
        "max_length": 16,
        "data": load_data(str(made / "pets.csv")).fingerprint(),
    }
    assert mask.metadata.items() >= facts.items()
    assert len(mask.metadata["base"]) == 16
    trained = {"method": "talos", "steps": 8, "lr": 0.01, "seed": 0}
    assert vector.metadata.items() >= (facts | trained).items()


def test_the_length_comes_from_the_files(made: Path, tmp_path: Path, capsys: Capture) -> None:
    mask, vector = str(made / "mask.safetensors"), str(made / "vector.safetensors")
    assert train(made, tmp_path, "--mask", mask) == 0
    assert "cut at 16 tokens" in capsys.readouterr().err
    assert TaskVector.load(tmp_path / "out.safetensors").metadata["max_length"] == 16
    assert main(["eval", *words(made), "--vector", vector]) == 0
    err = capsys.readouterr().err
    assert "cut at 16 tokens" in err
    assert "warning" not in err
    other = pets(tmp_path / "birds.csv", labels=("crow", "owl"))
    assert main(["eval", *words(made), "--data", other, "--vector", vector]) == 0
    assert "cut at" not in capsys.readouterr().err.split("birds.csv:")[1]
    assert main(["eval", *words(made), "--vector", vector, "--max-length", "20"]) == 0
    warning = f"warning: {vector} was made with 16 tokens of a text of pets, got 20; leave"
    assert warning in capsys.readouterr().err
    assert train(made, tmp_path, "--mask", mask, "--max-length", "20") == 0
    assert f"warning: {mask} was made with 16 tokens" in capsys.readouterr().err


def test_eval_cuts_each_task_at_its_own_length(made: Path, tmp_path: Path) -> None:
    """The same figures as with both lengths given, one task at a time."""
    other = pets(tmp_path / "long.csv", more=" purr" * 6)
    vector = str(made / "vector.safetensors")
    figures: dict[str, dict[str, str]] = {}
    tokens: dict[str, int] = {}
    for name, options in {
        "both": ["--data", str(made / "pets.csv"), "--data", other],
        "pets": ["--data", str(made / "pets.csv"), "--max-length", "16"],
        "long": ["--data", other, "--max-length", "48"],
    }.items():
        out = tmp_path / f"{name}.json"
        common = ["--model", str(made / "tiny"), "--vector", vector, "--json", str(out)]
        assert main(["eval", *common, *options]) == 0
        record = json.loads(out.read_text())
        figures[name] = record["outcomes"]["edited"]
        tokens |= {task: each["max_length"] for task, each in record["tasks"].items()}
    assert figures["both"] == figures["pets"] | figures["long"]
    assert tokens == {"pets": 16, "long": 48}


def test_a_mask_of_other_weights_is_refused(made: Path, tmp_path: Path, capsys: Capture) -> None:
    from transformers import AutoModel

    other = tmp_path / "other"
    save_tiny_encoder(other)
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    model.save_pretrained(other)
    mask, out = str(made / "mask.safetensors"), tmp_path / "out.safetensors"
    arguments = ["--model", str(other), "--data", str(made / "pets.csv"), "--mask", mask]
    arguments += ["--steps", "1", "--out", str(out)]
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"error: --mask must be calibrated on the weights of --model other, got {mask} of other "
        "weights; calibrate again, or pass --force to train its entries here\n"
    )
    assert not out.exists()
    assert main(["train", *arguments, "--force"]) == 0
    assert out.exists()
    assert train(made, tmp_path, "--force") == 2
    assert "--force must be left out without --mask" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [f"meow {i},{('cat', 'owl')[i % 2]}" for i in range(60)],
            "was made with other labels of pets (cat, dog) than pets.csv has (cat, owl)",
        ),
        (
            [
                f"meow {i},{('cat', 'dog')[i % 2]},{'a tame cat' if i == 0 else ''}"
                for i in range(60)
            ],
            "was made with other texts of the labels of pets (cat, dog) than pets.csv has (a tame "
            "cat, dog)",
        ),
        (
            [f"meow {i},{('cat', 'dog')[i % 2]}" for i in range(62)],
            "it may have been made with some of them",
        ),
    ],
    ids=["labels", "label texts", "rows"],
)
def test_data_that_changed_are_said(
    rows: list[str], line: str, made: Path, tmp_path: Path, capsys: Capture
) -> None:
    columns = "text,label,label_text" if rows[0].count(",") == 2 else "text,label"
    data = write(tmp_path / "pets.csv", columns, *rows)
    assert main(["eval", *words(made, data), "--vector", str(made / "vector.safetensors")]) == 0
    assert line in capsys.readouterr().err
    assert train(made, tmp_path, "--mask", str(made / "mask.safetensors"), data=data) == 0
    assert line in capsys.readouterr().err


def test_files_of_another_task_are_said(made: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "animals.csv"
    data.write_bytes((made / "pets.csv").read_bytes())
    vector, mask = made / "vector.safetensors", made / "mask.safetensors"
    assert main(["eval", *words(made, data), "--vector", str(vector)]) == 0
    assert f"warning: {vector} was made for pets, not for animals;" in capsys.readouterr().err
    assert train(made, tmp_path, "--mask", str(mask), data=data) == 0
    assert f"warning: {mask} was made for pets, not for animals;" in capsys.readouterr().err
    both = ["--data", str(made / "pets.csv")]
    assert main(["eval", *words(made, data), *both, "--vector", str(vector)]) == 0
    assert "was made for" not in capsys.readouterr().err


def test_a_file_without_metadata_differs_in_nothing(made: Path) -> None:
    task = load_data(str(made / "pets.csv"))
    facts: dict[str, Any] = made_with(task, load_encoder(str(made / "tiny")), 32)
    assert differences(task, 32, "f", facts) == []
    assert differences(task, 32, "f", {"task": "pets"}) == []
    assert differences(task, 48, "f", {"task": "other", "max_length": 16}) == []
    summed = {"sum": [{"scale": 0.5, "of": facts}, {"scale": 0.5, "of": facts}]}
    assert len(differences(task, 48, "f", summed)) == 1
    broken = {"task": "pets", "class_names": "cat", "class_texts": 3, "max_length": "16"}
    assert len(differences(task, 48, "f", broken)) == 1


def test_images_have_no_length(tmp_path: Path, capsys: Capture) -> None:
    weights = save_tiny_clip(tmp_path / "clip")
    images = save_images(tmp_path / "bright", {"dark": 10, "light": 10})
    mask = tmp_path / "mask.safetensors"
    arguments = ["calibrate", "--model", f"openclip:{CLIP}:{weights}", "--data", str(images)]
    arguments += ["--samples", "8", "--rounds", "1", "--out", str(mask)]
    assert main([*arguments, "--max-length", "16"]) == 2
    assert "error: --max-length must be left out with images, got 16" in capsys.readouterr().err
    assert main(arguments) == 0
    metadata = Mask.load(mask).metadata
    assert "max_length" not in metadata
    assert metadata["class_texts"] == ["a photo of a dark", "a photo of a light"]


def test_a_loss_that_does_not_fall_is_said(made: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train(made, tmp_path, "--lr", "100", steps=12) == 0
    pattern = r"warning: the loss is \d\.\d+ in .* in the last, and guessing has 0.693; train with "
    err = capsys.readouterr().err
    assert re.search(pattern + "an --lr below 100, or with more --steps", err), err
    assert train(made, tmp_path, "--lr", "0.01", steps=12) == 0
    assert "warning" not in capsys.readouterr().err
    out = tmp_path / "out.safetensors"
    before = out.read_bytes()
    assert train(made, tmp_path, "--lr", "1e30", steps=12) == 2
    assert "error: --lr must keep the loss finite, got nan at step" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_merge_with_linearized_vectors_is_said(tmp_path: Path, capsys: Capture) -> None:
    mask = Mask.from_dense({"w": torch.ones(20) > 0})
    files = []
    for method in ("linearized", "talos", "linearized"):
        files.append(str(tmp_path / f"{len(files)}.safetensors"))
        TaskVector(mask, torch.ones(20), metadata={"method": method}).save(files[-1])
    out = ["--overwrite", "--out", str(tmp_path / "sum.safetensors")]
    assert main(["merge", files[0], files[2], *out]) == 0
    assert "warning" not in capsys.readouterr().err
    for method in ("task_arithmetic", "ties"):
        assert main(["merge", *files[:2], "--method", method, *out]) == 0
        assert (
            "those of talos without it; no evaluation fits their merge" in capsys.readouterr().err
        )


def test_an_export_of_a_linearized_vector_is_said(tmp_path: Path, capsys: Capture) -> None:
    vector, out = str(tmp_path / "v.safetensors"), str(tmp_path / "delta.safetensors")
    mask = Mask.from_dense({"w": torch.ones(2) > 0})
    for method, said in (("talos", False), ("linearized", True)):
        TaskVector(mask, torch.ones(2), metadata={"method": method}).save(vector, overwrite=True)
        exported = ["--format", "delta", "--out", out, "--overwrite"]
        assert main(["export", vector, *exported]) == 0
        assert ("is another function than was trained" in capsys.readouterr().err) == said


def test_runs_that_read_other_texts_are_said(made: Path, tmp_path: Path, capsys: Capture) -> None:
    files = []
    for tokens in ("16", "20"):
        files.append(str(tmp_path / f"{tokens}.json"))
        assert main(["eval", *words(made), "--max-length", tokens, "--json", files[-1]]) == 0
    capsys.readouterr()
    assert main(["compare", files[0], files[0]]) == 0
    assert "warning" not in capsys.readouterr().err
    record = json.loads(Path(files[1]).read_text())
    Path(files[1]).write_text(json.dumps(record | {"model": "other"}))
    assert main(["compare", *files]) == 0
    err = capsys.readouterr().err
    expected = f"cut at different lengths: 16 tokens in {files[0]}, 20 tokens in {files[1]}"
    assert f"warning: the texts of pets were {expected}" in err
    assert "warning: the runs are of different models: " in err
