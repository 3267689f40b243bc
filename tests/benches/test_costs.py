"""The costs of an iteration: its forms, counters, byte model, file and command, on small models."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import talos.app.costs.workload as workloads
from benches.other_libraries import projections
from benches.shapes import SHAPES
from talos.app.cli import main
from talos.app.costs import (
    FORMS,
    PAPER,
    Agreement,
    Form,
    Running,
    Workload,
    library_model,
    make_workload,
    measure,
)
from talos.app.costs.figure import memory_bars, time_bars
from talos.app.costs.meters import held_bytes, launches
from talos.app.costs.results import paper_ratios, ratios, results_of, save_results, table_rows
from talos.app.costs.running import HYPER
from talos.app.costs.step_bytes import dense_step, masked_step, sector_share, sparse_step
from talos.errors import TalosRuntimeError, TalosValueError
from talos.params import select_parameters


def small_model(name: str, layers: int | None = None) -> nn.Module:
    """The library's own classes at a size that costs nothing."""
    import transformers
    from open_clip.transformer import VisionTransformer

    if name == "minilm":
        sizes = {"num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30000}
        config = transformers.BertConfig(hidden_size=16, num_hidden_layers=layers or 1, **sizes)
        return transformers.BertModel(config)
    if name == "t5-large":
        t5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 30000}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(num_layers=layers or 1, **t5)
        )
    return VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=layers or 2, heads=2, mlp_ratio=2.0,
        output_dim=8,
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "library_model", small_model)
    monkeypatch.setattr("talos.app.costs.iteration.copy_bandwidth", lambda device: 1e10)


def workload(name: str = "vit-b-32", dtype: torch.dtype = torch.float32) -> Workload:
    tokens = None if name.startswith("vit") else 6
    return make_workload(name, batch_size=2, tokens=tokens, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["minilm", "vit-b-32", "t5-large"])
@pytest.mark.usefixtures("small")
def test_every_form_is_what_it_claims(name: str, dtype: torch.dtype) -> None:
    made = workload(name, dtype)
    before = {key: each.clone() for key, each in made.model.state_dict().items()}
    forms = [form for form in FORMS if not form.missing(made)]
    assert len(forms) == len(FORMS)
    costs = {cost.form: cost for cost in measure(made, forms, rounds=1)}
    for key, each in made.model.state_dict().items():
        assert torch.equal(each, before[key])
    assert all(param.requires_grad and param.grad is None for param in made.model.parameters())
    weights = sum(param.nbytes for param in made.model.parameters())
    head = sum(buffer.nbytes for buffer in made.model.buffers())
    trained = sum(param.nbytes for param in made.model.parameters() if param.requires_grad)
    dense, sparse = costs["nonlinear"], costs["talos"]
    assert dense.memory.weights == weights + head
    assert costs["linearized"].memory.weights == 2 * weights + head
    assert dense.memory.gradients == trained
    steps = 4 * len(list(made.model.parameters()))
    assert dense.memory.state == 2 * trained + steps
    # Two moments and the index of a selected entry, against two moments of all.
    assert 8 * made.mask.nnz <= sparse.memory.state < 0.5 * dense.memory.state
    assert sparse.memory.gradients < costs["talos_dense_gradients"].memory.gradients * 1.5
    assert sparse.memory.peak < dense.memory.peak
    for cost in costs.values():
        assert cost.total >= max(cost.forward_backward, cost.optimizer) > 0
        assert cost.launches > 0


@pytest.mark.usefixtures("small")
def test_a_form_that_moves_too_much_or_nothing_is_told() -> None:
    made = workload()

    def start(workload: Workload, *, frozen: bool) -> Running:
        lr = 0.0 if frozen else 1e-3
        optimizer = torch.optim.AdamW(workload.model.parameters(), **{**HYPER, "lr": lr})
        mask = workload.mask
        about = {} if frozen else {"allowed": lambda: mask}
        return Running(
            workload, workload.model, workload.logits, optimizer, optimizer.step, **about
        )

    loose = Form("loose", "loose", lambda w: start(w, frozen=False))
    idle = Form("idle", "idle", lambda w: start(w, frozen=True))
    with pytest.raises(TalosRuntimeError, match="unselected entries"):
        measure(made, [loose], rounds=1)
    with pytest.raises(TalosRuntimeError, match="must train"):
        measure(made, [idle], rounds=1)


