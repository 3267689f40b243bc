"""From training on the command line to a model in use: names, folders, heads, predictions."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import talos
from talos.app.cli import main
from talos.app.cli.loading import load_data
from talos.app.experiments.judging import logits_of
from talos.app.models import load_encoder
from talos.app.models.heads import HEAD_FILE, load_heads, save_heads
from talos.app.models.packages import Packaged
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.app.test_cli import refused
from tests.cases import assert_bit_equal
from tests.house.test_pages import ROOT, blocks_of, commands_of
from tests.tiny import save_tiny_encoder
from tests.tiny_models import (
    CLIP,
    save_images,
    save_tiny_clip,
    save_tiny_gpt2,
    save_tiny_t5,
    save_tiny_transformers_clip,
)


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def write_rows(path: Path, rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(rows.items())
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, a task `pets.csv` of three labels, its mask and its vector."""
    home = tmp_path_factory.mktemp("production")
    save_tiny_encoder(home / "base")
    sounds = {"cat": "meow", "dog": "woof", "cow": "moo"}
    rows = {f"{sound * (1 + i % 3)} {i}": pet for pet, sound in sounds.items() for i in range(40)}
    write_rows(home / "pets.csv", rows)
    train(home, ["--model", str(home / "base"), "--data", str(home / "pets.csv")])
    return home


