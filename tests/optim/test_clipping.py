"""Clipping that the step does: the bits of clipping at once, and never of the wrong gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import talos
from talos.errors import TalosRuntimeError
from talos.masks import Mask
from talos.optim import SparseAdam
from talos.optim.buckets import Bucket
from tests.cases import assert_bit_equal, assert_close

LARGE = 1e6  # a norm that lets every gradient through


def trained(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, SparseAdam]:
    """A small model, half of whose entries are trained; the same one at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    return model, SparseAdam(model, Mask.from_dense(masks), lr=0.1)


def backward(model: nn.Module, step: int = 0) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    model(x.to(model[0].weight.dtype)).square().sum().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    """What is kept of them, copied."""
    grads = [param.grad for param in model.parameters()]
    return [getattr(grad, "entries", grad).clone() for grad in grads]


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("max_norm", [0.1, LARGE])
def test_the_bits_are_those_of_clipping_at_once(compact: bool, max_norm: float) -> None:
    (model, optimizer), (other, deferring) = trained(), trained()
    for each in (optimizer, deferring):
        each.compact_gradients(compact)
    for step in range(3):
        backward(model, step)
        backward(other, step)
        before = gradients(other)
        norms = [o.clip_grad_norm_(max_norm, defer=o is deferring) for o in (optimizer, deferring)]
        assert_bit_equal(norms[1], norms[0])
        assert all(map(torch.equal, gradients(other), before))
        for each in (optimizer, deferring):
            each.step()
            each.zero_grad()
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            assert_bit_equal(ours.detach(), theirs.detach())


def test_16_bit_gradients_are_clipped_up_to_their_rounding() -> None:
    (model, optimizer), (other, deferring) = trained(torch.bfloat16), trained(torch.bfloat16)
    for each, chosen in ((model, optimizer), (other, deferring)):
        backward(each)
        chosen.clip_grad_norm_(0.1, defer=chosen is deferring)
        chosen.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        firsts = [o.state[p]["exp_avg"] for o, p in ((deferring, ours), (optimizer, theirs))]
        assert_close(*firsts, dtype=torch.bfloat16)


def test_the_norm_of_many_entries_is_not_rounded_at_each() -> None:
    model = nn.Linear(2048, 2049, bias=False)
    optimizer = SparseAdam(model, Mask.from_dense({"weight": torch.ones(2049, 2048) > 0}))
    model.weight.grad = torch.randn(2049, 2048)
    norm = optimizer.clip_grad_norm_(LARGE)
    assert_close(norm.double(), model.weight.grad.double().norm(), reduction=True, dtype=norm.dtype)


def test_what_is_pending_is_done_before_gradients_become_compact() -> None:
    (model, optimizer), (other, deferring) = trained(), trained()
    for each, chosen in ((model, optimizer), (other, deferring)):
        backward(each)
        chosen.clip_grad_norm_(0.1, defer=chosen is deferring)
        chosen.compact_gradients()
        backward(each, 1)  # makes all gradients anew, with the old ones in them
        chosen.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours.detach(), theirs.detach())


def again(model: nn.Module, optimizer: SparseAdam, defer: bool) -> None:
    optimizer.clip_grad_norm_(0.01, defer=defer)


def dropped(model: nn.Module, optimizer: SparseAdam, defer: bool) -> None:
    optimizer.zero_grad()
    backward(model, 1)


def zeroed(model: nn.Module, optimizer: SparseAdam, defer: bool) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(model, 1)


def dropped_by_the_model(model: nn.Module, optimizer: SparseAdam, defer: bool) -> None:
    model.zero_grad()
    backward(model, 1)


def densified(model: nn.Module, optimizer: SparseAdam, defer: bool) -> None:
    optimizer.compact_gradients(False)


def saved_and_loaded(model: nn.Module, optimizer: SparseAdam, defer: bool) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize(
    "between", [again, dropped, zeroed, dropped_by_the_model, densified, saved_and_loaded]
)
def test_what_happens_before_the_step_counts_as_after_clipping_at_once(
    between: Callable[[nn.Module, SparseAdam, bool], None],
) -> None:
    (model, optimizer), (other, deferring) = trained(), trained()
    for each, chosen in ((model, optimizer), (other, deferring)):
        chosen.compact_gradients()
        backward(each)
        defer = chosen is deferring
        chosen.clip_grad_norm_(0.1, defer=defer)
        between(each, chosen, defer)
        chosen.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours.detach(), theirs.detach())


def test_one_step_does_it() -> None:
    """A step more with the same gradients takes them as they are."""
    (model, optimizer), (other, deferring) = trained(), trained()
    for each, chosen in ((model, optimizer), (other, deferring)):
        backward(each)
        kept = gradients(each)
        chosen.clip_grad_norm_(0.1, defer=chosen is deferring)
        chosen.step()
        for param, grad in zip(each.parameters(), kept, strict=True):
            param.grad.copy_(grad)
        chosen.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours.detach(), theirs.detach())


def test_a_copy_has_no_clipping_to_do() -> None:
    model, optimizer = trained()
    backward(model)
    optimizer.clip_grad_norm_(0.1, defer=True)
    twin, copied = copy.deepcopy((model, optimizer))
    backward(twin)
    copied.step()
    fresh, expected = trained()
    backward(fresh)
    expected.step()
    for ours, theirs in zip(twin.parameters(), fresh.parameters(), strict=True):
        assert_bit_equal(ours.detach(), theirs.detach())


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("change", ["accumulated", "scaled", "one dropped"])
def test_gradients_that_changed_are_refused_before_any_write(compact: bool, change: str) -> None:
    model, optimizer = trained()
    optimizer.compact_gradients(compact)
    backward(model)
    optimizer.clip_grad_norm_(0.1, defer=True)
    if change == "accumulated":
        backward(model)
    elif change == "scaled":
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    else:
        model[0].bias.grad = None
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(TalosRuntimeError, match="gradients must not change"):
            call()
    for name, value in model.state_dict().items():
        assert_bit_equal(value, before[0][name])
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert all(steps["step"] == 1 for steps in optimizer.state.values())


def test_with_a_grad_scaler_as_clipping_at_once() -> None:
    (model, optimizer), (other, deferring) = trained(), trained()
    for each, chosen in ((model, optimizer), (other, deferring)):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
        for step in range(3):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
            loss = each(x).square().sum() * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(chosen)
            chosen.clip_grad_norm_(0.1, defer=chosen is deferring)
            scaler.step(chosen)
            scaler.update()
            chosen.zero_grad()
    assert deferring.state[other[0].bias]["step"] == 2
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours.detach(), theirs.detach())


def test_fine_tune_leaves_the_scaling_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    mask = Mask.from_dense({"weight": torch.ones(3, 4) > 0})
    at_once = SparseAdam.clip_grad_norm_

    def tuned() -> Tensor:
        torch.manual_seed(1)
        return talos.fine_tune(nn.Linear(4, 3), data, mask, steps=4, max_grad_norm=0.1).values

    with monkeypatch.context() as patch:
        patch.setattr(SparseAdam, "clip_grad_norm_", lambda self, norm, **_: at_once(self, norm))
        expected = tuned()
    monkeypatch.setattr(Bucket, "scale_gradients", None)
    assert_bit_equal(tuned(), expected)
