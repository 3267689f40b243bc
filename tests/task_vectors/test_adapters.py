"""Adapters of PEFT, in and out, against PEFT itself; what has another meaning is refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from talos import Mask, TaskVector, fine_tune
from talos.errors import TalosOSError, TalosValueError
from talos.files import Checkpoint
from talos.methods import LLora
from talos.methods.l_lora import export_adapter
from tests.cases import assert_bit_equal, assert_close, dense_mask

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q, self.v = (
            nn.Embedding(11, 8),
            nn.Linear(8, 6),
            nn.Linear(8, 10, bias=False),
        )
        self.gpt, self.head = Conv1D(7, 7), nn.Linear(6, 3)
        self.patch, self.pixel, self.line = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(3, 4, 1),
            nn.Conv1d(3, 5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.q(x))


LORA = {"init_lora_weights": False, "bias": "lora_only", "modules_to_save": ["head"]}
MANY = ["emb", "q", "v", "patch", "pixel", "line"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(
        r=2, target_modules=MANY, rank_pattern={"v": 3}, alpha_pattern={"q": 5}, **LORA
    ),
    "conv1d": lambda: peft.LoraConfig(
        r=4,
        target_modules=["gpt"],
        use_rslora=True,
        fan_in_fan_out=True,
        init_lora_weights=False,
    ),
    "shira": lambda: peft.ShiraConfig(r=1, target_modules=["q", "v"], init_weights=False),
    "super": lambda: peft.SupertuningConfig(
        sparsity=0.8, target_modules=["q", "v"], init_weights=False
    ),
}


def randomised(model: nn.Module) -> nn.Module:
    """Change what trains whole: biases and heads."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad and ("bias" in name or "modules_to_save" in name):
                param.add_(torch.randn_like(param))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_comes_in_as_peft_merges_it(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = Net().to(dtype)
    tuned = randomised(peft.get_peft_model(copy.deepcopy(base), CONFIGS[kind]()))
    tuned.save_pretrained(tmp_path)
    vector = TaskVector.from_adapter(tmp_path, base)
    merged = weights(tuned.merge_and_unload())
    vector.apply_(base)
    for name, ours in weights(base).items():
        # PEFT rounds a sparse adapter and that of an embedding to bfloat16 before it adds them. It
        # multiplies that of a convolution as a convolution, whose order of sums is the CPU's.
        rounded = dtype == torch.bfloat16 and (kind in ("shira", "super") or name == "emb.weight")
        if rounded or ours.dim() == 4:
            assert_close(ours, merged[name], reduction=True)
        else:
            assert_bit_equal(ours, merged[name])


def test_the_hybrid_of_super_tuning_is_a_sum(tmp_path: Path) -> None:
    base = Net()
    config = peft.SupertuningConfig(sparsity=0.8, target_modules=["q"], r=2, init_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    tuned.save_pretrained(tmp_path)
    TaskVector.from_adapter(tmp_path, base).apply_(base)
    assert_close(base.q.weight, tuned.merge_and_unload().q.weight, reduction=True)


def test_a_checkpoint_serves_as_base(tmp_path: Path) -> None:
    base = Net()
    safetensors.torch.save_file(base.state_dict(), tmp_path / "model.safetensors")
    peft.get_peft_model(copy.deepcopy(base), CONFIGS["lora"]()).save_pretrained(tmp_path / "a")
    from_file = TaskVector.from_adapter(tmp_path / "a", Checkpoint(tmp_path))
    assert from_file == TaskVector.from_adapter(tmp_path / "a", base)
    assert set(from_file.fingerprints) == set(from_file.mask.names)


def sparse_vector(densities: dict[str, float], model: nn.Module) -> TaskVector:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: model.get_parameter(name).shape for name in densities}
    dense = {
        name: dense_mask(math.prod(shape), densities[name], generator).view(shape)
        for name, shape in shapes.items()
    }
    mask = Mask.from_dense(dense)
    return TaskVector(mask, torch.randn(mask.nnz, generator=generator))


@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_a_sparse_vector_goes_out_and_comes_back(kind: str, tmp_path: Path) -> None:
    base = nn.ModuleDict({"q": nn.Linear(40, 30), "k": nn.Linear(40, 40), "o": nn.Linear(30, 40)})
    vector = sparse_vector({"q.weight": 0.1, "k.weight": 0.03, "o.weight": 0.0}, base)
    vector.export_adapter(tmp_path / "a", kind, base_model="org/base")
    assert TaskVector.from_adapter(tmp_path / "a", base).allclose(vector, rtol=0, atol=0)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert loaded.peft_config["default"].base_model_name_or_path == "org/base"
    merged = loaded.merge_and_unload()
    vector.apply_(base)
    for name, ours in weights(base).items():
        assert_bit_equal(ours, weights(merged)[name])


@pytest.mark.parametrize("nnz", [1, 7, 333, 999, 1000])
def test_super_tuning_takes_at_least_the_densest_share(nnz: int, tmp_path: Path) -> None:
    """PEFT rounds its number of entries down, in floating point."""
    base = nn.ModuleDict({"q": nn.Linear(40, 25), "k": nn.Linear(3, 3)})
    mask = Mask.from_indices({"q.weight": torch.arange(nnz)}, {"q.weight": (25, 40)})
    vector = TaskVector(mask, torch.ones(nnz))
    vector.export_adapter(tmp_path / "a", "supertuning")
    sparsity = json.loads((tmp_path / "a/adapter_config.json").read_text())["sparsity"]
    assert int(1000 * (1 - sparsity)) in (nnz, nnz + 1)
    assert TaskVector.from_adapter(tmp_path / "a", base).allclose(vector)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.c_attn = Conv1D(24, 8)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "c_attn"):
            q, k, v = self.c_attn(x).chunk(3, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(q * k.tanh() + v)


@pytest.mark.parametrize("fused", [False, True])
def test_l_lora_goes_out_as_a_lora_that_merges_to_the_same(fused: bool, tmp_path: Path) -> None:
    base = nn.ModuleDict({"attn": Attention(fused)})
    vectors = []
    for seed in range(2):
        model = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        batches = [(torch.randn(9, 8, generator=generator), torch.arange(9) % 8) for _ in range(4)]
        vectors.append(
            fine_tune(
                model,
                batches,
                method=LLora(rank=3, lora_alpha=5.0),
                steps=4,
                lr=1e-2,
                logits_fn=lambda m, batch: m["attn"](batch[0]),
            )
        )
    for i, vector in enumerate([*vectors, 0.4 * vectors[0] + 0.3 * vectors[1]]):
        export_adapter(vector, base, tmp_path / f"{i}")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"{i}")
        merged, edited = weights(loaded.merge_and_unload()), copy.deepcopy(base)
        vector.apply_(edited)
        changed = {n for n, each in weights(base).items() if not torch.equal(each, merged[n])}
        assert changed == set(vector.mask.names)
        for name, ours in weights(edited).items():
            assert_close(ours, merged[name], reduction=True)
    with pytest.raises(TalosOSError, match="folder must not exist"):
        export_adapter(vectors[0], base, tmp_path / "0")
    other = TaskVector(vectors[0].mask, vectors[0].values, metadata=LLora(rank=3, seed=1).metadata)
    with pytest.raises(TalosValueError, match="product with the A0 of its seed"):
        export_adapter(other, base, tmp_path / "other")
    with pytest.raises(TalosValueError, match="must come from l_lora with one rank and one seed"):
        export_adapter(vectors[0] + other, base, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "got use_dora=True"),
        ({"target_parameters": ["w"]}, "got target_parameters"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights='pissa'"),
        ({"peft_type": "VERA"}, "got VERA"),
        ({"lora_alpha": None}, "lora_alpha of q must be a number"),
        ({"of_a_later_version": 3}, "got of_a_later_version=3"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern must map regular expressions to numbers"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern must map regular expressions to numbers"),
        ({"lora_alpha": 10**400}, "must be finite"),
    ],
)
def test_what_means_something_else_is_refused(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    base = Net()
    config = peft.LoraConfig(r=2, target_modules=["q"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TalosValueError, match=match):
        TaskVector.from_adapter(tmp_path, base)


def test_files_and_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, file = Net(), tmp_path / "adapter_model.safetensors"
    with pytest.raises(TalosOSError, match=r"must hold adapter_model\.safetensors"):
        TaskVector.from_adapter(tmp_path, base)
    config = peft.SupertuningConfig(sparsity=0.8, target_modules=["q"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(TalosValueError, match=r"lacks 1: q.weight"):
        TaskVector.from_adapter(tmp_path, nn.ModuleDict({"k": nn.Linear(8, 6)}))
    with pytest.raises(TalosValueError, match=r"must fit q.weight of shape \(2, 2\)"):
        TaskVector.from_adapter(tmp_path, nn.ModuleDict({"q": nn.Linear(2, 2)}))
    kept = safetensors.torch.load_file(file)
    indices = kept.pop("base_model.model.q.supertuning_indices")
    safetensors.torch.save_file(kept, file)
    with pytest.raises(TalosValueError, match=r"whole adapter of q.weight, got only values"):
        TaskVector.from_adapter(tmp_path, base)
    kept["base_model.model.q.supertuning_indices"] = indices.neg() - 1
    safetensors.torch.save_file(kept, file)
    with pytest.raises(TalosValueError, match=r"must fit q.weight"):
        TaskVector.from_adapter(tmp_path, base)
    safetensors.torch.save_file({"q.lora_A.weight": torch.ones(2, 8)}, file)
    with pytest.raises(TalosValueError, match=r"names with base_model.model."):
        TaskVector.from_adapter(tmp_path, base)


def test_vectors_that_no_sparse_adapter_holds_are_refused(tmp_path: Path) -> None:
    base = nn.ModuleDict({"q": nn.Linear(40, 30), "small": nn.Linear(2, 2)})
    out = tmp_path / "a"
    vector = sparse_vector({"q.weight": 0.1, "q.bias": 0.5}, base)
    with pytest.raises(TalosValueError, match=r"linear layers only for shira, got q.bias"):
        vector.export_adapter(out, "shira")
    with pytest.raises(
        TalosValueError, match=r"kind must be one of shira, supertuning, got 'lora'"
    ):
        vector.export_adapter(out, "lora")
    vector = sparse_vector({"q.weight": 0.1, "small.weight": 0.5}, base)
    with pytest.raises(TalosValueError, match=r"got 2, with which small.weight of shape \(2, 2\)"):
        vector.export_adapter(out, "shira")
    assert not out.exists()
    vector.export_adapter(out, "supertuning")
    with pytest.raises(TalosOSError, match="folder must not exist"):
        vector.export_adapter(out, "supertuning")
    vector.export_adapter(out, "supertuning", overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TalosOSError, match=r"must hold nothing but an adapter, got notes\.txt"):
        vector.export_adapter(out, "supertuning", overwrite=True)
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_A.weight": torch.tensor(1.0), "lora_B.weight": torch.ones(6, 2)},
        {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(12)},
        {"lora_A.weight": torch.ones(2, 8) * 1j, "lora_B.weight": torch.ones(6, 2)},
        {"lora_embedding_A": torch.ones(2), "lora_embedding_B": torch.tensor(1.0)},
        {"supertuning_values": torch.tensor(1.0), "supertuning_indices": torch.tensor(0)},
        {"supertuning_values": torch.ones(1, 2), "supertuning_indices": torch.tensor([[0, 1]])},
    ],
)
def test_tensors_of_other_dimensions_are_refused(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    named = {f"base_model.model.q.{name}": each for name, each in tensors.items()}
    safetensors.torch.save_file(named, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TalosValueError, match=r"its tensors must fit q\.weight"):
        TaskVector.from_adapter(tmp_path, nn.ModuleDict({"q": nn.Linear(8, 6)}))


@pytest.mark.parametrize("pattern", [r"(\w|.)+Z", ".*.*.*Z", "(a{1,9}){1,9}"])
def test_patterns_that_take_for_ever_are_refused(pattern: str, tmp_path: Path) -> None:
    base = Net()
    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q"]))
    tuned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for patterns in ({pattern: 2}, {r".*\.?q": 2, pattern: 2}):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({**config, "alpha_pattern": patterns})
        )
        with pytest.raises(TalosValueError, match="alpha_pattern must repeat two parts at most"):
            TaskVector.from_adapter(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "alpha_pattern": {r".*\.?q": 16}})
    )
    assert len(TaskVector.from_adapter(tmp_path, base).values)