def run_page(text: str, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """Runs the blocks of a page as they are; `minilm` is the model in `base`."""
    monkeypatch.setattr(Packaged, "file", lambda self: base / "model.safetensors")
    for block in blocks_of(text):
        if block.language == "python":
            exec(compile(block.code, "page", "exec"), {})
        for words in commands_of(block.code) if block.language == "bash" else ():
            assert words[0] == "talos"
            run(*words[1:])


def train(home: Path, common: list[str]) -> None:
    """Writes `mask.safetensors` and `vector.safetensors` as the command line makes them."""
    scored = ["--samples", "24", "--rounds", "2", "--density", "0.3", "--batch-size", "8"]
    run("calibrate", *common, *scored, "--out", home / "mask.safetensors")
    trained = ["--steps", "12", "--lr", "0.01", "--batch-size", "8"]
    mask, out = home / "mask.safetensors", home / "vector.safetensors"
    run("train", *common, *trained, "--mask", mask, "--out", out)


def test_mask_and_vector_fit_the_users_own_model(home: Path) -> None:
    model = AutoModel.from_pretrained(home / "base")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    vector = TaskVector.load(home / "vector.safetensors")
    vector.apply_(model)
    for name, each in model.state_dict().items():
        changed = vector.to_dense(name) if name in vector.mask.names else 0
        assert torch.equal(each, before[name] + changed)
    assert any(vector.to_dense(name).any() for name in vector.mask.names)
    optimizer = talos.SparseAdam(model, talos.Mask.load(home / "mask.safetensors"))
    assert optimizer.task_vector().mask == vector.mask


@pytest.mark.parametrize("kept", ["all", "changed"])
def test_an_extracted_vector_merges_with_a_trained_one(
    kept: str, home: Path, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(home / "base")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[:4] += 0.25
    model.save_pretrained(tmp_path / "tuned")
    made, edit = tmp_path / "made.safetensors", tmp_path / "edit.safetensors"
    run("extract", home / "base", tmp_path / "tuned", "--mask", kept, "--out", made)
    trained = TaskVector.load(home / "vector.safetensors")
    assert set(trained.mask.names) <= set(TaskVector.load(made).mask.names)
    run("merge", f"{home}/vector.safetensors:0.5", f"{made}:1", "--out", edit)
    words = ["--model", home / "base", "--data", home / "pets.csv"]
    run("eval", *words, "--vector", made)
    run("eval", *words, "--vector", edit)
    name = "encoder.layer.0.attention.self.query.weight"
    both = 0.5 * trained.to_dense(name) + TaskVector.load(made).to_dense(name)
    torch.testing.assert_close(TaskVector.load(edit).to_dense(name), both)


@pytest.mark.parametrize(
    ("save", "auto"),
    [(save_tiny_t5, AutoModelForSeq2SeqLM), (save_tiny_gpt2, AutoModelForCausalLM)],
    ids=["t5", "gpt2"],
)
def test_a_language_models_vector_fits_its_own_class(
    save: Callable[[Path], Path], auto: type[AutoModel], home: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model")
    train(tmp_path, ["--model", str(folder), "--data", str(home / "pets.csv")])
    model = auto.from_pretrained(folder)
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    vector.apply_(model)
    run("export", tmp_path / "vector.safetensors", "--base", folder, "--out", tmp_path / "out")
    for name, each in auto.from_pretrained(tmp_path / "out").state_dict().items():
        assert_bit_equal(each, model.state_dict()[name])


def test_a_clip_vector_fits_open_clip(tmp_path: Path) -> None:
    weights = save_tiny_clip(tmp_path / "clip")
    images = save_images(tmp_path / "bright", {"dark": 40, "light": 40})
    train(tmp_path, ["--model", f"openclip:{CLIP}:{weights}", "--data", str(images)])
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    assert all(name.startswith("visual.") for name in vector.mask.names)
    vector.apply_(open_clip.create_model(CLIP, pretrained=str(weights)))


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    """The folder `out`, which `talos export --data` wrote of the vector."""
    words = ["--base", home / "base", "--data", home / "pets.csv", "--out", home / "out"]
    run("export", home / "vector.safetensors", *words)
    return home / "out"


def edited_logits(home: Path, model: str, data: Path, split: str) -> torch.Tensor:
    """What `talos eval --vector` judges: the base's own classifier with the vector on it."""
    task = load_data(str(data))
    classifier = load_encoder(model).classifier(task.class_texts)
    with TaskVector.load(home / "vector.safetensors").applied(classifier):
        return logits_of(classifier, task, split)


def accuracy_of_eval(capsys: pytest.CaptureFixture[str], *words: object) -> list[float]:
    """The accuracies that `talos eval` prints: pretrained and edited."""
    capsys.readouterr()
    run("eval", *words, "--json", "-")
    figures = json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["tasks"]["pets"]
    return [figures[key]["value"] for key in ("pretrained", "edited") if figures.get(key)]


def test_the_folder_is_the_same_classifier_bit_for_bit(home: Path, exported: Path) -> None:
    task = load_data(str(home / "pets.csv"))
    encoder = load_encoder(exported)
    head = encoder.heads["pets"]
    assert (head.class_names, head.class_texts) == (task.class_names, task.class_texts)
    for split in ("validation", "test"):
        logits = logits_of(head.classifier(encoder), task, split)
        wanted = edited_logits(home, str(home / "base"), home / "pets.csv", split)
        assert_bit_equal(logits, wanted)
    rebuilt = encoder.classifier(task.class_texts)
    assert not torch.equal(rebuilt.head, head.tensor)  # so it must be saved


def test_predictions_are_those_that_eval_judges(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_data(str(home / "pets.csv"))
    capsys.readouterr()
    run("predict", "--model", exported, "--data", home / "pets.csv", "--split", "test")
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    assert [row["text"] for row in rows] == [example.text for example in task.test]
    assert [row["label"] for row in rows] == [task.class_names[each.label] for each in task.test]
    again = write_rows(tmp_path / "again.csv", {row["text"]: row["label"] for row in rows})
    run("predict", "--model", exported, "--data", again)
    assert capsys.readouterr().out == captured.out
    logits = edited_logits(home, str(home / "base"), home / "pets.csv", "test")
    for row, each in zip(rows, logits.double().softmax(1), strict=True):
        assert row["prediction"] == task.class_names[each.argmax()]
        assert (
            row["probability"] == row[f"p({row['prediction']})"] == str(round(float(each.max()), 6))
        )
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert f"{right} of 12 labels were predicted: {100 * right / 12:.1f} %" in captured.err
    vector = ["--vector", home / "vector.safetensors"]
    words = ["--data", home / "pets.csv"]
    assert accuracy_of_eval(capsys, "--model", home / "base", *words, *vector)[-1] == right / 12
    assert accuracy_of_eval(capsys, "--model", exported, *words) == [right / 12]


def test_each_command_names_the_next(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, data, vector = home / "base", home / "pets.csv", home / "vector.safetensors"
    run("eval", "--model", base, "--data", data, "--vector", vector)
    export = f"talos export {vector}:1 --base {base} --data {data} --out edited"
    assert export in capsys.readouterr().err
    run(*export.split()[1:])
    predict = f"talos predict --model edited --data {data}"
    assert predict in capsys.readouterr().err
    run("eval", "--model", "edited", "--data", data)
    assert f"{predict} --task pets\n" in capsys.readouterr().err
    run(*predict.split()[1:])
    capsys.readouterr()
    run("eval", "--model", base, "--data", data, "--vector", vector, "--linearized")
    assert "talos export" not in capsys.readouterr().err


def test_a_label_that_is_not_needed_may_be_anything(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "new.jsonl"
    labels: tuple[object, ...] = (None, 0.5, True, "cat")
    data.write_text("".join(json.dumps({"text": "meow", "label": each}) + "\n" for each in labels))
    run("predict", "--model", exported, "--data", data)
    captured = capsys.readouterr()
    rows = csv.DictReader(io.StringIO(captured.out))
    assert [row["label"] for row in rows] == ["", "0.5", "True", "cat"]
    assert "of 1 label was predicted" in captured.err


def test_a_suffix_in_capitals_is_the_same_form(exported: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "new.csv", tmp_path / "out.JSONL"
    data.write_text("text\nmeow\n")
    run("predict", "--model", exported, "--data", data, "--out", out)
    assert json.loads(out.read_text())["text"] == "meow"


def test_unlabelled_rows_keep_their_order(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a very long meow, purr and more", "woof", "moo moo", "woof"]
    data, out = tmp_path / "new.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts))
    run("predict", "--model", exported, "--data", data, "--out", out, "--batch-size", "2")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    assert "label" not in rows[0]
    assert set(rows[0]["probabilities"]) == {"cat", "dog", "cow"}
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert rows[1] == rows[3]
    assert capsys.readouterr().out == f"{out}: 4 predictions of pets\n"


def test_other_libraries_load_the_folder(exported: Path) -> None:
    model = AutoModel.from_pretrained(exported)
    encoder = load_encoder(exported)
    for name, each in model.state_dict().items():
        assert_bit_equal(each, encoder.transformer.state_dict()[name])
    texts = ["meow meow", "a longer text about a dog"]
    sentences = SentenceTransformer(str(exported), device="cpu").encode(texts)
    torch.testing.assert_close(torch.from_numpy(sentences), encoder.encode(texts))


def test_a_head_is_kept_when_the_folder_is_edited_again(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    vector = f"{home}/vector.safetensors:0.5"
    run("export", vector, "--base", exported, "--force", "--out", again)
    for name, head in load_heads(exported).items():
        assert_bit_equal(load_heads(again)[name].tensor, head.tensor)
    signs = write_rows(
        tmp_path / "signs.csv", {f"{s} {i}": s for s in ("plus", "minus") for i in range(9)}
    )
    words = ["--data", home / "pets.csv", "--data", signs]
    run("export", vector, "--base", home / "base", *words, "--out", tmp_path / "two")
    assert list(load_heads(tmp_path / "two")) == ["pets", "signs"]
    assert f"talos predict --model {tmp_path / 'two'} --data {home / 'pets.csv'} --task pets" in (
        capsys.readouterr().err
    )
    run("predict", "--model", tmp_path / "two", "--data", signs, "--task", "signs")
    assert main(["predict", "--model", str(tmp_path / "two"), "--data", str(signs)]) == 2


def test_a_small_coefficient_is_not_shown_as_0(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", home / "base", "--data", home / "pets.csv"]
    for given, shown in (("-0.001", "-0.001"), ("-0.0", "0.00"), ("-0.25", "-0.25")):
        run("eval", *words, "--vector", home / "vector.safetensors", f"--scale={given}")
        assert f"accuracy at {shown}, %" in capsys.readouterr().out


def test_eval_says_that_a_head_was_made_with_other_rows_or_tokens(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("eval", "--model", exported, "--data", home / "pets.csv")
    assert "warning" not in capsys.readouterr().err
    run("eval", "--model", exported, "--data", home / "pets.csv", "--max-length", "20")
    assert "warning: out was made with 48 tokens of a text of pets, got 20;" in (
        capsys.readouterr().err
    )
    lines = (home / "pets.csv").read_text().splitlines()
    (tmp_path / "pets.csv").write_text("\n".join(lines[:-9]) + "\n")
    run("eval", "--model", exported, "--data", tmp_path / "pets.csv")
    assert "warning: the test examples of pets.csv are not those of when out was made" in (
        capsys.readouterr().err
    )


def test_eval_says_if_no_head_fits(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signs = write_rows(
        tmp_path / "signs.csv", {f"{s} {i}": s for s in ("plus", "minus") for i in range(9)}
    )
    run("eval", "--model", exported, "--data", signs)
    assert (
        "warning: out holds no head of the labels of signs (it holds pets)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("save", [save_tiny_t5, save_tiny_gpt2], ids=["t5", "gpt2"])
def test_a_language_model_goes_into_production(
    save: Callable[[Path], Path], home: Path, tmp_path: Path
) -> None:
    folder, data = save(tmp_path / "model"), home / "pets.csv"
    train(tmp_path, ["--model", str(folder), "--data", str(data)])
    words = ["--base", folder, "--data", data, "--out", tmp_path / "out"]
    run("export", tmp_path / "vector.safetensors", *words)
    encoder = load_encoder(tmp_path / "out")
    head = encoder.heads["pets"]
    assert head.kind == "answers"
    logits = logits_of(head.classifier(encoder), load_data(str(data)), "test")
    assert_bit_equal(logits, edited_logits(tmp_path, str(folder), data, "test"))


def test_clip_goes_into_production(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"openclip:{CLIP}:{save_tiny_clip(tmp_path / 'clip')}"
    images = save_images(tmp_path / "bright", {"dark": 40, "light": 40})
    train(tmp_path, ["--model", source, "--data", str(images)])
    words = ["--base", source, "--data", images, "--out", tmp_path / "out"]
    run("export", tmp_path / "vector.safetensors", *words)
    encoder = load_encoder(tmp_path / "out")
    logits = logits_of(encoder.heads["bright"].classifier(encoder), load_data(str(images)), "test")
    assert_bit_equal(logits, edited_logits(tmp_path, source, images, "test"))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    for name, each in load_file(tmp_path / "out" / "model.safetensors").items():
        assert_bit_equal(model.state_dict()[name], each)
    capsys.readouterr()
    run("predict", "--model", tmp_path / "out", "--data", images)
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    assert {row["image"].split("/")[0] for row in rows} == {"dark", "light"}
    assert re.search(r"\d+ of 80 labels were predicted", captured.err)
    names = {row["image"] for row in rows}
    run("predict", "--model", tmp_path / "out", "--data", images, "--split", "test")
    captured = capsys.readouterr()
    assert re.search(r"\d+ of 8 labels were predicted", captured.err)
    assert {row["image"] for row in csv.DictReader(io.StringIO(captured.out))} < names
    broken = images / "light" / "000.png"
    broken.write_bytes(broken.read_bytes()[:-400])
    words = ["predict", "--model", str(tmp_path / "out"), "--data", str(images)]
    refused(words, capsys, "--data must hold images that can be read, got .*000.png", tmp_path)


def test_a_clip_of_transformers_goes_into_production(tmp_path: Path) -> None:
    folder = save_tiny_transformers_clip(tmp_path / "clip")
    images = save_images(tmp_path / "bright", {"dark": 40, "light": 40})
    train(tmp_path, ["--model", str(folder), "--data", str(images)])
    words = ["--base", folder, "--data", images, "--out", tmp_path / "out"]
    run("export", tmp_path / "vector.safetensors", *words)
    encoder = load_encoder(tmp_path / "out")
    logits = logits_of(encoder.heads["bright"].classifier(encoder), load_data(str(images)), "test")
    assert_bit_equal(logits, edited_logits(tmp_path, str(folder), images, "test"))
    model = AutoModel.from_pretrained(tmp_path / "out")
    for name, each in load_file(tmp_path / "out" / "model.safetensors").items():
        assert_bit_equal(model.state_dict()[name], each)


def test_the_dtype_of_the_base_is_kept(home: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModel.from_pretrained(home / "base").bfloat16().save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((home / "base" / name).read_bytes())
    words = ["--base", half, "--data", home / "pets.csv", "--force", "--out", tmp_path / "out"]
    run("export", home / "vector.safetensors", *words)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}


def test_a_damaged_head_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "talos").mkdir()
    path = tmp_path / HEAD_FILE
    raw = bytearray((exported / HEAD_FILE).read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(TalosValueError, match="checksum of its data does not fit"):
        load_heads(tmp_path)
    [head] = load_heads(exported).values()
    answers = {"kind": "answers", "scale": None}
    for wrong in (
        *({"kind": "answers"}, {"scale": None}, {"scale": -1.0}, {"max_length": 2}),
        *({"class_names": ("cat",)}, {"class_names": ("cat", "cat", "dog")}),
        *(
            answers | {"tensor": torch.tensor([[1, 2], [1, -100], ids])}
            for ids in ([-100, 1], [-7, 1])
        ),
    ):
        save_heads(path, {"pets": replace(head, **wrong)})
        with pytest.raises(TalosValueError, match="not valid heads"):
            load_heads(tmp_path)
    save_file({"pets": head.tensor}, path)
    with pytest.raises(TalosValueError, match="that talos did not write"):
        load_heads(tmp_path)


def test_a_head_of_another_model_is_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [head] = load_heads(exported).values()
    out, data = tmp_path / "out", tmp_path / "a.csv"
    shutil.copytree(exported, out)
    data.write_text("text\nmeow\n")
    ids = torch.tensor([[1], [2], [3]])
    for wrong, message in (
        ({"tensor": head.tensor[:, 1:]}, "--model must be the model that its head of pets was"),
        ({"tensor": ids, "kind": "answers", "scale": None}, "--model must be the model that its"),
        ({"max_length": 10**9}, "--model must take the 1,000,000,000 tokens of its head, got out"),
    ):
        save_heads(out / HEAD_FILE, {"pets": replace(head, **wrong)})
        refused(["predict", "--model", str(out), "--data", str(data)], capsys, message, tmp_path)
    model = load_encoder(save_tiny_gpt2(tmp_path / "gpt2"))
    assert model.takes(ids)
    assert not model.takes(ids + 10**6)
    Mask.from_dense({"w": torch.ones(2) > 0}).save(out / HEAD_FILE)
    with pytest.raises(TalosValueError, match="must hold heads, got a mask"):
        load_heads(out)


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_a_full_disk_is_told_by_the_option(
    option: str,
    home: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("talos.files.atomic._workplace", full)
    command = ["predict"] if option == "--out" else ["eval"]
    words = ["--model", str(exported), "--data", str(home / "pets.csv")]
    file = str(tmp_path / ("p.csv" if option == "--out" else "p.json"))
    assert main([*command, *words, option, file]) == 2
    assert f"error: {option} must be writable, got {file} (No space" in capsys.readouterr().err


def test_an_edited_base_makes_no_new_head(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signs = {f"{s} {i}": s for s in ("plus", "minus") for i in range(9)}
    words = ["export", home / "vector.safetensors", "--base", exported, "--force"]
    words += ["--data", write_rows(tmp_path / "signs.csv", signs), "--out", tmp_path / "again"]
    message = r"--base must be a model before any edit .*signs.*heads of pets and holds no head"
    refused([str(word) for word in words], capsys, message, tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_model_that_gives_no_numbers_predicts_nothing(
    suffix: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector = f"{home}/vector.safetensors:1e38"
    words = ["--base", home / "base", "--data", home / "pets.csv", "--out", tmp_path / "wide"]
    run("export", vector, *words)
    words = ["predict", "--model", str(tmp_path / "wide"), "--data", str(home / "pets.csv")]
    out = tmp_path / f"p.{suffix}"
    capsys.readouterr()
    assert main([*words, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, out.exists()) == ("", False)
    assert "error: --model must give numbers as logits, got NaN" in captured.err


def test_refusals(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data, vector = (
        str(home / "base"),
        str(home / "pets.csv"),
        str(home / "vector.safetensors"),
    )
    model = ["predict", "--model", str(exported)]
    empty = tmp_path / "empty.csv"
    empty.write_text("text\n")
    unnamed = tmp_path / "__metadata__.csv"
    unnamed.write_bytes(Path(data).read_bytes())
    other = tmp_path / "other.csv"
    other.write_text("texts\nmeow\n")
    for words, message in (
        (["predict", "--model", base, "--data", data], "--model must hold the head .*talos export"),
        (["predict", "--model", "minilm", "--data", data], "--model must hold the head"),
        ([*model, "--data", str(tmp_path / "no.csv")], "--data must be a file that can be read"),
        ([*model, "--data", str(empty)], "--data must hold at least one row"),
        ([*model, "--data", str(other)], "--data must have the column text, got texts"),
        ([*model, "--data", data, "--task", "dogs"], "--task must be one .*pets.*got dogs"),
        ([*model, "--data", data, "--out", "a.txt"], "--out must end in .csv or .jsonl"),
        ([*model, "--data", data, "--batch-size", "0"], "--batch-size must be"),
        (
            ["export", vector, "--base", base, "--out", str(tmp_path / "o"), "--max-length", "9"],
            "--max-length must be left out without --data",
        ),
        (
            ["export", vector, "--format", "delta", "--data", data, "--out", "d.safetensors"],
            "--data must be left out with --format delta",
        ),
        (
            [
                "export",
                vector,
                "--base",
                base,
                "--data",
                data,
                "--out",
                str(empty.parent / "o.safetensors"),
            ],
            "--out must name a folder, as the base is one, got the file .*o.safetensors",
        ),
        (
            ["export", vector, "--base", base, "--data", "no.csv", "--out", "no/such/x"],
            "--out must lie in an existing folder, got no/such/x; make no/such",
        ),
        (
            ["export", vector, "--base", f"{base}/model.safetensors", "--data", data, "--out", "o"],
            "--base must be .*model.safetensors', which is a file; pass the folder",
        ),
        (
            ["export", vector, "--base", base, "--data", str(unnamed), "--out", "o"],
            "--data must have names in valid Unicode and none '__metadata__'",
        ),
    ):
        refused(words, capsys, message, tmp_path)


def test_the_readmes_section_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "README.md").read_text()
    section = re.search(r"^## Into production\n(.*?)^## ", page, re.M | re.S)
    assert section is not None
    monkeypatch.chdir(tmp_path)
    for name, source in (("reviews.csv", "pets.csv"), ("vector.safetensors",) * 2):
        Path(name).write_bytes((home / source).read_bytes())
    Path("new.csv").write_text("text\nmeow\nwoof\n")
    run_page(section[1], monkeypatch, home / "base")
    assert len(Path("predictions.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_walk_ends_in_predictions_that_equal_evals(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page((ROOT / "docs" / "walk.md").read_text(), monkeypatch, home / "base")
    right, count = re.findall(r"(\d+) of (30) labels were predicted", capsys.readouterr().err)[0]
    data = ("--data", "tickets.csv", "--json", "-")
    for words in (("--model", "edited"), ("--vector", "edit.safetensors")):
        run("eval", *words, *data)
        figures = json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["tasks"]["tickets"]
        value = figures["edited" if "--vector" in words else "pretrained"]["value"]
        assert value == int(right) / int(count)
