"""What the commands say of the data that they read, and what they refuse."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from talos.app.cli import main
from talos.app.cli.loading import load_data
from talos.app.cli.reading import TokenCounts, count_tokens, show_data, summary
from talos.app.models import load_encoder
from talos.app.tasks import load_file
from talos.errors import TalosValueError
from tests.tiny import save_tiny_encoder
from tests.tiny_models import save_images, save_tiny_gpt2, save_tiny_t5

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny"))


def write(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def pets(path: Path, *, more: str = "", labels: tuple[str, str] = ("cat", "dog")) -> str:
    rows = [f"meow {i}{more},{labels[i % 2]}" for i in range(60)]
    return write(path, "text,label", *rows, rows[0], rows[1])


def dry_run(model: str, data: str, *options: str) -> int:
    return main(["calibrate", "--model", model, "--data", data, "--dry-run", *options])


def test_each_command_says_what_was_read(model: str, tmp_path: Path, capsys: Capture) -> None:
    data = pets(tmp_path / "pets.csv")
    mask, vector = str(tmp_path / "mask.safetensors"), str(tmp_path / "vector.safetensors")
    line = (
        "pets.csv: 62 rows, 2 labels (cat 30, dog 30); 48 train, 6 validation, 6 test; "
        "2 repeats dropped\n"
    )
    common = ["--model", model, "--data", data]
    few = ["--samples", "8", "--rounds", "1"]
    for words in (
        ["calibrate", *common, "--dry-run"],
        ["calibrate", *common, *few, "--out", mask],
        ["train", *common, "--mask", mask, "--steps", "1", "--out", vector],
        ["eval", *common, "--vector", vector],
    ):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert line in err, err
        assert "rows" not in out
        assert "warning" not in err


def test_many_labels_are_counted(tmp_path: Path) -> None:
    rows = [f"text {i},label {i % 12}" for i in range(100)]
    task = load_file(write(tmp_path / "many.csv", "text,label", *rows))
    assert "12 labels, 8 to 9 each;" in summary(task, TokenCounts([3], 0.0, ()), 48)


def test_images_are_counted_and_their_repeats(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "bright", {"dark": 10, "light": 10})
    copied = sorted((folder / "dark").iterdir())[0]
    shutil.copy(copied, folder / "dark" / f"copy{copied.suffix}")
    line = summary(load_data(str(folder)), None, 48)
    assert line.startswith("bright: 21 images, 2 labels (dark 10, light 10); 16 train"), line
    assert line.endswith("; 1 repeat dropped")


def test_texts_that_are_cut_are_said_with_the_length_that_keeps_them(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    data = pets(tmp_path / "long.csv", more=" purr" * 6)
    assert dry_run(model, data, "--max-length", "16") == 0
    err = capsys.readouterr().err
    assert err.endswith("--max-length 16 --out mask.safetensors\n")
    assert "100 % of the texts cut at 16 tokens (median 32)" in err
    warning = "warning: 100 % of the texts of long.csv are cut; --max-length 32 keeps 100 % of them"
    assert warning in err
    assert dry_run(model, data, "--max-length", "32") == 0
    assert "warning" not in capsys.readouterr().err
    longer = pets(tmp_path / "longer.csv", more=" purr" * 12)
    assert dry_run(model, longer) == 0
    err = capsys.readouterr().err
    assert "--max-length 56 keeps 100 % of them whole" in err
    assert err.endswith("--max-length 56 --out mask.safetensors\n")


def test_texts_longer_than_the_model_takes_are_said(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    data = pets(tmp_path / "long.csv", more=" purr" * 20)
    assert dry_run(model, data) == 0
    warning = "100 % of the texts of long.csv are cut as at 64 tokens, the most that tiny takes;"
    assert warning in capsys.readouterr().err
    assert dry_run(model, data, "--max-length", "64") == 0
    assert "are cut at 64 tokens, the most that tiny takes; shorten" in capsys.readouterr().err


def test_a_length_beyond_the_positions_is_refused(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    data = pets(tmp_path / "pets.csv")
    for words in (["calibrate", "--dry-run"], ["train", "--out", "v.safetensors"], ["eval"]):
        assert main([*words, "--model", model, "--data", data, "--max-length", "65"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        expected = "error: --max-length must be at most 64, the tokens that tiny takes, got 65\n"
        assert err == expected


def test_the_positions_of_a_decoder_hold_its_answers(tmp_path: Path) -> None:
    decoder = load_encoder(save_tiny_gpt2(tmp_path / "gpt2"))
    assert decoder.most_tokens(["ab", "abc"]) == 96 - 4  # the answers begin with a space
    assert load_encoder(save_tiny_t5(tmp_path / "t5")).most_tokens(["ab", "abc"]) is None


def test_roberta_has_fewer_positions_than_its_configuration_says() -> None:
    from transformers import RobertaConfig, RobertaModel

    from talos.app.models.text import TextEncoder

    config = RobertaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=1
    )
    config.max_position_embeddings = 34
    tokenizer: Any = None
    encoder = TextEncoder(RobertaModel(config), tokenizer, name="tiny")
    assert encoder.most_tokens(["a", "b"]) == 32


def test_a_tokenizer_that_knows_no_word_is_refused(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    """As transformers makes one of a folder that holds its configuration alone."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    for name in ("vocab.txt", "tokenizer.json"):
        (broken / name).unlink(missing_ok=True)
    (broken / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    assert dry_run(str(broken), pets(tmp_path / "pets.csv")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(
        r"error: --model must have a tokenizer that knows the texts of pets.csv, got broken, to "
        r"which 100 % of the tokens are unknown \(meow, ",
        err,
    ), err


def test_some_unknown_words_are_a_warning(model: str, tmp_path: Path, capsys: Capture) -> None:
    rows = [f"ab {word}{i % 10} {i},{word}" for word in ("猫", "犬") for i in range(20)]
    assert dry_run(model, write(tmp_path / "pets.csv", "text,label", *rows)) == 0
    err = capsys.readouterr().err
    pattern = (
        r"warning: to the tokenizer of tiny \d+ % of the tokens of pets.csv are unknown \([猫犬]"
    )
    assert re.search(pattern, err), err


def test_texts_without_tokens_are_unknown(tmp_path: Path) -> None:
    class Silent:
        unk_token_id = None

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, 2] for _ in texts]}

    counts = count_tokens(load_file(pets(tmp_path / "pets.csv")), Silent())
    assert counts.unknown == 1.0
    assert len(counts.examples) == 3


