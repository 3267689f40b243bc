"""Checkpoints: a training that was stopped goes on with the bits of one that was not."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import talos
from talos.errors import TalosError, TalosOSError, TalosValueError
from talos.files import checked, load_file, save_file
from talos.masks import Mask
from talos.methods import METHODS, Talos
from talos.training import FineTuneStep, fine_tune, fine_tune_steps
from talos.training.checkpoints import losses_in
from tests.cases import assert_bit_equal
from tests.training.test_loop import CLASSES, Averages, half_mask

STEPS = 4


def train(
    model: nn.Module, batches: Any, folder: Path, seed: int = 5, **options: Any
) -> tuple[list[FineTuneStep], talos.TaskVector]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    events: list[FineTuneStep] = []

    def on_step(event: FineTuneStep) -> None:
        events.append(event)
        torch.rand(()), random.random(), np.random.rand()  # as an evaluation may draw

    options = {"steps": STEPS, "every": 1, "keep": 99, "on_step": on_step, **options}
    return events, fine_tune(model, batches, checkpoint=folder, **options)


def only(folder: Path, step: int, new: Path) -> Path:
    """A folder with one checkpoint of another."""
    new.mkdir()
    name = f"step-{step:08}.safetensors"
    os.link(folder / name, new / name)
    return new


def assert_the_same(ends: list[tuple[nn.Module, list[FineTuneStep], talos.TaskVector]]) -> None:
    (whole, events, vector), (other, rest, resumed) = ends
    for key, value in whole.state_dict().items():
        assert_bit_equal(other.state_dict()[key], value)
    assert resumed == vector
    assert resumed.metadata == vector.metadata
    assert resumed.mask.metadata == vector.mask.metadata
    told = [(e.step, e.steps, e.loss, e.lr, e.grad_norm) for e in events]
    assert told[len(told) - len(rest) :] == [
        (e.step, e.steps, e.loss, e.lr, e.grad_norm) for e in rest
    ]


def resumed_everywhere(make: Any, tmp_path: Path, **options: Any) -> None:
    """Trains once, then again from each of its checkpoints; `make` gives model and data."""
    model, data = make()
    events, vector = train(model, data, tmp_path / "whole", **options)
    for step in range(1, len(events) + 1):
        other, data = make()
        folder = only(tmp_path / "whole", step, tmp_path / f"from-{step}")
        rest, again = train(other, data, folder, 17, **options, resume=True)
        assert len(rest) == len(events) - step
        assert_the_same([(model, events, vector), (other, rest, again)])
        assert len(list(folder.iterdir())) == len(events) - step + 1


class Attention(nn.Module):
    """One head over four tokens, with the names that methods look for, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.q_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 4, 8).to(self.head.weight.dtype)
        scores = self.q_proj(x) @ self.k_proj(x).mT / 8**0.5
        x = self.out_proj(scores.softmax(-1) @ self.v_proj(x))
        return self.head(F.dropout(x, 0.2, self.training).mean(1))


