"""Whole iterations by method, on small models."""

import json
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from open_clip.transformer import VisionTransformer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from benches import workload as workloads
from benches.iterations import HYPER, Agreement, Form, Running, measure_forms, stored_in
from benches.methods import FORMS, projections
from benches.workload import Workload, make_workload

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {form.name: form for form in FORMS}


def small_model(name: str, layers: int | None = None) -> nn.Module:
    """Return the library's own class at a size that costs nothing."""
    if name == "minilm":
        sizes = {"num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30000}
        config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, **sizes)
        return transformers.BertModel(config, add_pooling_layer=False)
    if name == "t5-large":
        t5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 30000}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, **t5))
    return VisionTransformer(
        image_size=224, patch_size=56, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "library_model", small_model)
    monkeypatch.setattr("benches.measure.copy_bandwidth", lambda device: 1e10)


def workload(name: str = "vit-b-32", dtype: torch.dtype = torch.float32) -> Workload:
    tokens = None if name.startswith("vit") else 6
    return make_workload(name, batch_size=2, tokens=tokens, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["minilm", "vit-b-32", "t5-large"])
def test_every_form_is_what_it_claims(name: str, dtype: torch.dtype) -> None:
    made = workload(name, dtype)
    before = {key: each.clone() for key, each in made.model.state_dict().items()}
    costs = {cost.form: cost for cost in measure_forms(made, FORMS, rounds=1)}
    assert list(costs) == list(BY_NAME)
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
    assert costs["lota_dense_gradients"].memory.gradients == pytest.approx(trained, rel=0.01)
    assert sparse.memory.peak < dense.memory.peak
    for cost in costs.values():
        assert cost.total >= max(cost.forward_backward, cost.optimizer) > 0
        assert cost.launches > 0


SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 80}
OWN: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(hidden_size=40, vocab_size=50, **SIZES)
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(hidden_size=40, image_size=8, patch_size=4, **SIZES)
    ),
    "gpt2": lambda: transformers.GPT2Model(  # its queries and keys lie in columns
        transformers.GPT2Config(
            n_embd=40, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=40, d_ff=80, d_kv=20, num_heads=2, num_layers=1, vocab_size=50
        )
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ones_own_is_measured(name: str, tmp_path: Path) -> None:
    OWN[name]().save_pretrained(tmp_path / name)
    made = make_workload(str(tmp_path / name), batch_size=2, tokens=6)
    wanted = {"images"} if name == "vit" else {"input_ids"}
    assert set(made.batch) == (wanted | {"decoder_input_ids"} if name == "t5" else wanted)
    loaded = OWN[name]().from_pretrained(tmp_path / name).state_dict()
    for key, each in made.model.tower.state_dict().items():
        if key.removeprefix("model.") in loaded:
            assert torch.equal(each, loaded[key.removeprefix("model.")])
    forms = [BY_NAME[each] for each in ("nonlinear", "talos")]
    dense, sparse = measure_forms(made, forms, rounds=1, iterations=1)
    assert 8 * made.mask.nnz <= sparse.memory.state < dense.memory.state


@pytest.mark.slow
def test_the_benches_take_a_model_of_ones_own(tmp_path: Path) -> None:
    OWN["vit"]().save_pretrained(tmp_path / "mine")
    given = ["--model", str(tmp_path / "mine"), "--form", "talos", "--form", "nonlinear"]
    given += ["--dtype", "fp32", "--batch", "2", "--rounds", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benches", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "mine, batch 2, 8 pixels, fp32, chosen forms" in done.stdout, done.stdout
    assert "1 passed" in done.stdout  # and no bench of single ops
    found = json.loads((tmp_path / "methods.json").read_text())
    assert {record["model"] for record in found["records"]} == {"mine"}
    refused = subprocess.run(
        [*command, "--shape", "minilm"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "--model must come without --shape" in refused.stderr


def plain(lr: float, *, masked: bool) -> Callable[[Workload], Running]:
    """Return a form that trains everything, and claims to train the mask or everything."""

    def start(workload: Workload) -> Running:
        optimizer = torch.optim.AdamW(workload.model.parameters(), **{**HYPER, "lr": lr})
        about = {"allowed": lambda: workload.mask} if masked else {}
        return Running(
            workload, workload.model, workload.logits, optimizer, optimizer.step, **about
        )

    return start


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Form:
    """Return a form whose logits are changed."""

    def start(workload: Workload) -> Running:
        running = BY_NAME[name].start(workload)
        running.logits_fn = lambda module, batch: change(module(batch))
        return running

    return Form("changed", "changed", start)


def with_doubled_gradient(logits: torch.Tensor) -> torch.Tensor:
    logits.register_hook(lambda gradient: 2 * gradient)
    return logits


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ([Form("loose", "loose", plain(1e-3, masked=True))], "must not move the unselected"),
        ([Form("idle", "idle", plain(0.0, masked=False))], "must train"),
        ([BY_NAME["nonlinear"], changed("nonlinear", lambda x: 2 * x)], "begin with the loss"),
        ([BY_NAME["talos"], changed("talos_dense_gradients", with_doubled_gradient)], "gradient"),
    ],
    ids=["loose", "idle", "loss", "gradient"],
)
def test_a_form_that_does_something_else_is_refused(forms: list[Form], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        measure_forms(workload(), forms, rounds=1)


@pytest.mark.slow
def test_forms_of_several_calls_must_agree() -> None:
    made, agreement = workload(), Agreement()
    for name in ("talos", "nonlinear", "masked_adamw"):
        measure_forms(made, [BY_NAME[name]], rounds=1, iterations=1, agreement=agreement)
    agreement.gradient = agreement.gradient.flip(0)
    with pytest.raises(RuntimeError, match="gradient"):
        measure_forms(made, [BY_NAME["masked_adamw"]], rounds=1, agreement=agreement)
    agreement.loss += 1
    with pytest.raises(RuntimeError, match="must begin with the loss of TaLoS"):
        measure_forms(made, [BY_NAME["nonlinear"]], rounds=1, agreement=agreement)


@pytest.mark.slow
def test_a_form_without_memory_is_left_out() -> None:
    def fails(logits: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    made, form = workload(), changed("talos", fails)
    costs = measure_forms(made, [form, BY_NAME["nonlinear"]], rounds=2)
    assert [cost.form for cost in costs] == ["nonlinear"]
    assert all(param.requires_grad for param in made.model.parameters())
    assert measure_forms(made, [form]) == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("minilm", ["query", "value"]), ("t5-large", ["q", "v"]), ("vit-b-32", None)],
)
def test_adapters_find_queries_and_values(name: str, wanted: list[str] | None) -> None:
    assert projections(small_model(name)) == wanted


def test_nested_tensors_come_in_order() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    state = defaultdict(dict, {first: {"step": first, "none": None}, "x": OrderedDict(a=(second,))})
    found = list(stored_in([state, "text", 3, {torch.zeros(3)}]))
    assert [id(each) for each in found] == [id(first), id(second)]


def test_memory_is_kept_in_the_parts_of_a_tensor_that_is_made_of_others() -> None:
    inner = TwoTensor(torch.zeros(2), torch.ones(2))
    outer = TwoTensor(inner, TwoTensor(torch.full((2,), 2.0), torch.full((2,), 3.0)))
    found = list(stored_in({"a": [outer], "b": torch.full((2,), 4.0)}))
    assert [type(each) for each in found] == [torch.Tensor] * 5
    assert [each[0].item() for each in found] == [0.0, 1.0, 2.0, 3.0, 4.0]