def test_labels_that_are_numbers_are_said(model: str, tmp_path: Path, capsys: Capture) -> None:
    assert dry_run(model, pets(tmp_path / "stars.csv", labels=("0", "1"))) == 0
    err = capsys.readouterr().err
    assert "warning: the labels of stars.csv are numbers (0, 1)" in err
    assert "a third column label_text" in err
    task = replace(load_file(tmp_path / "stars.csv"), source="OWNER/NAME")
    show_data(task, load_encoder(model), 48)
    assert "(0, 1), which describe no class; say in a recipe's class_texts" in (
        capsys.readouterr().err
    )
    rows = ["text,label,label_text", "bad,0,a bad film", *(f"text {i},{i % 2}," for i in range(9))]
    assert dry_run(model, write(tmp_path / "half.csv", *rows)) == 0
    assert "warning: some labels of half.csv are numbers (1), which" in capsys.readouterr().err
    rows = ["text,label,label_text", "bad,0,a bad film", "good,1,a good film"]
    rows += [f"text {i},{i % 2}," for i in range(20)]
    data = write(tmp_path / "described.csv", *rows)
    assert dry_run(model, data) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_have_texts(tmp_path: Path, suffix: str) -> None:
    rows = [(f"text {i}", str(i % 2), "a bad film" if i == 2 else "") for i in range(20)]
    if suffix == ".csv":
        lines = ["text,label,label_text", *(",".join(row) for row in rows)]
    else:
        lines = [
            f'{{"text": "{text}", "label": {label}'
            + (f', "label_text": "{means}"}}' if means else "}")
            for text, label, means in rows
        ]
    path = write(tmp_path / f"films{suffix}", *lines)
    assert load_file(path).class_texts == ("a bad film", "1")
    task = load_file(path, class_texts={"0": "bad", "1": "a good film"})
    assert task.class_texts == ("bad", "a good film")
    assert task.class_names == ("0", "1")
    with pytest.raises(TalosValueError, match=r"class_texts must name labels of .*got '2'.* 0, 1"):
        load_file(path, class_texts={"2": "a film"})


def test_a_label_with_two_texts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,label_text", "a,0,bad", "b,1,good", "c,0,poor")
    with pytest.raises(TalosValueError, match=r"one label_text, got 'bad' and 'poor' .* line 4"):
        load_file(path)


def test_labels_that_are_all_but_equal_are_said(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    assert dry_run(model, pets(tmp_path / "pets.csv", labels=("Tame_cat", "tame cat"))) == 0
    line = "warning: labels of pets.csv are all but equal: Tame_cat and tame cat"
    assert line in capsys.readouterr().err


def test_a_label_with_too_many_tokens_is_refused(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    assert dry_run(model, pets(tmp_path / "pets.csv", labels=("cat", "d" + "o" * 61 + "g"))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the labels of --data must have at most 64 tokens each, got more in 'dooo" in err
    assert "describe the class in fewer words" in err