@pytest.mark.usefixtures("small")
def test_a_form_of_another_loss_or_gradient_is_told() -> None:
    made = workload()
    by_name = {form.name: form for form in FORMS}

    def doubled(workload: Workload) -> Running:
        running = by_name["nonlinear"].start(workload)
        running.logits_fn = lambda module, batch: 2 * module(batch)
        return running

    def other(workload: Workload) -> Running:
        running = by_name["talos_dense_gradients"].start(workload)

        def logits(module: nn.Module, batch: object) -> torch.Tensor:
            found = module(batch)
            found.register_hook(lambda gradient: 2 * gradient)
            return found

        running.logits_fn = logits
        return running

    with pytest.raises(TalosRuntimeError, match="begin with the loss"):
        measure(made, [by_name["nonlinear"], Form("doubled", "doubled", doubled)], rounds=1)
    with pytest.raises(TalosRuntimeError, match="gradient"):
        measure(made, [by_name["talos"], Form("other", "other", other)], rounds=1)


@pytest.mark.usefixtures("small")
def test_forms_of_several_calls_must_agree() -> None:
    made, agreement = workload(), Agreement()
    by_name = {form.name: form for form in FORMS}
    for name in ("talos", "nonlinear", "masked_adamw"):
        measure(made, [by_name[name]], rounds=1, iterations=1, agreement=agreement)
    assert agreement.title == by_name["talos"].title
    assert agreement.gradient is not None
    agreement.gradient = agreement.gradient.flip(0)
    with pytest.raises(TalosRuntimeError, match="gradient"):
        measure(made, [by_name["masked_adamw"]], rounds=1, agreement=agreement)
    agreement.loss += 1
    with pytest.raises(TalosRuntimeError, match="must begin with the loss of TaLoS"):
        measure(made, [by_name["nonlinear"]], rounds=1, agreement=agreement)


@pytest.mark.parametrize("name", ["vit-b-32", "vit-l-14"])
def test_transformers_has_the_tower_where_open_clip_is_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outline(tower: nn.Module) -> tuple[int, int, tuple[int, int]]:
        selected = select_parameters(tower, "qk")
        numel = sum(param.numel() for param in tower.parameters())
        return numel, sum(each.numel for each in selected.values()), tower.image_size

    usual = library_model(name, 2)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    other = library_model(name, 2)
    assert type(other) is not type(usual)
    assert outline(other) == outline(usual)
    assert other.output_dim == usual.output_dim


def test_a_workload_of_transformers_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    made = make_workload("vit-b-32", batch_size=2, layers=1)
    assert made.logits(made.model, made.batch).shape == (2, 64)
    assert set(made.rows.values()) == {768}
    assert len(made.rows) == 2
    assert projections(made.model) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("minilm", ["query", "value"]), ("t5-large", ["q", "v"]), ("vit-b-32", None)],
)
def test_adapters_find_queries_and_values(name: str, wanted: list[str] | None) -> None:
    assert projections(small_model(name)) == wanted


@pytest.mark.usefixtures("small")
def test_a_form_without_memory_is_left_out() -> None:
    made = workload()
    by_name = {form.name: form for form in FORMS}

    def large(workload: Workload) -> Running:
        running = by_name["talos"].start(workload)

        def logits(module: nn.Module, batch: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        running.logits_fn = logits
        return running

    form = Form("large", "large", large)
    costs = measure(made, [form, by_name["nonlinear"]], rounds=2)
    assert [cost.form for cost in costs] == ["nonlinear"]
    assert all(param.requires_grad for param in made.model.parameters())
    with pytest.raises(TalosRuntimeError, match="smaller batch"):
        measure(made, [form])


@pytest.mark.parametrize("name", ["minilm", "vit-b-32"])
def test_the_mask_is_that_of_the_benches(name: str) -> None:
    """The rows of queries and keys that the lists of tensors give, of one layer."""
    made = make_workload(name, batch_size=1, layers=1)
    listed = {
        tensor.name: tensor.query_key_rows
        for tensor in SHAPES[name].touched
        if re.search(r"\.(layer|resblocks)\.0\.", tensor.name)
    }
    assert {key.removeprefix("tower."): rows for key, rows in made.rows.items()} == listed
    numel = sum(rows * SHAPES_WIDTH[name] for rows in made.rows.values())
    assert made.mask.nnz == pytest.approx(0.6 * numel, rel=0.01)


SHAPES_WIDTH = {"minilm": 384, "vit-b-32": 768}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gpt"}, "model must be one of"),
        ({"batch_size": 0}, "batch must be at least 1"),
        ({"layers": 13}, r"layers must lie in \[1, 12\]"),
        ({"tokens": 5}, "tokens must be left out with vit-b-32"),
        ({"name": "minilm", "tokens": 513}, r"tokens must lie in \[1, 512\]"),
    ],
)
def test_sizes_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(TalosValueError, match=message):
        make_workload(**{"name": "vit-b-32", "batch_size": 1} | options)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_sectors_are_those_of_a_random_selection(density: float, itemsize: int) -> None:
    entries = 32 // itemsize
    selected = torch.rand(20000, entries, generator=torch.Generator().manual_seed(0)) < density
    share = float(selected.any(1).float().mean())
    assert sector_share(density, itemsize) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_bytes_of_a_step_are_those_that_it_touches(density: float) -> None:
    """Sector by sector of a random selection, read and written."""
    n = 80_000
    mask = torch.rand(n, generator=torch.Generator().manual_seed(0)) < density
    nnz = int(mask.sum())
    sectors = int(mask.view(-1, 8).any(1).sum()) * 32
    moments = nnz * 4 * 2 * 2
    compact = sectors * 2 + nnz * 4 + moments + 123
    dense = sectors * 3 + moments + 123
    assert sparse_step([(n, nnz)], 123, compact=True) == pytest.approx(compact, rel=0.01)
    assert sparse_step([(n, nnz)], 123, compact=False) == pytest.approx(dense, rel=0.01)
    masters = sparse_step([(n, n)], 0, compact=True, itemsize=2)
    assert masters == n * (2 * 2 + 4 + 16 + 8)