def attention_and_data(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    inputs = torch.randn(3, 8, 32)
    return Attention().to(dtype), list(zip(inputs, torch.arange(24).view(3, 8) % 3, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_with_the_same_bits(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, _ = attention_and_data()
    chosen = {"method": Talos(half_mask(model)) if method == "talos" else method, "lr": 1e-2}
    autocast = torch.bfloat16 if dtype == torch.float32 and method != "linearized" else None
    resumed_everywhere(
        lambda: attention_and_data(dtype), tmp_path, **chosen, steps=3, accumulate=2,
        autocast=autocast, weight_decay=0.1,
    )  # fmt: skip


class Drawn:
    """Batches in an order that is drawn each epoch, with noise that is drawn for each batch."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        for place in random.sample(range(len(self.data)), len(self.data)):
            inputs, labels = self.data[place]
            noise = torch.from_numpy(np.random.randn(*inputs.shape)).float()
            yield inputs + noise + random.gauss(0, 1) + np.random.randn() + torch.rand(()), labels


class Stateful:
    """Batches that know their place, as a loader of torchdata does, and draw an order as it does.

    The state has the place, and not the order: that of an epoch is drawn at its beginning.
    """

    def __init__(self, data: list[Any]) -> None:
        self.data, self.place = data, 0
        self.offset = torch.zeros(2)

    def __iter__(self) -> Iterator[Any]:
        return self._rest(torch.randperm(len(self.data)).tolist())

    def _rest(self, drawn: list[int]) -> Iterator[Any]:
        while self.place < len(self.data):
            self.place += 1
            yield self.data[drawn[self.place - 1]]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "in": {"parts": [self.offset, None, 2**62], "more": (True,)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, (offset, none, number) = state["place"], state["in"]["parts"]
        assert (offset.tolist(), none, number, state["in"]["more"]) == ([0, 0], None, 2**62, [True])


def loader(data: list[Any], **options: Any) -> DataLoader[Any]:
    inputs, labels = (torch.cat(each) for each in zip(*data, strict=True))
    return DataLoader(TensorDataset(inputs, labels), batch_size=10, shuffle=True, **options)


ORDERS = {
    "drawn": Drawn,
    "shuffled": loader,
    "with a generator": lambda data: loader(data, generator=torch.Generator().manual_seed(3)),
    "stateful": Stateful,
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_data_go_on_in_their_order(order: str, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        model, data = attention_and_data()
        return model, ORDERS[order](data)

    resumed_everywhere(make, tmp_path, steps=5, method="nonlinear")


@pytest.mark.slow
def test_the_data_of_workers_go_on_in_their_order(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        model, data = attention_and_data()
        return model, loader(data, num_workers=1)

    resumed_everywhere(make, tmp_path, steps=4, method="nonlinear")


def test_weights_in_another_order_of_memory_go_on(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        model, data = attention_and_data()
        model.head.weight = nn.Parameter(model.head.weight.detach().t().contiguous().t())
        return model, data

    resumed_everywhere(make, tmp_path, method="nonlinear", steps=3)


def test_a_buffer_that_moves_goes_on(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        _, data = attention_and_data()
        layers = nn.Linear(32, 4), Averages(persistent=False), nn.Linear(4, CLASSES)
        return nn.Sequential(*layers, nn.BatchNorm1d(CLASSES)), data

    for method in ("nonlinear", "lota"):
        (tmp_path / method).mkdir()
        resumed_everywhere(make, tmp_path / method, steps=3, method=method)


def test_the_newest_are_kept_and_the_last_step_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    events, vector = train(*attention_and_data(), folder, steps=7, every=2, keep=2)
    assert [path.name for path in sorted(folder.iterdir())] == [
        "step-00000006.safetensors", "step-00000007.safetensors"
    ]  # fmt: skip
    assert losses_in(folder) == [event.loss for event in events]
    model, data = attention_and_data()
    rest, again = train(model, data, folder, steps=7, every=2, keep=2, resume=True)
    assert rest == []  # a run that was over is over
    assert again == vector
    assert losses_in(tmp_path) == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole, data = attention_and_data()
    events, vector = train(whole, data, folder, keep=3)
    for step, damage in ((4, slice(0, 900)), (3, slice(0, -1))):
        path = folder / f"step-{step:08}.safetensors"
        path.write_bytes(path.read_bytes()[damage])
    other, data = attention_and_data()
    with pytest.warns(UserWarning, match=r"was passed over: .*step-0000000[34].*fetch it again"):
        rest, again = train(other, data, folder, 17, keep=1, resume=True)
    assert_the_same([(whole, events, vector), (other, rest, again)])
    assert [path.name for path in folder.iterdir()] == ["step-00000004.safetensors"]
    (folder / "step-00000004.safetensors").write_bytes(b"")
    with (
        pytest.raises(
            TalosValueError, match="resume must find an intact checkpoint, got 1 damaged"
        ),
        pytest.warns(UserWarning, match="passed over"),
    ):
        train(*attention_and_data(), folder, resume=True)


def test_later_ones_that_are_damaged_do_not_count_among_the_newest(tmp_path: Path) -> None:
    train(*attention_and_data(), tmp_path / "whole")
    folder = only(tmp_path / "whole", 2, tmp_path / "run")
    (folder / "step-00000004.safetensors").write_bytes(b"damaged")
    model, data = attention_and_data()
    with pytest.warns(UserWarning, match="passed over"):
        events = fine_tune_steps(
            model, data, steps=STEPS, checkpoint=folder, every=1, keep=1, resume=True
        )
    next(events)
    next(events)  # asks for the next step, so the one before is saved
    assert [path.name for path in folder.iterdir()] == ["step-00000003.safetensors"]
    events.close()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 5}, r"resume must go on with the settings of .*step-00000004.safetensors, got "
                       r"steps=5 \(there 4\); pass those, or begin anew in another folder"),
        ({"lr": 0.1, "eps": 0.5}, r"got lr=0.1 \(there 0.001\), eps=0.5 \(there 1e-08\);"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"betas": (0.8, 0.9)}, "betas"),
        ({"max_grad_norm": None}, r"max_grad_norm=None \(there 1\)"),
        ({"accumulate": 2}, "accumulate"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"autocast": torch.bfloat16}, r"autocast=torch.bfloat16 \(there None\)"),
        ({"warmup": 3}, "warmup"),
        ({"method": "l_lora"}, r"method=l_lora \(there nonlinear\), rank=16 \(there none\)"),
        ({"data": {"seed": 2}}, r"data.seed=2 \(there 1\)"),
        ({"data": None}, r"data.lr=none \(there other\), data.seed=none \(there 1\)"),
        ({"data": {"seed": 1, "lr": 2.0}}, r"got data.lr=2 \(there other\)"),
        ({"batches": Stateful([])}, r"batches.state_dict=True \(there False\)"),
        ({"batches": DataLoader([1], num_workers=1, persistent_workers=True)},
         "batches must be a loader with persistent_workers=False for a checkpoint"),
        ({"resume": False}, r"must be a folder without checkpoints, .* step 4; pass resume=True"),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"keep": 0}, "keep must be an integer of at least 1, got 0"),
        ({"checkpoint": None}, "resume must be False without checkpoint"),
        ({"checkpoint": 3}, "checkpoint must be the path of a folder, got int"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused(
    options: dict[str, Any], match: str, finished: Path
) -> None:
    model, data = attention_and_data()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    given = {"steps": STEPS, "method": "nonlinear", "data": DATA, "resume": True, "batches": data}
    with pytest.raises(TalosError, match=match):
        fine_tune_steps(model, **{**given, "checkpoint": finished, **options})
    for name, value in model.state_dict().items():
        assert_bit_equal(value, before[name])


DATA = {"seed": 1, "lr": "other"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that is over."""
    folder = tmp_path_factory.mktemp("training") / "run"
    train(*attention_and_data(), folder, method="nonlinear", data=DATA)
    return folder


def test_equal_settings_are_the_same_however_they_are_written(finished: Path) -> None:
    equal = {"betas": [0.9, 0.999], "max_grad_norm": 1, "weight_decay": 0}
    equal |= {"data": {"lr": "other", "seed": 1.0}, "method": "nonlinear"}
    assert train(*attention_and_data(), finished, **equal, resume=True)[0] == []


def test_another_mask_and_other_initial_weights_are_refused(tmp_path: Path) -> None:
    model, data = attention_and_data()
    mask = half_mask(model)
    train(model, data, tmp_path / "run", mask=mask)
    model, data = attention_and_data()
    dense = {name: mask.to_dense(name) for name in mask.names}
    dense["q_proj.bias"] = ~dense["q_proj.bias"]
    with pytest.raises(TalosValueError, match=r"got mask=\w{16} \(there \w{16}\);"):
        train(model, data, tmp_path / "run", mask=Mask.from_dense(dense), resume=True)
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(TalosValueError, match=r"model must have the weights .* in head.bias; load"):
        train(model, data, tmp_path / "run", mask=mask, resume=True)
    model, data = attention_and_data(torch.bfloat16)
    with pytest.raises(TalosValueError, match="load the base again"):
        train(model, data, tmp_path / "run", mask=mask, resume=True)


def test_other_buffers_are_refused(tmp_path: Path) -> None:
    for shift in (0.0, 1.0):
        model, data = attention_and_data()
        model.register_buffer("shift", torch.full((2,), shift))
        if shift == 0:
            train(model, data, tmp_path / "run")
            continue
        with pytest.raises(TalosValueError, match=r"weights and buffers with .* others in shift;"):
            train(model, data, tmp_path / "run", resume=True)


def test_a_loader_that_does_not_take_its_state_is_told(tmp_path: Path) -> None:
    model, data = attention_and_data()
    train(model, Stateful(data), tmp_path / "run", steps=2)
    folder = only(tmp_path / "run", 1, tmp_path / "one")
    model, data = attention_and_data()
    batches = Stateful(data)
    batches.load_state_dict = lambda state: state["rows"]  # of another version, say
    with pytest.raises(
        TalosValueError, match=r"batches.load_state_dict\(\) .* KeyError\('rows'\);"
    ):
        train(model, batches, folder, steps=2, resume=True)


def test_without_every_a_short_training_has_checkpoints(tmp_path: Path) -> None:
    train(*attention_and_data(), tmp_path / "run", steps=20, every=None)
    assert len(list((tmp_path / "run").iterdir())) == 10


def test_a_folder_that_goes_away_is_told(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for change, match in (
        (place.rmdir, "must be a folder that can be written, got .*run .No such file"),
        (lambda: (place / "run").write_text(""), "must be a folder that can be written.*exists"),
    ):
        place.mkdir()
        events = fine_tune_steps(*attention_and_data(), steps=2, every=1, checkpoint=place / "run")
        next(events)
        change()
        with pytest.raises(TalosOSError, match=match):
            next(events)


def test_an_intact_file_of_another_version_or_kind_stops_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(*attention_and_data(), folder, keep=2)
    path = folder / "step-00000004.safetensors"
    for version, match in ((99, "version must be at most 2, got 99; upgrade"), (1, "make it")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checked, "VERSION", version)
            save_file(path, "checkpoint", {}, {})
        before = path.read_bytes()
        with pytest.raises(TalosValueError, match=f"step-00000004.safetensors: .*{match}"):
            train(*attention_and_data(), folder, resume=True)
        assert path.read_bytes() == before
    Mask.from_dense({"w": torch.ones(2) > 0}).save(path)
    with pytest.raises(TalosValueError, match=r"must hold a checkpoint, got a mask; load it with"):
        train(*attention_and_data(), folder, resume=True)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, match in (
        (tmp_path / "file", "checkpoint must be a folder, got the file"),
        (tmp_path / "no" / "run", "checkpoint must lie in an existing folder, .*; make"),
        (tmp_path / "file" / "run", "checkpoint must lie in an existing folder"),
    ):
        with pytest.raises(TalosOSError, match=match):
            fine_tune_steps(*attention_and_data(), steps=2, checkpoint=folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000009.safetensors").write_text("{}")  # of somebody else
    with (
        pytest.raises(TalosValueError, match="damaged"),
        pytest.warns(UserWarning, match="passed over"),
    ):
        train(*attention_and_data(), tmp_path / "run", resume=True)


def test_state_that_is_not_finite_is_kept_as_it_is(tmp_path: Path) -> None:
    """A second moment overflows long before the weights do."""

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return nn.Linear(4, CLASSES), [(1e30 * torch.randn(8, 4), torch.arange(8) % 3)]

    resumed_everywhere(make, tmp_path, steps=3, max_grad_norm=None, lr=1e-30)
    tensors, _ = load_file(
        tmp_path / "whole" / "step-00000003.safetensors", "checkpoint", finite=False
    )
    assert torch.isinf(tensors["phase/state/weight/exp_avg_sq"]).any()


def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(*attention_and_data(), folder, keep=1)
    path = folder / "step-00000004.safetensors"
    tensors, content = load_file(path, "checkpoint", finite=False)
    weight, state = "phase/weights/q_proj.weight", "phase/state/q_proj.weight/"
    own = r"state must hold step as one number and exp_avg, exp_avg_sq of q_proj.weight as .*, got "
    for other, text in (
        (({}, content), "not a valid checkpoint"),
        ((tensors, content | {"step": 3}), "not a valid checkpoint"),
        ((tensors, content | {"settings": None}), "not a valid checkpoint"),
        (({**tensors, weight: torch.zeros(2)}, content), "q_proj.weight as torch.float32 .8, 8"),
        (({k: v for k, v in tensors.items() if k != weight}, content), r"\[8, 8\], got none"),
        (({**tensors, "phase/state/other/step": torch.zeros(())}, content), "got other"),
        (({**tensors, f"{state}exp_avg": torch.zeros(2)}, content), own + ".*float32 .2."),
        (({**tensors, f"{state}exp_avg": torch.zeros(8, 8).double()}, content), own + ".*float64"),
        (({**tensors, f"{state}step": torch.zeros(3)}, content), own + ".*'step': '.* .3."),
        (({**tensors, f"{state}more": torch.zeros(8, 8)}, content), own + ".*'more'"),
        (({k: v for k, v in tensors.items() if k != f"{state}exp_avg"}, content), own),
        (({k: v for k, v in tensors.items() if "state" not in k}, content), "moments .* got none"),
        (
            ({**tensors, "buffers/0/x": torch.zeros(2)}, content),
            r"not a valid checkpoint, got KeyE",
        ),
        (
            ({**tensors, "losses": torch.zeros(2)}, content),
            "not a valid checkpoint, got .*2 losses",
        ),
    ):
        save_file(path, "checkpoint", *other, finite=False)
        model, data = attention_and_data()
        before = {name: each.clone() for name, each in model.state_dict().items()}
        with pytest.raises(TalosValueError, match=text):
            train(model, data, folder, resume=True)
        for name, value in model.state_dict().items():
            assert_bit_equal(value, before[name])
