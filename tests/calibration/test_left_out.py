"""What a preset leaves out is said: weights of unknown kinds, and weights that are computed."""

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from talos import calibrate, fisher_diag
from talos.calibration.left_out import left_out, warn_of_left_out
from talos.errors import TalosValueError
from talos.params import select_parameters
from tests.calibration.models import Apply, C, E, assert_scores, inputs, oracle, pooled


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Mixed(nn.Module):
    """A product with a weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(E, E))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bte,ef->btf", x, self.mixing)


def around(layer: nn.Module) -> nn.Module:
    """A linear layer, a layer of another kind, a linear layer and a head."""
    flat = Apply(lambda x: x.flatten(1)[:, : 2 * E])
    return nn.Sequential(nn.Linear(E, E), layer, flat, nn.LazyLinear(E), nn.Linear(E, C))


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: around(nn.Conv1d(5, 7, 3)),
    "lstm": lambda: around(Recurrent(nn.LSTM(E, E, batch_first=True))),
    "bare parameter": lambda: around(Mixed()),
}


def told(found: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in found if "does not know" in str(each.message)]


@pytest.mark.parametrize("name", UNKNOWN)
def test_weights_of_unknown_kinds_are_named_with_their_share(name: str) -> None:
    model, x = UNKNOWN[name](), inputs(8).float()
    model(x)
    chosen = set(select_parameters(model))
    unknown = {key: param for key, param in model.named_parameters() if key not in chosen}
    share = sum(p.numel() for p in unknown.values()) / sum(p.numel() for p in model.parameters())
    assert all(key.startswith("1.") for key in unknown)
    with pytest.warns(UserWarning, match="does not know") as record:
        mask = calibrate(model, [x], rounds=2)
    (message,) = told(list(record))
    assert f"leaves out {share:.1%} of the model's weights" in message
    assert record[0].filename == __file__
    assert mask.metadata["left_out"] == {"names": list(unknown), "share": pytest.approx(share)}
    with pytest.warns(UserWarning, match="does not know") as record:
        fisher_diag(model, [x])
    assert len(told(list(record))) == 1
    for param in unknown.values():
        param.requires_grad_(False)  # nobody is surprised then
    assert calibrate(model, [x]).metadata["left_out"] == {"names": [], "share": 0.0}


def test_who_names_weights_is_not_told_of_others() -> None:
    model, x = UNKNOWN["conv1d"](), inputs(8).float()
    model(x)
    for params in ("^0", "qk|^3"):
        assert calibrate(model, [x], params=params).metadata["left_out"] is None


def test_many_names_are_cut_short_and_layers_are_one_name() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({f"c{number}": nn.Conv1d(4, 4, 3) for number in range(8)})

    blocks = nn.ModuleList([block(), block()])
    model = nn.ModuleDict({"blocks": blocks, "linear": nn.Linear(2, 2)})
    sizes, _ = left_out(model, select_parameters(model))
    assert list(sizes)[:2] == ["blocks.*.c0.weight", "blocks.*.c0.bias"]
    assert sizes["blocks.*.c0.weight"] == 2 * 48
    with pytest.warns(UserWarning, match="and 11 more") as record:
        warn_of_left_out(model, select_parameters(model), "maskable")
    (message,) = told(list(record))
    assert message.count("blocks.") == 5


def test_heads_embeddings_norms_and_frozen_weights_are_left_out_on_purpose() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, E)
            self.pos_embed = nn.Parameter(torch.zeros(1, 30, E))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, E))
            self.layer, self.norm = nn.Linear(E, E), nn.GroupNorm(2, E)
            self.frozen = nn.Conv1d(E, E, 3).requires_grad_(False)
            self.proj, self.head = nn.Parameter(torch.zeros(E, E)), nn.Linear(E, 50)

    model = Model()
    assert left_out(model, select_parameters(model)) == ({}, 0.0)


def test_families_of_state_spaces_are_told() -> None:
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=16
    )
    model = transformers.MambaForCausalLM(config)
    sizes, share = left_out(model, select_parameters(model))
    assert {"backbone.layers.*.mixer.A_log", "backbone.layers.*.mixer.conv1d.weight"} <= set(sizes)
    assert share > 0.01


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def registered(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (parametrizations.weight_norm, "WeightNorm.*remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "SpectralNorm.*remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal.*remove_parametrizations"),
    "own": (registered, "Doubled.*remove_parametrizations"),
    "old weight_norm": (old_weight_norm, "WeightNorm.*remove_weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "SpectralNorm.*remove_spectral_norm"),
    "prune": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "prune.remove"),
}


def attention(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Two projections of known names and a layer behind them; the first is changed."""
    model = nn.Module()
    model.block = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1"):
        setattr(model.block, name, nn.Linear(E, E))
    change(model.block.q_proj)
    return model


@pytest.mark.parametrize("params", ["maskable", "qk", "attention", r"q_proj\.weight$", "."])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_refused_by_name_with_a_remedy(name: str, params: str) -> None:
    change, words = COMPUTED[name]
    model = attention(change)
    with pytest.raises(TalosValueError, match=rf"got block\.q_proj\.weight, computed by.*{words}"):
        select_parameters(model, params)
    rest = set(select_parameters(model, r"fc1|v_proj|q_proj\.bias"))
    assert rest == {f"block.{layer}.{leaf}" for layer in ("v_proj", "fc1") for leaf in
                    ("weight", "bias")} | {"block.q_proj.bias"}  # fmt: skip
    for key, param in model.named_parameters():
        if "q_proj" in key and not key.endswith("bias"):
            param.requires_grad_(False)
    assert not any("original" in key or "weight_" in key for key in select_parameters(model, "."))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal", "own"])
def test_the_remedies_work(name: str) -> None:
    change, _ = COMPUTED[name]
    torch.manual_seed(0)
    model, x = pooled(change(nn.Linear(E, E)), nn.Tanh(), nn.Linear(E, E)).double(), inputs()
    with pytest.raises(TalosValueError, match=r"got 0\.weight"):
        fisher_diag(model, [x])
    frozen = {"2.weight", "2.bias", "0.bias", "4.weight", "4.bias"}
    for param in model[0].parametrizations.parameters():
        param.requires_grad_(False)
    assert set(fisher_diag(model, [x])) == frozen
    parametrize.remove_parametrizations(model[0], "weight")
    model.requires_grad_(True)
    scores = fisher_diag(model, [x], draws="exact")
    assert_scores(scores, oracle(model, x))


def test_computed_weights_of_heads_and_of_unknown_layers_are_nobodys_business() -> None:
    model = nn.ModuleDict(
        {
            "layer": nn.Linear(E, E),
            "conv": parametrizations.weight_norm(nn.Conv1d(2, 2, 1)),
            "head": parametrizations.weight_norm(nn.Linear(E, C)),
        }
    )
    chosen = select_parameters(model)
    assert set(chosen) == {"layer.weight", "layer.bias"}
    assert any("conv.parametrizations" in name for name in left_out(model, chosen)[0])