def test_bytes_of_dense_steps() -> None:
    weight, grad, moments, mask = 8, 4, 16, 4
    assert dense_step(10) == 10 * (weight + grad + moments)
    assert masked_step(10) == 10 * (weight + 3 * grad + moments + mask)
    assert sparse_step([(10, 10)], 0, compact=False) == dense_step(10)


def test_launches_of_the_cpu_are_operators() -> None:
    x = torch.ones(3)
    assert launches(lambda: x.add_(1).mul_(2)) == 2
    assert held_bytes([x, x[1:], torch.ones(2)], torch.device("cpu")) == 12 + 8


def test_the_paper_s_ratios() -> None:
    """As the paper's text sums them up."""
    assert set(PAPER) == {"vit-b-32", "vit-l-14", "t5-large"}
    assert all(len(methods) == 5 for methods in PAPER.values())
    assert paper_ratios("vit-b-32", "talos") == pytest.approx(
        (0.1256 / 0.3608, 0.1644 / 0.3722, 4.7 / 6.5), rel=1e-3
    )
    assert paper_ratios("minilm", "talos") is None
    assert paper_ratios("vit-b-32", "masked_adamw") is None


@pytest.mark.usefixtures("small")
def test_files_tables_and_figures(tmp_path: Path) -> None:
    made = workload()
    forms = [form for form in FORMS if form.name in ("nonlinear", "l_lora", "talos")]
    costs = measure(made, forms, rounds=2)
    results = results_of(costs, {"model": "vit-b-32"}, {"x": "no such form"})
    save_results(results, tmp_path / "costs.json")
    read = json.loads((tmp_path / "costs.json").read_text())
    assert (read["schema"], read["schema_version"]) == ("talos-costs", 1)
    assert [each["form"] for each in read["forms"]] == ["nonlinear", "l_lora", "talos"]
    talos = read["forms"][-1]
    assert talos["memory"]["peak"] == costs[-1].memory.peak
    assert talos["bytes_per_second"] == pytest.approx(talos["bytes_moved"] / talos["optimizer"])
    assert ratios(read["forms"], read["forms"][0]) == (1.0, 1.0, 1.0)
    assert read["paper"]["talos"]["peak_gib"] == 4.7
    rows = table_rows(read["forms"], "vit-b-32")
    assert [row[0] for row in rows] == ["non-linear", "L-LoRA", "TaLoS"]
    assert rows[2][5] == "0.35"  # the paper's forward-backward over its non-linear one
    for draw in (time_bars, memory_bars):
        document = ElementTree.fromstring(draw(read))
        assert document.tag == "{http://www.w3.org/2000/svg}svg"
        texts = {"".join(each.itertext()) for each in document.iter() if each.tag.endswith("text")}
        assert {"TaLoS", "non-linear", "paper"} <= texts


@pytest.mark.usefixtures("small")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    assert main(["bench", "--out", str(out), "--quick", "--layers", "1", "--dtype", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "TaLoS" in text
    assert "one round: times differ" in text
    assert "next" in text
    assert sorted(path.name for path in out.iterdir()) == ["costs.json", "memory.svg", "time.svg"]
    results = json.loads((out / "costs.json").read_text())
    assert results["settings"]["batch"] == 2
    assert len(results["forms"]) == len(FORMS)
    assert results["left_out"] == {}
    assert main(["bench", "--out", str(out), "--quick"]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model gpt", "--model must be"),
        ("--dtype fp16", "--dtype must be fp32 or bf16"),
        ("--rounds 0", "--rounds must be at least 1"),
        ("--batch 0", "batch must be at least 1"),
        ("--layers 99", "layers must lie in"),
        ("--tokens 9", "tokens must be left out"),
    ],
)
def test_the_command_refuses_before_it_writes(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    assert main(["bench", "--out", str(out), *arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_clip", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TalosRuntimeError, match=re.escape("pip install 'talos-sparse[clip]'")):
        library_model("vit-b-32", 1)
