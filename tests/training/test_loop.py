"""`talos.fine_tune`: the loop against a hand-written one, its steps, its settings."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import talos
from talos.errors import TalosValueError
from talos.masks import Mask
from talos.task_vectors import TaskVector
from talos.training import FineTuneStep, fine_tune, fine_tune_steps
from tests.cases import assert_bit_equal

CLASSES = 3


def model_and_data(batches: int = 3, size: int = 16) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, CLASSES))
    inputs = torch.randn(batches, size, 8)
    labels = inputs[..., :CLASSES].argmax(-1)
    return model, list(zip(inputs, labels, strict=True))


def half_mask(model: nn.Module) -> Mask:
    generator = torch.Generator().manual_seed(0)
    return Mask.from_dense(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
    )


def run(
    model: nn.Module, data: Any, *args: Any, **kwargs: Any
) -> tuple[list[FineTuneStep], TaskVector]:
    steps: list[FineTuneStep] = []
    vector = fine_tune(model, data, *args, **kwargs, on_step=steps.append)
    return steps, vector


@pytest.mark.parametrize("sparse", [True, False])
def test_it_learns_and_its_task_vector_is_what_it_changed(sparse: bool) -> None:
    model, data = model_and_data()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    mask = half_mask(model) if sparse else None
    events, vector = run(model, data, mask, steps=60, lr=2e-2)
    assert events[-1].loss < 0.5 * events[0].loss
    assert [event.step for event in events] == list(range(1, 61))
    for name, tuned in model.state_dict().items():
        changed = tuned != base[name]
        if mask is not None:
            assert not bool((changed & ~mask.to_dense(name)).any())
    restored, _ = model_and_data()
    vector.apply_(restored)
    for name, tuned in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], tuned, rtol=1e-6, atol=1e-7)


def test_the_loop_equals_a_hand_written_one() -> None:
    model, data = model_and_data()
    steps, warmup, lr = 7, 2, 1e-2
    events, _ = run(model, data, steps=steps, warmup=warmup, lr=lr, weight_decay=0.1,
                    label_smoothing=0.1, max_grad_norm=0.5)  # fmt: skip
    other, _ = model_and_data()
    optimizer = torch.optim.AdamW(other.parameters(), weight_decay=0.1, fused=True)
    for step in range(1, steps + 1):
        inputs, labels = data[(step - 1) % len(data)]
        optimizer.zero_grad()
        loss = F.cross_entropy(other(inputs), labels, label_smoothing=0.1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        way = (step - warmup) / (steps - warmup + 1)
        rate = lr * step / warmup if step <= warmup else lr * (1 + math.cos(math.pi * way)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        event = events[step - 1]
        assert event == FineTuneStep(step, steps, loss.item(), rate, norm.item(), event.seconds)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_bit_equal(ours, theirs)


def test_accumulation_equals_one_larger_batch() -> None:
    ends = []
    for accumulate in (1, 4):
        model, data = model_and_data(4)
        if accumulate == 1:
            inputs, labels = zip(*data, strict=True)
            data = [(torch.cat(inputs), torch.cat(labels))]
        run(model, data, half_mask(model), steps=3, accumulate=accumulate)
        ends.append(model)
    for one, four in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


def test_modes_frozen_tensors_and_gradients_are_given_back() -> None:
    model, data = model_and_data()
    model.eval()
    model[0].train()
    model[3].bias.requires_grad_(False)
    mask = Mask.from_dense({"0.weight": torch.ones(16, 8) > 0})
    run(model, data, mask, steps=2)
    assert [module.training for module in model] == [True, False, False, False]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["3.bias"]
    assert all(param.grad is None for param in model.parameters())


def test_a_caller_that_stops_early_gets_its_model_back() -> None:
    model, data = model_and_data()
    model.eval()
    mask = Mask.from_dense({"0.weight": torch.ones(16, 8) > 0})
    events = fine_tune_steps(model, data, mask, steps=9)
    next(events)
    assert not model[3].bias.requires_grad
    events.close()
    assert model[3].bias.requires_grad
    assert not model.training


def test_a_callback_that_raises_stops_the_run_and_the_model_comes_back() -> None:
    model, data = model_and_data()

    def stop(step: FineTuneStep) -> None:
        assert not model[3].bias.requires_grad
        if step.step == 2:
            raise KeyboardInterrupt

    mask = Mask.from_dense({"0.weight": torch.ones(16, 8) > 0})
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model.eval(), data, mask, steps=9, on_step=stop)
    assert model[3].bias.requires_grad
    assert not model.training


def test_the_stream_of_steps_is_the_same_training() -> None:
    model, data = model_and_data()
    other, _ = model_and_data()
    found: list[TaskVector] = []

    def driven() -> Iterator[FineTuneStep]:
        found.append((yield from fine_tune_steps(other, data, half_mask(other), steps=3)))

    assert [step.step for step in driven()] == [1, 2, 3]
    assert_bit_equal(fine_tune(model, data, half_mask(model), steps=3).values, found[0].values)
    with pytest.raises(TypeError, match="step"):
        fine_tune_steps(model, data, step=3)


def test_a_run_that_never_begins_leaves_the_model_as_it_was() -> None:
    model, data = model_and_data()
    mask = Mask.from_dense({"0.weight": torch.ones(16, 8) > 0})
    fine_tune_steps(model, data, mask, steps=2).close()
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("sparse", [True, False])
def test_without_clipping_an_infinite_gradient_stays_in_its_entry(sparse: bool) -> None:
    model, data = model_and_data()
    mask = half_mask(model) if sparse else None
    chosen = mask.to_dense("3.weight").nonzero()[0] if mask else torch.tensor([0, 0])
    spoil = torch.zeros(CLASSES, 16)
    spoil[tuple(chosen)] = torch.inf
    model[3].weight.register_hook(lambda grad: grad + spoil)
    event = next(fine_tune_steps(model, data, mask, steps=1, max_grad_norm=None))
    assert event.grad_norm == math.inf
    assert torch.isnan(model[3].weight).nonzero().tolist() == [chosen.tolist()]
    assert all(
        bool(torch.isfinite(p).all()) for n, p in model.named_parameters() if n != "3.weight"
    )


def test_logits_of_positions_want_a_loss_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, CLASSES))
    data = [(torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64))]
    with pytest.raises(TalosValueError, match="pass loss_fn"):
        fine_tune(model, data, steps=1)


def test_a_selected_tensor_without_a_gradient_is_told() -> None:
    model, data = model_and_data()
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    mask = Mask.from_dense({"0.weight": torch.ones(16, 8) > 0, "unused": torch.ones(3) > 0})
    with pytest.warns(UserWarning, match="1 of 2 selected tensors got no gradient"):
        run(model, data, mask, steps=2)


def test_autocast_and_a_loss_function() -> None:
    model, data = model_and_data()
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), batch[1])

    run(model, data, half_mask(model), steps=2, autocast=torch.bfloat16, loss_fn=loss)
    assert seen == [torch.bfloat16] * 2


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model, data = model_and_data()
    data[1] = (data[1][0] * torch.nan, data[1][1])
    events = fine_tune_steps(model, data, half_mask(model), steps=5)
    next(events)
    after_one = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TalosValueError, match="lr must keep the loss finite, got nan at step 2"):
        next(events)
    for name, value in model.state_dict().items():
        assert_bit_equal(value, after_one[name])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1"),
        ({"warmup": -1}, "warmup must be an integer of at least 0"),
        ({"warmup": 9}, r"warmup must be at most steps \(4\)"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"steps": 2.5}, "steps must be an integer"),
    ],
)
@pytest.mark.parametrize("sparse", [True, False])
def test_bad_settings_raise_at_the_call(settings: dict[str, Any], match: str, sparse: bool) -> None:
    model, data = model_and_data()
    with pytest.raises(TalosValueError, match=match):
        fine_tune_steps(
            model, data, half_mask(model) if sparse else None, **{"steps": 4} | settings
        )


def test_batches_that_are_missing_or_run_out() -> None:
    model, data = model_and_data()
    with pytest.raises(TalosValueError, match="at least one batch"):
        run(model, [], half_mask(model), steps=1)
    with pytest.raises(TalosValueError, match="pass a list or a DataLoader"):
        run(model, iter(data), half_mask(model), steps=9)
    with pytest.raises(TalosValueError, match="pair"):
        run(model, [data[0][0]], half_mask(model), steps=1)


class Averages(nn.Module):
    """Keeps an average of its inputs, as a buffer that its output depends on."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean(0).detach()
        return x - self.average


def trained_with(layer: nn.Module) -> tuple[nn.Module, nn.Module, talos.TaskVector]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    tuned = copy.deepcopy(base)
    data = [(3 * torch.randn(8, 4) + 2, torch.arange(8) % 3) for _ in range(2)]
    return base, tuned, talos.fine_tune(tuned, data, steps=4, lr=1e-2)


def test_running_statistics_stay_those_of_the_base() -> None:
    base, tuned, vector = trained_with(nn.BatchNorm1d(4))
    assert tuned[1].training
    vector.apply_(base)
    x = torch.randn(5, 4)
    torch.testing.assert_close(base.eval()(x), tuned.eval()(x))
    assert "moved_buffers" not in vector.metadata


def test_a_buffer_that_training_moves_is_told() -> None:
    with pytest.warns(UserWarning, match=r"not in the task vector: 1.average"):
        _, _, vector = trained_with(Averages(persistent=True))
    assert vector.metadata["moved_buffers"] == ["1.average"]
    trained_with(Averages(persistent=False))  # no file holds it either
