"""What a dry run tells: every parameter once, with the reason why it is not scored."""

import open_clip
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from talos.app.cli.plan import FROZEN, LEFT_OUT, SCORED, activation_bytes, shares, shares_table
from talos.errors import TalosValueError
from talos.names import named_parameters
from talos.params import select_parameters


class Classifier(nn.Module):
    """One parameter of each kind: tied, embedded, frozen, a head, a fused projection, a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.query = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.vector = nn.Parameter(torch.zeros(4))
        self.norm = nn.LayerNorm(4).requires_grad_(False)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(4, 3)


def printed(shown: Table) -> list[list[str]]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(shown)
    return [line.split() for line in capture.get().splitlines()]


def fates(model: nn.Module, params: str) -> dict[str, tuple[int, str, str]]:
    return {each.name: (each.numel, each.fate, each.reason) for each in shares(model, params)}


def test_each_reason_is_given() -> None:
    found = fates(Classifier(), "maskable")
    assert found["embed.weight"] == (28, LEFT_OUT, "tied to an embedding")
    assert found["query.weight"] == (16, SCORED, "")
    assert found["attention.in_proj_weight"] == (48, SCORED, "")
    assert found["vector"] == (4, LEFT_OUT, "no linear, patch or norm layer")
    assert found["norm.weight"] == (4, FROZEN, "no command trains it")
    assert found["head.bias"] == (3, LEFT_OUT, "head")
    untied = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    assert fates(untied, "maskable")["0.weight"] == (6, LEFT_OUT, "embedding")
    assert fates(Classifier(), "query")["head.bias"] == (3, LEFT_OUT, "query does not match")


def test_of_fused_projections_a_part_is_scored() -> None:
    found = [each for each in shares(Classifier(), "qk") if each.name == "attention.in_proj_weight"]
    assert [(each.numel, each.nbytes, each.fate) for each in found] == [
        (32, 128, SCORED),
        (16, 64, LEFT_OUT),
    ]
    assert fates(Classifier(), "qk")["head.bias"][2] == "neither query nor key"


@pytest.mark.parametrize("params", ["maskable", "qk", "weight"])
@pytest.mark.parametrize(
    "model",
    [
        Classifier(),
        T5ForConditionalGeneration(
            T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        open_clip.model.VisionTransformer(
            image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_ratio=2.0, output_dim=6
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_shares_are_what_calibration_selects(model: nn.Module, params: str) -> None:
    found = shares(model, params)
    selection = select_parameters(model, params)
    scored = {each.name: each.numel for each in found if each.fate == SCORED}
    assert scored == {name: each.numel for name, each in selection.items()}
    assert sum(each.numel for each in found) == sum(p.numel() for p in model.parameters())
    assert {each.name for each in found} == set(named_parameters(model))
    assert all((each.reason == "") == (each.fate == SCORED) for each in found)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(TalosValueError, match="requires_grad=True"):
        shares(Classifier().requires_grad_(False), "maskable")


def test_the_table_sums_what_it_shows() -> None:
    found = shares(Classifier(), "maskable")
    rows = printed(shares_table(found, layers=False))
    assert ["scored", "total", "6", "100"] in rows
    assert ["frozen", "total", "2", "8"] in rows
    assert ["left", "out", "total", "4", "47"] in rows
    layered = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    rows = printed(shares_table(shares(layered, "maskable"), layers=True))
    assert ["scored", "0", "other", "1", "4"] in rows
    assert ["scored", "1", "bias", "1", "2"] in rows


def test_activations_are_counted_exactly() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.second(self.first(batch["x"]).tanh())

    model = Two().train()
    assert activation_bytes(model, {"x": torch.randn(4, 5)}) == 4 * 7 * 4  # tanh's output, once
    assert model.training
    assert all(param.grad is None for param in model.parameters())
