"""The optimizer's state as others see it: cleared, replaced, cast, moved, saved and loaded."""

import copy
import io
import logging
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import talos
from talos import Mask, SparseAdam
from talos.errors import TalosRuntimeError, TalosValueError
from tests.cases import assert_bit_equal

# These load a state into a second optimizer of a model whose first one is still there.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def full(model: nn.Module) -> Mask:
    return Mask.from_dense({n: torch.ones(p.shape) > 0 for n, p in model.named_parameters()})


def some(model: nn.Module) -> Mask:
    draw = torch.Generator().manual_seed(3)
    return Mask.from_dense(
        {n: torch.rand(p.shape, generator=draw) < 0.4 for n, p in model.named_parameters()}
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=draw).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()


def of_every_parameter(change: Callable[[Any, Tensor], object]) -> Callable[[Any], None]:
    def apply(optimizer: Any) -> None:
        for param in [p for group in optimizer.param_groups for p in group["params"]]:
            change(optimizer.state, param)

    return apply


def renewed(state: Any, param: Tensor) -> None:
    old = state[param]
    for key in ("exp_avg", "exp_avg_sq"):
        old[key] = torch.zeros_like(old[key])


RESETS: dict[str, Callable[[Any], object]] = {
    "replaced": lambda o: setattr(o, "state", defaultdict(dict)),
    "cleared": lambda o: o.state.clear(),
    "emptied": of_every_parameter(lambda state, p: state.update({p: {}})),
    "deleted": of_every_parameter(lambda state, p: state.pop(p)),
    "inner cleared": of_every_parameter(lambda state, p: state[p].clear()),
    "moments renewed": of_every_parameter(renewed),
    "moments zeroed": of_every_parameter(lambda state, p: state[p]["exp_avg"].zero_()),
    "steps set": of_every_parameter(lambda state, p: state[p].update(step=torch.tensor(9.0))),
    "merged": of_every_parameter(lambda state, p: state.__ior__({p: {}})),
}


