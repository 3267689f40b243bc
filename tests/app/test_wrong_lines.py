"""Wrong command lines: each ends with exit code 2 and one or two lines that name the option."""

import re
from pathlib import Path

import pytest
import torch

from talos.app.cli import main
from talos.app.cli.app import app
from talos.app.cli.options import as_options
from talos.errors import TalosOSError, TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from tests.tiny_models import save_images

# The words of the command line, the option or argument that the message names, and a part of it.
LINES: tuple[tuple[str, str, str], ...] = (
    ("calibrate --data a --data b --out m.safetensors", "--data", "given once, got a and b"),
    ("calibrate --data a --model b --model c --dry-run", "--model", "given once, got b and c"),
    ("calibrate --data a --out m.safetensors --out=n.safetensors", "--out", "must be given once"),
    ("calibrate --data a --dry-run --density .1 --density .2", "--density", "given once, got .1"),
    ("train --data a --data a --out v.safetensors", "--data", "run `talos train` once for each"),
    ("train --data a --mask a --mask b --out v.safetensors", "--mask", "given once, got a and b"),
    ("train --data a --out v.safetensors --steps 1 --steps 2 --steps 3", "--steps", "1 and 2 and"),
    ("merge a:1 b:1 --out x.safetensors --out y.safetensors", "--out", "must be given once"),
    ("merge a:1 b:1 --method ties --method dare --out x.safetensors", "--method", "ties and dare"),
    ("extract a b --mask all --mask changed --out v.safetensors", "--mask", "all and changed"),
    ("export v --base a --base b --out c", "--base", "must be given once, got a and b"),
    ("eval --data a --model b --model c", "--model", "must be given once, got b and c"),
    ("eval --data a --scale 1 --scale 2", "--scale", "must be given once, got 1 and 2"),
    ("eval --data a --json a.json --json b.json", "--json", "given once, got a.json and b.json"),
    ("compare a.json b.json --seed 1 --seed 2", "--seed", "must be given once, got 1 and 2"),
    ("report a.json --out b.html --out c.html", "--out", "given once, got b.html and c.html"),
    ("demo --out a --out b", "--out", "must be given once, got a and b"),
    ("demo --out d --data pets.csv", "--data", "must be at least two, got pets; addition"),
    ("demo --out d --data pets.csv --data pets.csv", "--data", "must differ"),
    ("demo --out d --data pets.csv --data sub/pets.csv", "--data", "must differ, got 'pets' twice"),
    ("demo --out d --density 0.1 --density 0.1", "--density", "must differ, got 0.1 twice"),
    ("demo --out d --density 0.1 --density 2", "--density", "must lie in (0, 1], got 2"),
    ("demo --out d --seeds 0", "--seeds", "must be an integer of at least 1"),
    ("demo --out d --steps 0", "--steps", "must be an integer of at least 1"),
    ("demo --out d --max-length 2", "--max-length", "at least 3, got 2"),
    # What the parser of the command line refuses
    ("bogus", "bogus", "No such command"),
    ("calibrat --data pets.csv", "calibrat", "Did you mean 'calibrate'?"),
    ("--nonsense", "--nonsense", "no such option"),
    ("calibrate --nonsense", "--nonsense", "see `talos calibrate --help`"),
    ("train --stps 3", "--stps", "did you mean --steps?"),
    ("inspect pets.csv --layrs", "--layrs", "did you mean --layers?"),
    ("calibrate", "--data", "must be given, got none"),
    ("calibrate --data", "--data", "must have a value, got none; see `talos calibrate --help`"),
    ("train --data pets.csv", "--out", "must be given, got none"),
    ("train --out v.safetensors", "--data", "must be given, got none"),
    ("extract --out v.safetensors", "BASE", "must be given, got none"),
    ("extract base --out v.safetensors", "TUNED", "must be given, got none"),
    ("merge", "FILE:COEFFICIENT", "must be given, got none; see `talos merge --help`"),
    ("export v.safetensors", "--out", "must be given, got none"),
    ("eval", "--data", "must be given, got none"),
    ("compare", "RUN...", "must be given, got none"),
    ("inspect", "FILE", "must be given, got none"),
    ("report", "DIR", "must be given, got none"),
    ("demo", "--out", "must be given, got none"),
    ("predict --data pets.csv", "--model", "must be given, got none"),
    ("plot", "NAME", "must be given, got none; see `talos plot --help`"),
    ("plot cost", "DIR", "must be given, got none"),
    ("predict --model base", "--data", "must be given, got none"),
    ("predict --model a --model b --data pets.csv", "--model", "must be given once, got a and b"),
    ("predict --model base --data pets.csv --batch-size 0", "--batch-size", "at least 1, got 0"),
    ("predict --model base --data pets.csv --out p.txt", "--out", "must end in .csv or .jsonl"),
    ("predict --model base --data pets.csv --out pets.csv", "--out", "pass --overwrite"),
    ("predict --model base --data pets.csv", "--model", "must hold the head of a task"),
    ("predict --model ./bse --data pets.csv", "--model", "is no folder; did you mean base?"),
    ("predict --model minilm --data pets.csv", "--model", "must hold the head of a task"),
    ("report a.json b.json --out p.html", "b.json", "unexpected extra argument"),
    ("calibrate --data pets.csv --density x", "--density", "must be a valid number, got x"),
    ("calibrate --data pets.csv --rounds 1.5", "--rounds", "must be a valid integer, got 1.5"),
    ("calibrate --data pets.csv --seed -1", "--seed", "greater than or equal to 0, got -1"),
    ("calibrate --data pets.csv --overwrite=yes", "--overwrite", "must have no value, got one"),
    ("train --data pets.csv --out v.safetensors --lr fast", "--lr", "a valid number, got fast"),
    (
        "merge a.safetensors --out v.safetensors --least-tasks x",
        "--least-tasks",
        "a valid integer, got x",
    ),
    # Numbers out of range
    ("calibrate --data pets.csv --out m.safetensors --density 0", "--density", "(0, 1], got 0.0"),
    ("calibrate --data pets.csv --out m.safetensors --density nan", "--density", "(0, 1], got nan"),
    ("calibrate --data pets.csv --out m.safetensors --rounds 0", "--rounds", "at least 1, got 0"),
    (
        "calibrate --data pets.csv --out m.safetensors --samples -1",
        "--samples",
        "at least 1, got -1",
    ),
    ("calibrate --data pets.csv --out m.safetensors --samples 999", "--samples", "at most 16"),
    (
        "calibrate --data pets.csv --out m.safetensors --batch-size 0",
        "--batch-size",
        "at least 1, got 0",
    ),
    (
        "calibrate --data pets.csv --out m.safetensors --max-length 2",
        "--max-length",
        "at least 3, got 2",
    ),
    (
        "calibrate --data pets.csv --out m.safetensors --draws 0",
        "--draws",
        "at least 1 and below a billion, got 0",
    ),
    (
        f"calibrate --data pets.csv --out m.safetensors --draws {'9' * 5000}",
        *("--draws", "at least 1 and below a billion, got 999"),
    ),
    (
        "demo --out new --seed 18446744073709551615 --seeds 2",
        *(
            "--seed",
            "must be at most 18446744073709551614 with --seeds 2, got 18446744073709551615",
        ),
    ),
    ("train --data pets.csv --out v.safetensors --steps 0", "--steps", "at least 1, got 0"),
    ("train --data pets.csv --out v.safetensors --lr -1", "--lr", "positive and finite, got -1"),
    ("train --data pets.csv --out v.safetensors --lr inf", "--lr", "positive and finite, got inf"),
    ("train --data a --out v.safetensors --method l_lora --rank 0", "--rank", "at least 1, got 0"),
    ("train --data a --out v.safetensors --method lota --density 2", "--density", "got 2.0"),
    ("train --data a --out v.safetensors --method lota --sparse-lr 0", "--sparse-lr", "got 0.0"),
    ("eval --data pets.csv --points 1", "--points", "at least 2, got 1"),
    ("eval --data pets.csv --vector vector.safetensors --scale nan", "--scale", "or grid, got nan"),
    (
        "merge vector.safetensors --out w.safetensors --method ties --density 0",
        "--density",
        "(0, 1], got 0",
    ),
    (
        "merge vector.safetensors --out w.safetensors --method dare --density 2",
        "--density",
        "(0, 1], got 2",
    ),
    (
        "merge vector.safetensors --out w.safetensors --method breadcrumbs --drop-largest 1",
        *("--drop-largest", "must lie in [0, 1), got 1"),
    ),
    (
        "merge vector.safetensors --out w.safetensors --method breadcrumbs --drop-largest .5 "
        "--drop-smallest .5",
        *("--drop-smallest", "must leave something"),
    ),
    ("merge vector.safetensors:x --out w.safetensors", "a term", "FILE.safetensors:NUMBER, got"),
    ("merge vector.safetensors:nan --out w.safetensors", "a term", "FILE.safetensors:NUMBER, got"),
    (
        "export vector.safetensors --base base --out o --scale nan",
        "--scale",
        "finite number, got nan",
    ),
    # Words that are not known
    ("calibrate --data a --target logits --dry-run", "--target", "did you mean logit?"),
    ("calibrate --data a --labels sample --dry-run", "--labels", "did you mean sampled?"),
    ("calibrate --data a --parity Released --dry-run", "--parity", "did you mean released?"),
    ("train --data a --out v.safetensors --method linearised", "--method", "you mean linearized?"),
    ("merge vector.safetensors --out w.safetensors --method tie", "--method", "did you mean ties?"),
    (
        "merge vector.safetensors --out w.safetensors --method dare --follow sum",
        *("--follow", "must be task_arithmetic, mean, ties or another Merge, got 'sum'"),
    ),
    ("extract base base --out w.safetensors --mask changd", "--mask", "did you mean changed?"),
    ("extract base base --out w.safetensors --dtype float", "--dtype", "did you mean float"),
    ("export vector.safetensors --out w --format checkpont", "--format", "you mean checkpoint?"),
    ("eval --data pets.csv --metric acuracy", "--metric", "did you mean accuracy?"),
    ("eval --data pets.csv --scale big", "--scale", "a finite number or grid, got big"),
    ("demo --out new --methods talos,random,rndom", "--methods", "did you mean random?"),
    ("demo --out new --methods talos,talos", "--methods", "must differ"),
    (
        "demo --out new --model openclip:a:b --quick",
        *("--model", "must read the texts of character_kind, got openclip:a:b"),
    ),
    ("experiment study.toml --out new --only pet", "--only", "got pet; did you mean pets?"),
    ("experiment study.toml --out new --only pets", "tasks", "must be at least two, got pets"),
    ("experiment demmo --out new", "RECIPE", "did you mean demo?"),
    ("experiment recipe.toml --out new", "recipe.toml", "keys of the recipe must be among title"),
    ("experiment other.toml --out new", "other.toml", "models must be a list of at least one"),
    ("experiment pets.csv --out new", "RECIPE", "must be TOML, got pets.csv"),
    ("experiment study.toml --out images", "--out", "pass --overwrite"),
    ("experiment study.toml --out run.json", "--out", "must be a folder, got the file run.json"),
    ("experiment study.toml", "--out", "must be a folder to write, got none; or pass --dry-run"),
    ("experiment --out new", "RECIPE", "must be given, got none"),
    ("experiment clip.toml --out new", "models", "must read the texts of pets, got clip"),
    ("experiment nope.toml --out new", "models", "is no folder; check the path"),
    ("experiment unknown.toml --dry-run", "tasks", "did you mean code_package?"),
    ("demo --out new --data pets.csv --data pest.csv", "--data", "did you mean pets.csv?"),
    ("demo --out new --seeds 2 --seeds 3", "--seeds", "must be given once, got 2 and 3"),
    ("demo --out new --model ./nope", "--model", "is no folder; check the path"),
    ("eval --data pets.csv --metric iou", "--vector", "at least 2 times, got 0"),
    ("inspect mask.safetensors pets.csv run.json", "FILE", "once or twice, got 3"),
    (
        "train --data pets.csv --method nonlinear --out w.safetensors --max-length 9999",
        *("--max-length", "must be at most 512, the tokens that minilm takes, got 9999"),
    ),
    # Files that are not there
    ("calibrate --data pets --dry-run", "--data", "got pets; did you mean pets.csv?"),
    ("calibrate --data paper:mnits --dry-run", "--data", "did you mean paper:mnist?"),
    ("calibrate --data pest.csv --dry-run", "--data", "got pest.csv; did you mean pets.csv?"),
    ("calibrate --data code_packages --dry-run", "--data", "did you mean code_package?"),
    ("calibrate --data quite_different --dry-run", "--data", "; built in are "),
    (
        "train --data a --out v.safetensors --mask msk.safetensors",
        "--mask",
        "mean mask.safetensors",
    ),
    ("eval --data pets.csv --vector vectr.safetensors", "--vector", "mean vector.safetensors?"),
    ("merge vectr.safetensors --out w.safetensors", "a term", "did you mean vector.safetensors?"),
    ("export vectr.safetensors --base base --out o", "a term", "did you mean vector.safetensors?"),
    ("export vector.safetensors --base ./bse --out o", "--base", "'./bse', which is no folder"),
    ("export vector.safetensors --base base --out o --max-length 9", "--max-length", "without --"),
    ("export vector.safetensors --data a --format delta --out o", "--data", "be left out with"),
    ("predict --model base --data pets.csv --split tst", "--split", "did you mean test?"),
    ("plot sumary images", "NAME", "got sumary; did you mean summary?"),
    ("plot cost rn.json", "DIR", "did you mean run.json?"),
    ("plot cost images", "DIR", "must hold a results.json, got images without"),
    ("extract bse base --out w.safetensors", "BASE", "must be a readable file, got bse"),
    ("inspect masks.safetensors", "FILE", "did you mean mask.safetensors?"),
    ("compare rn.json", "RUN", "did you mean run.json?"),
    ("report rn.json --out p.html", "DIR", "did you mean run.json?"),
    ("merge recipes.toml", "RECIPE", "did you mean recipe.toml?"),
    ("calibrate --data pets.csv --model no/such/folder --dry-run", "--model", "is no folder"),
    ("eval --data pets.csv --model ./bas", "--model", "is no folder; did you mean base?"),
    ("eval --data images --model openclip:ViT-Z:w", "--model", "architecture of open_clip or a"),
    ("eval --data images --model openclip:c.json:w", "--model", "configuration that can be read"),
    ("eval --data images --model openclip:run.json:w", "--model", "with embed_dim, vision_cfg"),
    ("eval --data images --model openclip:RN50", "--model", "must name weights, got 'RN50'"),
    ("eval --data images --model openclip:RN50:w", "--model", "a pretrained tag (openai, yfcc15m"),
    (
        "eval --data images --model openclip:RN50:vectr.safetensors",
        *("--model", "did you mean vector.safetensors?"),
    ),
    (
        "eval --data images --model openclip:RN50:vector.safetensors",
        *("--model", "must have the weights of RN50, got vector.safetensors"),
    ),
    # Files that hold something else
    ("calibrate --data titled.csv --dry-run", "--data", "rename 'Text' to text"),
    ("calibrate --data ragged.tsv --dry-run", "--data", "put texts with tabs into quotes"),
    ("calibrate --data one.jsonl --dry-run", "--data", "at least two classes, got 1 (cat)"),
    ("calibrate --data mask.safetensors --dry-run", "--data", "must end in .csv or .tsv or .jsonl"),
    ("calibrate --data base --dry-run", "--data", "one folder of images per class, at least two"),
    ("calibrate --data broken --dry-run", "--data", "images that can be read, got broken/a/0.png"),
    ("eval --data images --data broken", "--data", "images that can be read, got broken/a/0.png"),
    ("train --data a --out v.safetensors --mask pets.csv", "pets.csv", "not a safetensors file"),
    (
        "train --data a --out v.safetensors --mask vector.safetensors",
        "vector.safetensors",
        "must hold a mask",
    ),
    ("eval --data pets.csv --vector mask.safetensors", "mask.safetensors", "a task_vector, got a"),
    ("merge mask.safetensors --out w.safetensors", "mask.safetensors", "a task_vector, got a mask"),
    ("inspect pets.csv", "pets.csv", "not a safetensors file"),
    ("inspect broken.safetensors", "broken.safetensors", "not a safetensors file"),
    ("compare run.json", "run.json", "must be the JSON of `talos eval --json`"),
    ("report run.json --out p.html", "run.json", "must be a results.json of `talos experiment`"),
    ("merge recipe.toml", "recipe.toml", "did you mean method?"),
    ("plot cost run.json", "run.json", "must be a results.json of `talos experiment`"),
    ("merge pets.csv other.toml --out w.safetensors", "pets.csv", "not a safetensors file"),
    # Outputs that cannot be written
    ("calibrate --data pets.csv --out m.pt", "--out", "must end in .safetensors, got m.pt"),
    ("calibrate --data pets.csv --out none/m.safetensors", "--out", "an existing folder"),
    ("calibrate --data pets.csv --out mask.safetensors", "--out", "pass --overwrite"),
    ("calibrate --data pets.csv", "--out", "got none; or pass --dry-run"),
    ("train --data pets.csv --out vector.safetensors", "--out", "pass --overwrite"),
    ("merge vector.safetensors", "--out", "must be a file to write, got none"),
    ("merge vector.safetensors --out mask.safetensors", "--out", "pass --overwrite"),
    ("extract base base --out mask.safetensors", "--out", "pass --overwrite"),
    ("export vector.safetensors --base base --out images", "--out", "pass --overwrite"),
    ("eval --data pets.csv --json run.json", "--json", "pass --overwrite"),
    ("eval --data pets.csv --json run.txt", "--json", "must end in .json, got run.txt"),
    ("report run.json --out page.htm", "--out", "must end in .html, got page.htm"),
    ("demo --out pets.csv", "--out", "must be a folder, got the file pets.csv"),
    ("plot cost run.json --out cost.pdf", "--out", "must end in .svg or .png, got cost.pdf"),
    ("plot cost run.json --out none/cost.svg", "--out", "an existing folder"),
    ("demo --out images", "--out", "pass --overwrite"),
    # Options that do not go together
    (
        "calibrate --data a --dry-run --parity released --target log_prob",
        *("--target", "must be logit with --parity released"),
    ),
    (
        "calibrate --data a --dry-run --labels importance --draws exact",
        *("--labels", "must be sampled with --draws exact"),
    ),
    ("train --data a --out v.safetensors --method talos", "--mask", "must be given with --method"),
    (
        "train --data a --out v.safetensors --method lota --mask mask.safetensors",
        "--mask",
        "be left out with",
    ),
    ("train --data a --out v.safetensors --method lota --rank 4", "--rank", "it is for l_lora"),
    ("train --data a --out v.safetensors --density 0.1", "--density", "it is for lota, random"),
    ("train --data a --out v.safetensors --sparse-lr 0.1", "--sparse-lr", "it is for lota"),
    ("train --data a --out v.safetensors --resume", "--resume", "left out without --checkpoint"),
    ("train --data a --out v.safetensors --keep 3", "--keep", "left out without --checkpoint"),
    ("train --data a --out v.safetensors --checkpoint r --every 0", "--every", "at least 1, got 0"),
    ("train --data a --out v.safetensors --checkpoint n/r", "--checkpoint", "n/r; make n"),
    ("train --data a --out v.safetensors --checkpoint pets.csv", "--checkpoint", "got the file"),
    ("merge vector.safetensors --out w.safetensors --density .1", "--density", "it is for trim"),
    ("merge vector.safetensors --out w.safetensors --seed 1", "--seed", "it is for dare"),
    ("merge recipe.toml --out w.safetensors", "--out", "must be left out with a recipe"),
    ("merge recipe.toml vector.safetensors", "a recipe", "must stand alone"),
    ("export vector.safetensors --out o", "--base", "must be given unless --format is delta"),
    ("export vector.safetensors --out o --format delta --base base", "--base", "not need"),
    ("eval --data pets.csv --scale 0.5", "--vector", "must be given with --scale 0.5, got none"),
    ("eval --data pets.csv --data pets.csv", "--data", "must differ"),
    ("eval --data pets.csv --control a", "--forget", "must be given with --control, got none"),
    ("eval --data pets.csv --keep .9", "--forget", "must be given with --keep, got none"),
    ("eval --data pets.csv --forget pets", "--vector", "once with --forget"),
    ("eval --data a --forget a --forget b", "--forget", "must be given once, got a and b"),
    (
        "eval --data pets.csv --vector vector.safetensors --forget pets --scale 1",
        *("--scale", "must be left out with --forget, got 1"),
    ),
    (
        "eval --data pets.csv --vector vector.safetensors --forget pets --keep 2",
        *("--keep", "must lie in (0, 1], got 2.0"),
    ),
    ("eval --data pets.csv --merged vector.safetensors", "--vector", "with --merged, got 0"),
    # What would be ignored
    ("train --data pets.csv --out v.safetensors --force", "--force", "left out without --mask"),
    ("eval --data pets.csv --linearized", "--vector", "must be given with --linearized, got none"),
    ("eval --data pets.csv --points 5", "--points", "where no coefficient is searched, got 5"),
    (
        "eval --data pets.csv --vector vector.safetensors --scale 1 --points 5",
        *("--points", "pass --vector with --scale grid"),
    ),
    (
        "eval --data pets.csv --vector vector.safetensors --metric sensitivity --scale 1",
        *("--scale", "got 1; it is for accuracy and linearity"),
    ),
    ("extract base base --out w.safetensors --drop", "--drop", "it is for a mask file"),
    ("export vector.safetensors --out o.safetensors --format delta --force", "--force", "left out"),
    ("calibrate --data images --dry-run", "--model", "must read the images of images, got minilm"),
    (
        "calibrate --data pets.csv --model openclip:ViT-B-32:openai --dry-run",
        *("--model", "must read the texts of pets, got openclip:ViT-B-32:openai"),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong")
    rows = "".join(f"{word} {i},{word}\n" for word in ("cat", "dog") for i in range(10))
    (made / "pets.csv").write_text(f"text,label\n{rows}")
    (made / "sub").mkdir()
    (made / "sub" / "pets.csv").write_text(f"text,label\n{rows}")
    (made / "titled.csv").write_text(f"Text,label\n{rows}")
    (made / "ragged.tsv").write_text("text\tlabel\na\tb\tc\n")
    (made / "one.jsonl").write_text('{"text": "a", "label": "cat"}\n')
    (made / "run.json").write_text("{}")
    (made / "recipe.toml").write_text('metod = "ties"\n')
    (made / "other.toml").write_text("")
    study = 'tasks = ["pets.csv", "images"]\n[[methods]]\nmethod = "talos"\n'
    (made / "study.toml").write_text(f'models = ["minilm"]\n{study}')
    (made / "clip.toml").write_text(f'models = ["clip"]\n{study}')
    (made / "nope.toml").write_text(f'models = ["./nope"]\n{study}')
    (made / "unknown.toml").write_text(
        f'models = ["minilm"]\n{study}'.replace("images", "code_packages")
    )
    (made / "broken.safetensors").write_bytes(b"broken")
    mask = Mask.from_dense({"w": torch.ones(2) > 0})
    mask.save(made / "mask.safetensors")
    TaskVector(mask, torch.ones(2)).save(made / "vector.safetensors")
    save_images(made / "images", {"dark": 3, "light": 3})
    for file in save_images(made / "broken", {"a": 3, "b": 3}).rglob("000.png"):
        (file.parent / "0.png").write_bytes(file.read_bytes()[:-400])
    (made / "base").mkdir()
    (made / "clip").mkdir()
    (made / "clip" / "config.json").write_text('{"model_type": "clip"}')
    return made


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(("line", "option", "phrase"), LINES, ids=[line for line, _, _ in LINES])
def test_a_wrong_line_is_told_by_its_option(
    line: str,
    option: str,
    phrase: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    before = content(folder)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert 1 <= err.count("\n") <= 2
    assert len(err) < 500
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", err), err
    assert phrase in err, err
    assert "Traceback" not in err
    assert content(folder) == before


def test_the_table_holds_a_hundred_lines_and_every_command() -> None:
    told = [(re.sub(r"--out \S+", "--out o", line), *rest) for line, *rest in LINES]
    assert not {line for line in told if told.count(line) > 1}
    assert len({line for line, _, _ in LINES}) == len(LINES) >= 100
    said = [(line, phrase.removeprefix("got "), option) for line, option, phrase in LINES]
    assert not [words for words in said if words[1] in words[0] or words[1] in words[2]]
    commands = {each.name for each in app.registered_commands}
    assert commands <= {line.split()[0] for line, _, _ in LINES}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("path must be a file, got path must", "--out must be a file, got path must"),
        ("path: must hold a mask", "path: must hold a mask"),
        ("paths must differ, got my path must", "paths must differ, got my path must"),
        ("a.csv must differ; pass strict=False to drop", "a.csv must differ; pass --drop to drop"),
        (
            "base must fit, got a; take b, or pass force=True to edit",
            "base must fit, got a; take b",
        ),
        (
            "out must not exist, got x; pass overwrite=True to replace it",
            "out must not exist, got x",
        ),
    ],
)
def test_options_take_the_place_of_arguments_at_the_beginning(message: str, shown: str) -> None:
    words = {"path": "--out", "strict": "--drop", "force": "", "overwrite": ""}
    for kind in (TalosValueError, TalosOSError):
        with pytest.raises(kind) as caught, as_options(words):
            raise kind(message)
        assert str(caught.value) == shown
