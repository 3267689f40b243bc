"""`talos extract` and `talos export`: files that go round, and refusals that write nothing."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from talos.app.cli import main
from talos.app.models import load_encoder
from talos.files import Checkpoint
from talos.masks import Mask
from talos.names import named_parameters
from talos.task_vectors import Patch, TaskVector
from tests.app.test_cli import refused
from tests.cases import assert_bit_equal
from tests.tiny import save_tiny_encoder

NAMES = ("layers.0.q_proj.weight", "layers.0.mlp.up_proj.weight", "norm.weight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Base and tuned in one folder; a third of the queries differs."""
    base = {name: torch.randn(6, 4) for name in NAMES}
    tuned = {name: each.clone() for name, each in base.items()}
    tuned[NAMES[0]][:2] += 1
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    return tmp_path


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_extract_and_export_go_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, vector = folder / "base", folder / "tuned", folder / "v.safetensors"
    run("extract", base, tuned, "--mask", "changed", "--out", vector)
    out, err = capsys.readouterr()
    assert re.search(r"query +1 +24 +8 +33\.33 %", out)
    assert re.search(r"norm +1 +24 +0 +0\.00 %", out)
    assert re.search(r"total +3 +72 +8 +11\.11 %", out)
    assert f"talos export {vector} --base {base}" in err
    assert TaskVector.load(vector).metadata["extracted"] == {"base": "base", "tuned": "tuned"}
    run("export", vector, "--base", base, "--out", folder / "out")
    out, err = capsys.readouterr()
    assert "1 files" in out
    assert "next" not in err  # nothing says which model it is
    wanted = TaskVector.load(vector)
    for name, each in Checkpoint(folder / "out").items():
        assert_bit_equal(each, Checkpoint(base)[name] + wanted.to_dense(name))


def test_several_vectors_and_a_scale(folder: Path) -> None:
    base, vector = folder / "base", folder / "v.safetensors"
    run("extract", base, folder / "tuned", "--out", vector, "--dtype", "bfloat16")
    assert TaskVector.load(vector).values.dtype == torch.bfloat16
    run("export", f"{vector}:0.5", f"{vector}:-2", "--base", base, "--out", folder / "out",
        "--scale", "0.5")  # fmt: skip
    loaded = TaskVector.load(vector)
    edit = TaskVector.combine([(0.5, loaded), (-2.0, loaded)])
    edit.export(base, folder / "wanted", 0.5)
    for name, each in Checkpoint(folder / "out").items():
        assert_bit_equal(each, Checkpoint(folder / "wanted")[name])


def test_a_mask_file_and_drop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = Mask.from_dense({NAMES[0]: torch.arange(24).reshape(6, 4) < 4})
    mask.save(folder / "mask.safetensors")
    words = ["extract", str(folder / "base"), str(folder / "tuned"), "--out",
             str(folder / "v.safetensors"), "--mask", str(folder / "mask.safetensors")]  # fmt: skip
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search("only where mask selects, got 4 other entries.*pass --drop", error)
    run(*words, "--drop")
    assert TaskVector.load(folder / "v.safetensors").mask == mask


def test_delta_and_patch(folder: Path) -> None:
    base, vector = folder / "base", folder / "v.safetensors"
    run("extract", base, folder / "tuned", "--mask", "changed", "--out", vector)
    run("export", f"{vector}:2", "--format", "delta", "--out", folder / "delta.safetensors")
    for name, each in load_file(folder / "delta.safetensors").items():
        assert_bit_equal(each, 2 * TaskVector.load(vector).to_dense(name))
    run("export", vector, "--format", "patch", "--base", base, "--out", folder / "p.safetensors")
    tensors = dict(Checkpoint(base))
    Patch.load(folder / "p.safetensors").apply_(tensors)
    run("export", vector, "--base", base, "--out", folder / "out")
    for name, each in Checkpoint(folder / "out").items():
        assert_bit_equal(tensors[name], each)


def test_a_vector_of_the_command_train_fits_the_folder_it_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_encoder(tmp_path / "base")
    texts = ["a cat", "a dog"]
    model = load_encoder(base).classifier(texts)
    tuned = copy.deepcopy(model)
    name, weight = next((n, p) for n, p in named_parameters(tuned).items() if "query.weight" in n)
    with torch.no_grad():
        weight[:3] += 0.5
    mask = Mask.from_dense({name: torch.ones(weight.shape) > 0})
    TaskVector.from_models(model, tuned, mask).save(tmp_path / "v.safetensors")
    run("export", tmp_path / "v.safetensors", "--base", base, "--out", tmp_path / "out")
    captured = capsys.readouterr()
    assert "warning" not in captured.err
    assert f"talos eval --model {tmp_path / 'out'} --data TASK" in captured.err
    loaded = load_encoder(tmp_path / "out")
    for key, each in tuned.encoder.state_dict().items():
        assert_bit_equal(loaded.state_dict()[key], each)


@pytest.mark.parametrize(
    "config", [{"model_type": "clip", "architectures": ["CLIPModel"]}, {"model_type": "bert"}]
)
def test_what_eval_cannot_load_is_left_to_transformers(
    config: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "base" / "config.json").write_text(json.dumps(config))
    run("extract", folder / "base", folder / "tuned", "--out", folder / "v.safetensors")
    capsys.readouterr()
    run("export", folder / "v.safetensors", "--base", folder / "base", "--out", folder / "out")
    out = capsys.readouterr().err
    assert "talos eval" not in out
    name = "CLIPModel" if "architectures" in config else "AutoModel"
    assert f"transformers.{name}.from_pretrained" in out


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, vector = (str(folder / name) for name in ("base", "tuned", "v.safetensors"))
    run("extract", base, tuned, "--out", vector)
    capsys.readouterr()
    out = ["--out", str(folder / "out")]
    file = ["--out", str(folder / "w.safetensors")]
    for words, message in (
        (
            ["extract", base, str(folder / "nowhere"), *file],
            "TUNED must be a readable file, got .*nowhere",
        ),
        (["extract", base, tuned, *file, "--mask", "changd"], "--mask must .*did you mean changed"),
        (["extract", base, tuned, *file, "--dtype", "int8"], "--dtype must be float32, bf"),
        (["extract", base, tuned, "--out", vector], "--out must not exist"),
        (["extract", base, str(folder), *file], "BASE and TUNED must hold model.safetensors"),
        (["export", vector, *out], "--base must be given unless --format is delta, got none"),
        (["export", vector, *file, "--format", "delta", "--base", base], "does not need"),
        (
            ["export", vector, *out, "--base", str(folder / "no")],
            "--base must be 'minilm', .*a folder .*no folder",
        ),
        (["export", vector, "--out", base, "--base", base], "--out must not exist"),
        (["export", vector, *out, "--base", tuned], "base must be the base .*pass --force"),
        (["export", vector, "--out", f"{base}/a", "--base", base], "--out must lie outside of"),
        (["export", vector, *out, "--base", base, "--format", "zip"], "--format must be checkpo"),
        (["export", vector, *out, "--base", base, "--scale", "nan"], "--scale must be a finite"),
        (["export", vector, *out, "--base", base, "--scale", "1e300"], "--scale must keep every"),
        (["export", vector, *out, "--base", str(folder)], "--base must hold model.safetensors"),
        (
            ["export", vector, "--out", str(folder / "no/out"), "--base", base],
            "--out must lie in an ex",
        ),
    ):
        refused(words, capsys, message, folder)