@pytest.mark.parametrize("name", RESETS)
@pytest.mark.parametrize("saved", [False, True])
def test_what_others_do_to_the_state_is_done_as_to_torchs_own(name: str, saved: bool) -> None:
    models = []
    for sparse in (False, True):
        model = network()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        if sparse:
            optimizer = SparseAdam(model, full(model), lr=1e-2)
        train(model, optimizer, 3)
        RESETS[name](optimizer)
        if saved and sparse:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = SparseAdam(model, full(model), lr=1e-2)
            optimizer.load_state_dict(state)
        train(model, optimizer, 3, seed=1)
        models.append(model)
    for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_state_in_part_is_refused_and_nothing_is_written() -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    train(model, optimizer, 2)
    del optimizer.state[model[0].weight]["exp_avg_sq"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TalosValueError, match=r"state must hold exp_avg_sq of shape \(48,"):
        train(model, optimizer, 1)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_what_wrappers_keep_in_the_state_stays() -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    optimizer.state[model[0].weight]["note"] = "theirs"
    train(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["note"] == "theirs"
    assert optimizer.state[model[0].weight]["step"] == 2


def test_saved_states_are_plain_dictionaries(tmp_path: Any) -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    train(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {type(each) for each in loaded["state"].values()} == {dict}
    again = SparseAdam(model, full(model), lr=1e-2)
    again.load_state_dict(loaded)
    assert again.task_vector() == optimizer.task_vector()


class Reordered(nn.Module):
    """Two layers alike, in one order or the other."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            torch.manual_seed(ord(name))
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.get_submodule("b")(torch.tanh(self.get_submodule("a")(x)))
        return hidden


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_goes_by_name(prefix: str) -> None:
    mask = some(Reordered(("a", "b")))
    base, other = Reordered(("a", "b")), Reordered(("b", "a"))
    model = copy.deepcopy(base)
    optimizer = SparseAdam(model, mask, lr=1e-2)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    other.load_state_dict(model.state_dict())
    resumed = SparseAdam(other, mask, lr=1e-2)
    resumed.load_state_dict(state)
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            assert_bit_equal(resumed.state[other.get_parameter(name)][key], value)
    train(model, optimizer, 2, seed=1)
    train(other, resumed, 2, seed=1)
    edited = Reordered(("b", "a"))
    resumed.task_vector().apply_(edited)
    for name, param in model.named_parameters():
        assert_bit_equal(other.get_parameter(name), param)
        torch.testing.assert_close(edited.get_parameter(name), param)


def test_a_state_of_other_names_is_refused() -> None:
    model = Reordered(("a", "b"))
    optimizer = SparseAdam(model, some(model))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["param_names"][0] = "c.weight"
    with pytest.raises(TalosValueError, match=r"parameters of this group, lacks a\.weight"):
        optimizer.load_state_dict(state)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", DTYPES)
@pytest.mark.parametrize("compact", [False, True])
def test_a_cast_before_the_first_step_is_followed(
    before: torch.dtype, after: torch.dtype, compact: bool
) -> None:
    results = []
    for first in (True, False):
        model = network().to(before)
        if not first:
            model.to(after)
        optimizer = SparseAdam(model, some(model), lr=1e-2)
        if compact:
            optimizer.compact_gradients()
        model.to(after)
        train(model, optimizer, 3)
        results.append((model, optimizer.task_vector()))
    (followed, ours), (made, theirs) = results
    for one, other in zip(followed.parameters(), made.parameters(), strict=True):
        assert_bit_equal(one, other)
    assert ours == theirs
    base = network().to(before).to(after)
    ours.apply_(base)
    torch.testing.assert_close(base.state_dict(), dict(followed.state_dict()))


def test_a_cast_after_the_first_step_is_refused() -> None:
    model = network()
    optimizer = SparseAdam(model, some(model), lr=1e-2)
    train(model, optimizer, 1)
    model.bfloat16()
    with pytest.raises(TalosRuntimeError, match=r"was torch.float32 on cpu.*torch.bfloat16"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_a_state_of_one_precision_loads_in_another(saved: torch.dtype, loaded: torch.dtype) -> None:
    model = network().to(saved)
    optimizer = SparseAdam(model, some(model), lr=1e-2)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model).to(loaded)
    resumed = SparseAdam(other, some(model), lr=1e-2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for name, param in model.named_parameters():
        entry = resumed.state[other.get_parameter(name)]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                entry[key], optimizer.state[param][key], check_dtype=False, rtol=1e-6, atol=0
            )
    train(other, resumed, 1, seed=1)
    vector = resumed.task_vector()
    change = torch.cat([p.detach().float().flatten() for p in other.parameters()])
    initial = torch.cat([p.detach().to(saved).float().flatten() for p in network().parameters()])
    chosen = torch.cat([some(model).to_dense(n).flatten() for n, _ in model.named_parameters()])
    wanted = (change - initial)[chosen]
    rounding = 2 * float(torch.finfo(loaded).eps) * float(change.abs().max())
    torch.testing.assert_close(vector.values, wanted, rtol=0, atol=max(rounding, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_mapped_from_a_file_is_copied(dtype: torch.dtype, tmp_path: Path) -> None:
    """Offloaded: it lies in a file, of which only what is copied is read."""
    model = network().to(dtype)
    optimizer = SparseAdam(model, some(model), lr=1e-2)
    train(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    resumed = SparseAdam(other, some(model), lr=1e-2)
    mapped = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    resumed.load_state_dict(mapped)
    for state in mapped["state"].values():
        for value in state.values():
            value.fill_(7.0)  # copy on write: the file stays as it is
    train(model, optimizer, 2, seed=1)
    train(other, resumed, 2, seed=1)
    assert resumed.task_vector() == optimizer.task_vector()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_bit_equal(ours, theirs)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_state_goes_to_another_precision_and_back(dtypes: tuple[torch.dtype, ...]) -> None:
    """Moments, steps and masters keep their bits on the way."""
    optimizers = []
    for dtype in (dtypes[0], dtypes[1], dtypes[0]):
        model = network().to(dtype)
        optimizer = SparseAdam(model, some(model), lr=1e-2)
        if optimizers:
            optimizer.load_state_dict(optimizers[-1].state_dict())
        else:
            train(model, optimizer, 3)
        optimizers.append(optimizer)
    first, _, last = (each.state_dict()["state"] for each in optimizers)
    for number, state in first.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_bit_equal(last[number][key], state[key])


def test_a_state_without_values_is_refused() -> None:
    model = network()
    optimizer = SparseAdam(model, some(model), lr=1e-2)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][1] = {k: v.to("meta") if v.dim() else v for k, v in saved["state"][1].items()}
    other = SparseAdam(copy.deepcopy(model), some(model), lr=1e-2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(TalosValueError, match=r"exp_avg of shape \(\d+,\) .* on meta"):
        other.load_state_dict(saved)
    for number, state in other.state_dict()["state"].items():
        for key, value in state.items():
            assert_bit_equal(value, before["state"][number][key])


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_moments_load_in_another_dtype(moments: torch.dtype) -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2, moment_dtype=moments)
    train(model, optimizer, 2)
    other = torch.bfloat16 if moments == torch.float32 else torch.float32
    resumed = SparseAdam(model, full(model), lr=1e-2, moment_dtype=other)
    resumed.load_state_dict(optimizer.state_dict())
    entry = resumed.state[model[0].weight]["exp_avg"]
    assert entry.dtype == other
    wanted = optimizer.state[model[0].weight]["exp_avg"]
    torch.testing.assert_close(entry.float(), wanted.float(), rtol=2.0**-8, atol=0)


OF_GROUPS = ("lr", "betas", "eps", "weight_decay", "maximize", "seed", "param_names")


@pytest.mark.parametrize("lacking", [*((key,) for key in OF_GROUPS), OF_GROUPS], ids=str)
@pytest.mark.parametrize("base", [True, False])
def test_a_state_of_an_older_version_loads(lacking: tuple[str, ...], base: bool) -> None:
    """Groups without a key, numbers as steps, initial weights left out."""
    model = network()
    optimizer = SparseAdam(model, some(model), lr=1e-2)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
        if not base:
            del entry["base"]
    for group in state["param_groups"]:
        for key in lacking:
            del group[key]
    other = copy.deepcopy(model)
    resumed = SparseAdam(other, some(model), lr=1e-2)
    resumed.load_state_dict(state)
    train(model, optimizer, 2, seed=1)
    train(other, resumed, 2, seed=1)
    for one, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_bit_equal(one, theirs)
    if base:
        assert resumed.task_vector() == optimizer.task_vector()
    else:
        with pytest.raises(TalosRuntimeError, match="the initial weights are not known"):
            resumed.task_vector()


def test_float64_follows_adamw() -> None:
    model, reference = network().double(), network().double()
    optimizer = SparseAdam(model, full(model), lr=1e-2, weight_decay=0.1)
    oracle = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, 5)
    train(reference, oracle, 5)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    entry = optimizer.state[model[0].weight]
    assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == torch.float64
    base = network().double()
    optimizer.task_vector().apply_(base)
    torch.testing.assert_close(base[0].weight, model[0].weight, rtol=1e-6, atol=1e-8)


def test_steps_that_find_no_gradient_are_told_once() -> None:
    model = network()
    optimizer = SparseAdam(model, some(model), lr=1e-2)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="two steps found no gradient.*make a new optimizer"):
        train(model, optimizer, 1)
    train(model, optimizer, 2)


def test_what_another_optimizer_trains_and_this_one_froze_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    body = Mask.from_dense({"0.weight": torch.ones(8, 6) > 0})
    head = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    with caplog.at_level(logging.INFO, "talos"):
        optimizer = SparseAdam(model, body, lr=1e-2)
    assert "3 parameters without a selected entry are frozen" in caplog.text
    assert optimizer.frozen == ("0.bias", "2.weight", "2.bias")
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="AdamW steps 2.weight and 1 more, frozen by SparseAdam"):
        head.step()
    head.step()
    optimizer.release()
    other = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    other.step()


def test_an_optimizer_that_is_gone_watches_nobody() -> None:
    model = network()
    SparseAdam(model, Mask.from_dense({"0.weight": torch.ones(8, 6) > 0}))
    torch.optim.SGD(model[2].parameters(), lr=1e-2).step()


def test_an_optimizer_may_go_while_another_one_steps() -> None:
    model = network()
    owner = [SparseAdam(model, Mask.from_dense({"0.weight": torch.ones(8, 6) > 0}))]
    hooks = [lambda *_: owner.clear(), lambda *_: None]
    handles = [register_optimizer_step_pre_hook(hook) for hook in hooks]
    torch.optim.SGD(network().parameters(), lr=1e-2).step()
    assert not owner
    for handle in handles:
        handle.remove()


def test_two_optimizers_that_step_the_same_entries_are_told_once() -> None:
    model = network()
    first = SparseAdam(model, Mask.from_dense({"0.weight": torch.eye(8, 6) > 0}))
    apart = network()
    elsewhere = SparseAdam(apart, first.mask)
    others = SparseAdam(model, Mask.from_dense({"0.weight": torch.eye(8, 6) == 0}))
    for each in (model, apart):
        each[0].weight.grad = torch.ones(8, 6)
    for optimizer in (first, elsewhere, others, first):
        optimizer.step()
    second = SparseAdam(model, first.mask)  # as a cell of a notebook that runs again
    second.step()
    second.step()
    message = r"another SparseAdam trains entries of 0\.weight, and both step them; call release"
    with pytest.warns(UserWarning, match=message) as caught:
        first.step()
    assert [each.filename for each in caught] == [__file__]
    second.step()
    first.release()
    SparseAdam(model, first.mask).step()  # its own pair, of which the other made no step yet
    first.freeze()
    first.step()
    with pytest.warns(UserWarning, match=message):
        second.step()
    with pytest.raises(TalosValueError, match=r"if another SparseAdam froze it, call that one's"):
        SparseAdam(model, Mask.from_dense({"2.weight": torch.ones(3, 8) > 0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bytes_are_those_of_the_tensors_that_are_kept(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = SparseAdam(model, some(model))
    train(model, optimizer, 1)
    shown = [
        each
        for state in optimizer.state.values()
        for key, each in state.items()
        if key not in ("base", "fingerprint")  # they are on the CPU
    ]
    state = sum(each.nbytes for each in shown) + 8  # and the learning rate
    index = optimizer.mask.pack(list(optimizer.mask.names), "cpu").nbytes
    assert optimizer.nbytes == state + index
    optimizer.patch()
    assert optimizer.nbytes == state + index + optimizer.mask.nnz * dtype.itemsize


def test_two_parameters_of_one_memory_are_not_trained_apart() -> None:
    model = network()
    model.other = nn.Linear(6, 8)
    model.other.weight.data = model[0].weight.data
    with pytest.raises(TalosValueError, match=r"one parameter, got 0.weight and other.weight"):
        SparseAdam(model, Mask.from_dense({"0.weight": torch.ones(8, 6) > 0}))
    named = list(model.named_parameters(remove_duplicate=False))
    with pytest.raises(TalosValueError, match=r"one parameter, got 0.weight and other.weight"):
        SparseAdam(named, Mask.from_dense({"0.weight": torch.ones(8, 6) > 0}))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_of_a_wrapped_model_fit(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    wrapped = wrap(model)
    named = list(wrapped.named_parameters())
    bare = SparseAdam([{"params": named[:2], "lr": 1e-3}, {"params": named[2:]}], some(model))
    assert bare.task_vector().mask == some(model)
    SparseAdam(model, some(wrapped))
    talos.TaskVector.from_models(model, wrapped).apply_(wrapped)


@pytest.mark.parametrize("wrapped", [False, True])
def test_bare_parameters_have_the_names_of_their_module(wrapped: bool) -> None:
    """As trainers hand them over: in groups, of a model that others hold too."""
    model = network()
    holder = nn.ModuleDict({"net": model}) if wrapped else model
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = SparseAdam(groups, some(model), lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    train(model, optimizer, 2)
    named = network()
    pairs = list(named.named_parameters())
    other = SparseAdam(
        [
            {"params": [(n, p) for n, p in pairs if p.dim() > 1], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in pairs if p.dim() == 1], "weight_decay": 0.0},
        ],
        some(model),
        lr=1e-2,
    )
    train(named, other, 2)
    assert optimizer.task_vector() == other.task_vector()
    assert holder is not None


def test_buffers_that_move_in_anybodys_loop_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = SparseAdam(model, Mask.from_dense({"0.weight": torch.ones(8, 6) > 0}))
    model.eval()
    train(model, optimizer, 1)
    assert "moved_buffers" not in optimizer.task_vector().metadata
    model.train()
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="not in the task vector: 1.running_mean, 1.running_var"):
        vector = optimizer.task_vector()
    assert vector.metadata["moved_buffers"] == ["1.running_mean", "1.running_var"]


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: [{"params": list(model[0].named_parameters("0"))}],
    ],
)
def test_buffers_that_move_are_told_whatever_the_optimizer_was_given(given: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    mask = Mask.from_dense({"0.weight": torch.ones(8, 6) > 0})
    optimizer = SparseAdam(given(model), mask)
    for trained, own in ((model, optimizer), copy.deepcopy((model, optimizer))):
        train(trained, own, 1)
        with pytest.warns(UserWarning, match=r"not in the task vector: .*running_mean"):
            vector = own.task_vector()
        assert vector.metadata["moved_buffers"] == ["1.running_mean", "1.running_var"]


def both() -> list[tuple[nn.Module, Any]]:
    """A model under torch's optimizer and one under ours, which train alike."""
    models = network(), network()
    torchs = torch.optim.AdamW(models[0].parameters(), lr=1e-2, weight_decay=0.0)
    return [(models[0], torchs), (models[1], SparseAdam(models[1], full(models[1]), lr=1e-2))]


def split(optimizer: Any) -> None:
    first = optimizer.param_groups[0]
    params = first["params"]
    optimizer.param_groups.append({**first, "params": params[:1:-1], "lr": 1e-3})
    first["params"] = params[:2]


def swapped(optimizer: Any) -> None:
    split(optimizer)
    optimizer.param_groups.reverse()


@pytest.mark.parametrize("change", [split, swapped])
def test_groups_that_somebody_makes_anew_have_their_own_rates(
    change: Callable[[Any], None],
) -> None:
    results = []
    for model, optimizer in both():
        train(model, optimizer, 2)
        change(optimizer)
        train(model, optimizer, 3, seed=1)
        results.append(model)
    for wanted, found in zip(*(each.parameters() for each in results), strict=True):
        torch.testing.assert_close(found, wanted)
    groups = optimizer.state_dict()["param_groups"]
    by_param = {param: name for name, param in model.named_parameters()}
    for group, named in zip(optimizer.param_groups, groups, strict=True):
        assert named["param_names"] == [by_param[param] for param in group["params"]]


def test_groups_that_somebody_makes_anew_have_the_usual_rates_where_they_name_none() -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [{"params": [param]} for param in group["params"]]
    train(model, optimizer, 1)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


def test_an_order_changed_by_hand_is_saved_under_the_right_names() -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    optimizer.param_groups[0]["params"].reverse()
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = SparseAdam(other, full(other), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_bit_equal(optimizer.state[ours]["exp_avg"], resumed.state[theirs]["exp_avg"])


def test_groups_with_other_parameters_are_refused_before_the_step() -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    params = optimizer.param_groups[0]["params"]
    for changed in ([nn.Parameter(params[0].detach().clone()), *params[1:]], params[1:]):
        optimizer.param_groups[0]["params"] = changed
        for act in (optimizer.step, optimizer.state_dict, optimizer.task_vector):
            with pytest.raises(
                TalosRuntimeError, match=r"param_groups must hold .* lacks 0.weight"
            ):
                act()
        assert_bit_equal(model.state_dict()["2.weight"], before["2.weight"])


def test_what_others_keep_in_the_state_is_saved_loaded_and_copied() -> None:
    for model, optimizer in both():
        train(model, optimizer, 1)
        for param in model.parameters():
            optimizer.state[param]["slow"] = param.detach().clone()
        optimizer.state["rounds"] = {"count": 3}
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["state"]["rounds"] == {"count": 3}
        slow = {param: optimizer.state[param]["slow"].clone() for param in model.parameters()}
        optimizer.state.clear()
        optimizer.load_state_dict(saved)
        copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
        for each in (optimizer, copied, pickled):
            assert each.state["rounds"] == {"count": 3}
            params = each.param_groups[0]["params"]
            for param, wanted in zip(params, slow.values(), strict=True):
                assert_bit_equal(each.state[param]["slow"], wanted)
                assert each.state[param]["step"] == 2


def test_what_others_keep_follows_its_parameter_as_torchs_does() -> None:
    model = network()
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    train(model, optimizer, 1)
    for param in model.parameters():
        optimizer.state[param]["slow"] = param.detach().clone()
        optimizer.state[param]["count"] = torch.tensor(3)
    model.double()
    resumed = SparseAdam(model, full(model), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    assert {each["slow"].dtype for each in resumed.state.values()} == {torch.float64}
    assert {each["count"].dtype for each in resumed.state.values()} == {torch.int64}


def test_a_lazy_layer_that_is_not_selected_is_frozen_and_given_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy layers are new, torch says
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "later": nn.LazyLinear(3)})
    optimizer = SparseAdam(model, Mask.from_dense({"a.weight": torch.ones(4, 4) > 0}))
    assert set(optimizer.frozen) == {"a.bias", "later.weight", "later.bias"}
    model["later"](torch.randn(2, 4))
    assert not model["later"].weight.requires_grad
    optimizer.release()
    assert model["later"].weight.requires_grad


def test_weights_tied_after_the_optimizer_was_made_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    optimizer = SparseAdam(model, full(model), lr=1e-2)
    model[2].weight.data = model[0].weight.data
    before = model[0].weight.detach().clone()
    with pytest.raises(TalosValueError, match=r"one parameter, got .*\.weight and .*\.weight"):
        train(model, optimizer, 1)
    assert torch.equal(model[0].weight, before)
