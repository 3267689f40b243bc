"""Modules whose parameters share memory in any way: refused, or served as dense ones are."""

import hashlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from talos import Mask, ResidentVectors, SparseAdam, TaskVector
from talos.errors import TalosError
from talos.names import named_parameters

KINDS = (
    *("own", "tied", "aliased", "overlapping", "expanded", "transposed", "channels last"),
    *("strided", "empty", "scalar"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Odd(nn.Module):
    """Parameters of every kind, each after a first one that others may share memory with."""

    def __init__(self, kinds: list[str], dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        flat = torch.randn(64, generator=draw, dtype=torch.float64).to(dtype)
        self.first = nn.Parameter(flat[:24].view(4, 6))
        for number, kind in enumerate(kinds):
            fresh = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64).to(dtype)
            param = {
                "own": lambda x=fresh: nn.Parameter(x),
                "tied": lambda: self.first,
                "aliased": lambda: nn.Parameter(self.first.data),
                "overlapping": lambda: nn.Parameter(flat[20:36].view(4, 4)),
                "expanded": lambda x=fresh: nn.Parameter(x[0, 0, 0].expand(3, 4)),
                "transposed": lambda x=fresh: nn.Parameter(x.view(8, 12).t()),
                "channels last": lambda x=fresh: nn.Parameter(
                    x.to(memory_format=torch.channels_last)
                ),
                "strided": lambda x=fresh: nn.Parameter(x.view(8, 12)[::2, 1::3]),
                "empty": lambda x=fresh: nn.Parameter(x[:0]),
                "scalar": lambda x=fresh: nn.Parameter(x[0, 0, 0, 0].clone()),
            }[kind]()
            self.register_parameter(f"p{number}", param)

    def objects(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named_parameters(remove_duplicate=False)


odd_modules = st.builds(Odd, st.lists(st.sampled_from(KINDS), max_size=4), st.sampled_from(DTYPES))


def storages(model: nn.Module) -> dict[int, str]:
    """The sha256 of every byte behind the parameters."""
    found = {}
    for param in model.parameters():
        storage = param.untyped_storage()
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        found[storage.data_ptr()] = hashlib.sha256(content.numpy().tobytes()).hexdigest()
    return found


def drawn_mask(model: nn.Module, seed: int) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    return Mask.from_dense(
        {
            name: torch.rand(p.shape, generator=draw) < 0.5
            for name, p in named_parameters(model).items()
        }
    )


def dense_sum(param: Tensor, mask: Tensor, values: Tensor, scale: float) -> Tensor:
    """The reference: one dense tensor, edited where the mask is."""
    wide = torch.promote_types(param.dtype, torch.float32)
    edited = param.detach().clone()
    change = scale * values.to(wide)
    edited[mask] = (edited[mask].to(wide) + change).to(param.dtype)
    return edited


def parts(vector: TaskVector) -> dict[str, Tensor]:
    sizes = [vector.mask.indices[name].nnz for name in vector.mask.names]
    return dict(zip(vector.mask.names, vector.values.split(sizes), strict=True))


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@given(odd_modules, st.integers(0, 9))
@relaxed
def test_edits_are_those_of_dense_tensors_or_refused(model: Odd, seed: int) -> None:
    mask = drawn_mask(model, seed)
    draw = torch.Generator().manual_seed(seed)
    vector = TaskVector(mask, torch.randn(mask.nnz, generator=draw))
    before = storages(model)
    wanted = {
        name: dense_sum(param, mask.to_dense(name), parts(vector)[name], 0.5)
        for name, param in named_parameters(model).items()
    }
    try:
        with vector.applied(model, 0.5):
            for name, param in named_parameters(model).items():
                assert torch.equal(param, wanted[name]), name
    except TalosError:
        assert storages(model) == before
        with pytest.raises(TalosError):
            vector.apply_(model, 0.5)
        with pytest.raises(TalosError):
            ResidentVectors(model, {"a": vector})
        assert storages(model) == before
        return
    assert storages(model) == before
    with ResidentVectors(model, {"a": vector, "b": -vector}) as resident:
        for name in ("b", "a"):
            resident.swap(name, 0.5)
        for name, param in named_parameters(model).items():
            assert torch.equal(param, wanted[name]), name
    assert storages(model) == before
    vector.apply_(model, 0.5)
    for name, param in named_parameters(model).items():
        assert torch.equal(param, wanted[name]), name


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    for step in range(count):
        for number, param in enumerate(dict.fromkeys(model.parameters())):
            draw = torch.Generator().manual_seed(100 * seed + 10 * step + number)
            grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
            param.grad = grad.to(param.dtype) if param.requires_grad else None
        optimizer.step()


@given(odd_modules, st.integers(0, 9))
@relaxed
def test_training_is_that_of_dense_tensors_or_refused(model: Odd, seed: int) -> None:
    """Against torch's AdamW on clones of the selected entries; stopped and resumed in between."""
    mask = drawn_mask(model, seed)
    before = storages(model)
    try:
        optimizer = SparseAdam(model, mask, lr=0.1)
    except TalosError:
        assert storages(model) == before
        return
    initial = {name: param.detach().clone() for name, param in named_parameters(model).items()}
    wide = {
        name: nn.Parameter(param[mask.to_dense(name)].double()) for name, param in initial.items()
    }
    oracle = torch.optim.AdamW(wide.values(), lr=0.1, weight_decay=0.0)
    steps(model, optimizer, 2, seed)
    optimizer.release()
    resumed = SparseAdam(model, mask, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    steps(model, resumed, 2, seed + 1)
    objects = list(dict.fromkeys(model.parameters()))
    names = {id(param): name for name, param in named_parameters(model).items()}
    for start, count in ((seed, 2), (seed + 1, 2)):
        for step in range(count):
            for number, param in enumerate(objects):
                draw = torch.Generator().manual_seed(100 * start + 10 * step + number)
                grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
                name = names[id(param)]
                wide[name].grad = grad.to(param.dtype)[mask.to_dense(name)].double()
            oracle.step()
    for name, param in named_parameters(model).items():
        selected = mask.to_dense(name)
        assert torch.equal(param[~selected], initial[name][~selected]), name
        size = float(param.detach().abs().max()) if param.numel() else 0.0
        rounding = 4 * torch.finfo(param.dtype).eps * max(size, 1.0) + 1e-5
        difference = (param[selected].double() - wide[name]).abs()
        assert bool((difference <= rounding).all()), (name, float(difference.max()))
    vector = resumed.task_vector()
    for name, param in named_parameters(model).items():
        with torch.no_grad():
            param.copy_(initial[name])
    vector.apply_(model)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
