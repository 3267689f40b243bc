"""The benches' own arithmetic, files and command, without measuring anything."""

import json
from pathlib import Path

import pytest
import torch

from benches import forms, gpu, measure
from benches.results_file import add_result, all_results, write_json
from benches.shapes import ModelShape, TensorShape
from benches.table import OURS, Record, table_lines

TINY = ModelShape("tiny", (TensorShape("a", (96, 32), 64), TensorShape("b", (7,))))


def record(form: str, seconds: float, **others: object) -> Record:
    values = {"op": "sparse_adam_", "shape": "tiny", "spread": 0.0, "bandwidth": 1e10} | others
    return Record(form=form, seconds=seconds, bytes_moved=2 * 10**9, **values)


def test_table_holds_ratios_to_ours() -> None:
    lines = table_lines(
        [record(OURS, 0.5), record("dense", 1.0), record("x", 1.0, comparable=False)]
    )
    ours, dense, other = (line.split("|") for line in lines if "0.00" in line)
    assert ours[-2].strip() == "1.00"
    assert dense[-2].strip() == "2.00"
    assert other[-2].strip() == ""
    assert ours[5].strip() == "4.0"  # 2 GB in half a second
    assert ours[6].strip() == "0.40"  # of 10 GB/s


def test_results_replace_their_like_and_keep_the_rest(tmp_path: Path) -> None:
    add_result(tmp_path, record(OURS, 1.0).as_dict())
    add_result(tmp_path, record("dense", 2.0).as_dict())
    path = add_result(tmp_path, record(OURS, 3.0).as_dict())
    add_result(tmp_path, record(OURS, 4.0, op="add_delta_").as_dict())
    assert path.name == "sparse_adam.json"
    found = [(each["op"], each["form"], each["seconds"]) for each in all_results(tmp_path)]
    assert found == [
        ("add_delta_", OURS, 4.0),
        ("sparse_adam_", "dense", 2.0),
        ("sparse_adam_", OURS, 3.0),
    ]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"records": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"records": object()})
    assert json.loads(path.read_text()) == {"records": [1]}


def test_byte_model_of_random_positions() -> None:
    assert forms.sector_share(0.1, 4) == pytest.approx(0.57, abs=0.005)
    assert forms.sector_share(0.1, 2) == pytest.approx(0.82, abs=0.006)
    assert forms.sector_share(1.0, 4) == 1.0


@pytest.mark.parametrize("form", [forms.ours, forms.whole, forms.frozen, forms.elementwise])
def test_every_form_steps_as_torch_does(form: object) -> None:
    device = torch.device("cpu")
    made = form(TINY, device)
    for _ in range(3):
        made.step()
    wanted = forms.expected(TINY, device, 3)["a"]
    mask = TINY.masks()["a"]
    torch.testing.assert_close(made.weights["a"][mask].double(), wanted, rtol=2.0**-22, atol=1e-9)
    assert made.bytes_moved > 0
    assert made.state_bytes() > 0


def test_machine_names_no_host() -> None:
    described = measure.machine()
    assert {"device", "torch", "triton", "commit", "threads"} <= set(described)
    assert measure.folder_name("NVIDIA H200") == "nvidia-h200"


def test_gpu_command_lists_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", "somewhere", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["build", "tests", "benches", "table"]


def test_gpu_command_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
