"""The benches' own arithmetic, forms, files and command, on tiny models."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import talos
from benches import (
    bench_add_delta,
    bench_fisher_diag,
    bench_gather_grad,
    bench_sddmm,
    bench_select_threshold,
    bench_sparse_adam,
    bench_swap,
    forms,
    host,
    measure,
    scoring,
)
from benches import bench_estimators as estimators
from benches.bench_fisher_diag import OPS, TOLERANCE
from benches.results_file import add_result, all_results, draw_costs, write_json
from benches.shapes import ModelShape, TensorShape
from benches.table import OURS, Record, table_lines
from talos.app.models import ZeroShotClassifier, load_encoder
from talos.params import select_parameters
from talos_kernels._ops import CUDA_BACKENDS
from tests.tiny import save_tiny_encoder

TINY = ModelShape(
    "tiny", (TensorShape("a", (96, 32), 64), TensorShape("b", (7,))), layers=1, tokens=5
)
CPU = torch.device("cpu")


def record(form: str, seconds: float, **others: object) -> Record:
    values = {"op": "sparse_adam_", "shape": "tiny", "spread": 0.0, "bandwidth": 1e10}
    return Record(form=form, seconds=seconds, **values | {"bytes_moved": 2 * 10**9} | others)


def cells(lines: list[str]) -> list[dict[str, str]]:
    """The rows of a table by the titles of their columns."""
    titles, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines if "|" in line)
    return [dict(zip(titles, row, strict=True)) for row in rows]


def test_table_holds_ratios_to_ours() -> None:
    ours, dense, other = cells(
        table_lines(
            [
                record(OURS, 0.5, peak_bytes=10**6),
                record("dense", 1.0, peak_bytes=4 * 10**6),
                record("x", 1.0, comparable=False),
            ]
        )
    )
    assert [row["x ours"] for row in (ours, dense, other)] == ["1.00", "2.00", ""]
    assert [row["peak x ours"] for row in (ours, dense, other)] == ["1.00", "4.00", ""]
    assert ours["GB/s"] == "4.0"  # 2 GB in half a second
    assert ours["of copy"] == "0.40"  # of 10 GB/s
    assert "GFLOP" not in ours
    assert "state MB" not in ours


def test_table_holds_operations_and_overlaps() -> None:
    flops = {"bytes_moved": None, "flops": 10**12, "matrix_rate": 4e12}
    about = flops | {"overlaps": {"16 samples": 0.75}}
    (row,) = cells(table_lines([record(OURS, 0.5, **about)]))
    assert row["GFLOP/s"] == "2000"
    assert row["of matrix"] == "0.50"
    assert row["16 samples"] == "0.7500"
    assert "GB/s" not in row


def test_committed_results_are_records() -> None:
    """Files that earlier versions wrote still make a table, as the GPU command reads them."""
    fields = Record.__dataclass_fields__
    found = [
        Record(**{key: value for key, value in result.items() if key in fields})
        for folder in (Path(measure.ROOT) / "benches" / "results").iterdir()
        if folder.is_dir()
        for result in all_results(folder)
    ]
    assert found
    assert all(row["ms"] for row in cells(table_lines(found[:3])))


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


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_ours_at_a_density(density: float) -> None:
    form = forms.ours(TINY, CPU, density=density)
    bench_sparse_adam.check(OURS, form, TINY, CPU, density)
    nnz = forms.selection(TINY, density).nnz
    assert nnz == pytest.approx(density * 64 * 32, rel=0.2)
    assert 8 * nnz <= form.state_bytes() <= 8 * nnz + 4096


def test_another_backend_serves_within_its_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = CUDA_BACKENDS["sparse_adam_"]
    for name in ("csrc", "triton"):
        with forms.backend(name, "sparse_adam_"):
            assert CUDA_BACKENDS["sparse_adam_"] == name
    assert CUDA_BACKENDS["sparse_adam_"] == usual
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(forms, "cuda_backends", lambda op: ("csrc",))
    with (
        pytest.raises(RuntimeError, match="must be one of csrc here, got triton"),
        forms.backend("triton", "sparse_adam_"),
    ):
        pass


def test_the_step_by_the_compiled_library_is_served_by_it_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = []
    form = forms.Form(lambda: served.append(CUDA_BACKENDS["sparse_adam_"]), {}, 0, lambda: 0)
    monkeypatch.setattr(forms, "ours", lambda shape, device: form)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench_sparse_adam.ours_by_csrc(TINY, CPU).step()
    assert served == ["csrc"]
    assert CUDA_BACKENDS["sparse_adam_"] == "triton"

    monkeypatch.setattr(bench_sparse_adam, "cuda_backends", lambda op: ("triton",))
    missing = bench_sparse_adam.missing
    assert missing(bench_sparse_adam.CSRC, CPU) == "there is no CUDA device"
    assert missing(bench_sparse_adam.CSRC, torch.device("cuda")) == "csrc/ was built without CUDA"
    assert missing(OURS, CPU) is None
    monkeypatch.setattr(bench_sparse_adam, "cuda_backends", lambda op: ("triton", "csrc"))
    assert missing(bench_sparse_adam.CSRC, torch.device("cuda")) is None


MAKERS = {
    "add_delta": (bench_add_delta, lambda name: bench_add_delta.make(TINY, name, CPU)),
    "gather_grad": (bench_gather_grad, lambda name: bench_gather_grad.make(TINY, name, CPU)),
    "swap": (bench_swap, lambda name: bench_swap.make(TINY, name, CPU)),
    "sddmm": (bench_sddmm, lambda name: bench_sddmm.make(TINY, name, 2, CPU)),
    "select_threshold": (
        bench_select_threshold,
        lambda name: bench_select_threshold.make([torch.randn(10**5).square()], name),
    ),
}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (module, _) in MAKERS.items() for name in module.FORMS]
)
def test_every_form_of_an_op_passes_its_check(op: str, name: str) -> None:
    work = MAKERS[op][1](name)
    work.check()
    work.step()
    assert work.about["bytes_moved"] > 0
    assert (work.about["flops"] is None) == (op != "sddmm")


@pytest.mark.parametrize("form", [f for name, f in host.FORMS.items() if "fused" not in name])
def test_the_host_alone_changes_no_weight_and_the_ops_are_back_afterwards(
    form: Callable[[int, torch.device], host.Form],
) -> None:
    device = torch.device("cpu")
    with host.no_launches(device):
        made = form(2, device)
        before = [param.detach().clone() for param, _ in made.gradients]
        for work in made.works().values():
            made.give_gradients()
            work()
        assert all(map(torch.equal, before, (param for param, _ in made.gradients)))
    for param, _ in made.gradients:
        param.grad = torch.ones_like(param)
    made.optimizer.step()
    assert not any(map(torch.equal, before, (param for param, _ in made.gradients)))


def test_float32_is_multiplied_in_float32() -> None:
    assert not torch.backends.cudnn.allow_tf32  # in the tests, and in the benches:
    code = "import benches.conftest, torch; print(torch.backends.cudnn.allow_tf32)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("first", "kind", "calls", "rounds"),
    [
        (1e-4, "cuda", 10, 20),
        (1e-4, "cpu", 1, 20),
        (0.04, "cuda", 1, 20),  # by tens, that would be 8 seconds
        (2.0, "cuda", 1, 4),
        (4.0, "cpu", 1, 3),
        (25.0, "cuda", 1, 1),
    ],
)
def test_a_form_is_timed_for_some_seconds(first: float, kind: str, calls: int, rounds: int) -> None:
    assert measure.calls_for(first, kind) == calls
    assert measure.rounds_for(first * calls) == rounds


def test_machine_names_no_host() -> None:
    described = measure.machine()
    assert {"device", "torch", "triton", "commit", "threads"} <= set(described)
    assert measure.folder_name("NVIDIA H200") == "nvidia-h200"


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    def work() -> None:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # 8
        del first  # 4
        third = second * 2  # 8
        torch.ones(500, 1000)  # 10, for a moment
        del second, third

    assert measure.peak_bytes(work) == 10_000_000


def test_peak_memory_counts_what_stays() -> None:
    kept: list[torch.Tensor] = []
    assert measure.peak_bytes(lambda: kept.append(torch.ones(1000))) == 4000
    assert measure.peak_bytes(lambda: None) == 0


def test_spread_is_between_the_quartiles() -> None:
    assert measure.median_and_spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0)
    assert measure.median_and_spread([2.0]) == (2.0, 0.0)


def tiny_tower(kind: str) -> tuple[nn.Module, scoring.Batch]:
    ids = torch.randint(0, 50, (3, 7))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "image":
        tower = VisionTransformer(
            image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
        )
        return tower, {"images": torch.randn(3, 3, 32, 32)}
    if kind == "text":
        config = BertConfig(vocab_size=50, hidden_size=16, **sizes)
        return BertModel(config, add_pooling_layer=False), {"input_ids": ids}
    t5 = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=50)
    tower = T5ForConditionalGeneration(t5)
    tower.shared.weight.data.mul_(0.25)
    return tower, {"input_ids": ids, "decoder_input_ids": ids[:, :4]}


@pytest.fixture(scope="module", params=["image", "text", "sequence"])
def task(request: pytest.FixtureRequest) -> tuple[scoring.Scored, scoring.Batch, scoring.Scores]:
    torch.manual_seed(0)
    tower, inputs = tiny_tower(request.param)
    model = scoring.Scored(tower, inputs)
    batch = scoring.with_labels(model, inputs)
    return model, batch, scoring.exact(model, batch)


# What needs a package that may know some layers only is checked by the bench itself.
EXACT_FORMS = [name for name, form in scoring.FORMS.items() if form.scores and not form.optional]


@pytest.mark.parametrize("name", EXACT_FORMS)
def test_every_form_scores_as_the_loop_does(
    task: tuple[scoring.Scored, scoring.Batch, scoring.Scores], name: str
) -> None:
    model, batch, wanted = task
    form = scoring.FORMS[name]
    found = form.score(form.prepare(model), batch)
    assert set(wanted) == set(select_parameters(model))
    assert len(found) == len(wanted)
    assert scoring.relative_error(found, wanted) <= TOLERANCE


def test_plain_form_has_the_gradients_of_the_mean(
    task: tuple[scoring.Scored, scoring.Batch, scoring.Scores],
) -> None:
    model, batch, _ = task
    wanted = {name: torch.zeros_like(param) for name, param in model.scored().items()}
    for sample in scoring.samples(batch):
        for name, grad in scoring.plain(model, sample).items():
            wanted[name] += grad / len(batch["labels"])
    assert scoring.relative_error(scoring.plain(model, batch), wanted) <= TOLERANCE


def test_tokens_taken_for_samples_are_told() -> None:
    torch.manual_seed(0)
    dy, x = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    right = torch.einsum("bto,bti->boi", dy, x).square().sum(0)
    wrong = torch.einsum("bto,bti->oi", dy.square(), x.square())
    assert scoring.relative_error({"w": wrong}, {"w": right}) > 0.1
    assert scoring.relative_error({"w": right}, {"w": right}) == 0


def test_further_batches_are_timed_one_by_one(
    task: tuple[scoring.Scored, scoring.Batch, scoring.Scores],
) -> None:
    model, batch, _ = task
    times = scoring.further_batches(model, batch, 3)
    assert len(times) == 3
    assert min(times) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_form_of_the_op(name: str, dtype: torch.dtype) -> None:
    work = bench_fisher_diag.make(name, (4, 6), samples=3, tokens=5, dtype=dtype, device=CPU)
    work.check()
    work.step()
    assert work.flops == 2 * 3 * 5 * 4 * 6


def test_both_forms_make_the_same_sampled_gradient() -> None:
    layers = bench_sddmm.make_layers(TINY, 20, torch.device("cpu"))
    for form in (
        lambda: bench_sddmm.sampled(layers),
        lambda: bench_sddmm.product_and_gather(layers, torch.empty(96 * 32)),
    ):
        for layer in layers:
            layer.out.fill_(torch.nan)
        form()
        assert max(map(bench_sddmm.relative_error, layers)) <= 1e-6


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ZeroShotClassifier:
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")
    return ZeroShotClassifier(load_encoder(folder), ["a letter", "a mark", "a digit"])


@pytest.fixture(scope="module")
def batches(classifier: ZeroShotClassifier) -> list[scoring.Batch]:
    texts = [f"{i} is a text of {'some ' * (i % 5)}words" for i in range(32)]
    encoded = classifier.encoder.tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.arange(32) % 3
    whole = {"labels": labels, **{k: encoded[k] for k in ("input_ids", "attention_mask")}}
    return [{name: each[start : start + 16] for name, each in whole.items()} for start in (0, 16)]


@pytest.mark.parametrize("rows", estimators.LOOPS.values())
def test_the_loops_make_the_mask_that_calibrate_makes(
    classifier: ZeroShotClassifier,
    batches: list[scoring.Batch],
    rows: Callable[[nn.Module, scoring.Batch], Iterator[torch.Tensor]],
) -> None:
    wide = copy.deepcopy(classifier).double()
    before = copy.deepcopy(wide.state_dict())
    wanted = talos.calibrate(wide, batches, 0.1, 4, soft=estimators.SOFT, seed=3)
    mask = estimators.loop_calibrate(wide, batches, 0.1, 4, seed=3, rows=rows)
    assert mask.nnz == wanted.nnz
    assert estimators.overlap(mask, wanted) == 1.0
    other = estimators.loop_calibrate(wide, batches, 0.1, 4, seed=4, rows=rows)
    assert estimators.overlap(other, wanted) < 0.999
    torch.testing.assert_close(wide.state_dict(), before, rtol=0, atol=0)


def test_masks_of_more_samples_include_the_fewer(
    classifier: ZeroShotClassifier, batches: list[scoring.Batch]
) -> None:
    exact = {"draws": "exact"}
    masks = estimators.masks_of_one_round(classifier, batches, (16, 32), 0, exact)
    for size, given in ((16, batches[:1]), (32, batches)):
        wanted = talos.calibrate(classifier, given, estimators.DENSITY, 1, draws="exact")
        assert estimators.overlap(masks[size], wanted) > 0.999
    assert estimators.overlap(masks[16], masks[32]) < 0.999


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_every_estimator_comes_near_the_exact_scores(
    classifier: ZeroShotClassifier, batches: list[scoring.Batch], name: str
) -> None:
    options = estimators.ESTIMATORS[name].options
    exact = talos.calibrate(classifier, batches, estimators.DENSITY, 1, draws="exact")
    masks = estimators.masks_of_one_round(classifier, batches, (32,), 0, options)
    assert estimators.overlap(masks[32], exact) > 2 * estimators.DENSITY


def test_costs_are_drawn_beside_their_file(tmp_path: Path) -> None:
    results = sorted(Path(measure.ROOT).glob("benches/results/*/methods.json"))
    records = json.loads(results[0].read_text())["records"]
    model, label = records[0]["model"], records[0]["shape"]
    forms = [each["cost"] for each in records if each["shape"] == label]
    draw_costs(tmp_path, model, label, [form for form in forms if form["form"] != "nonlinear"])
    assert not list(tmp_path.iterdir())
    draw_costs(tmp_path, model, label, forms)
    assert [path.stem.rpartition("-")[2] for path in sorted(tmp_path.iterdir())] == [
        "memory",
        "time",
    ]
    assert all("TaLoS" in path.read_text() for path in tmp_path.iterdir())
