"""Parts of sharded tensors, and errors that all ranks raise."""

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from talos.distributed import (
    errors_on_all_ranks,
    is_sharded,
    local,
    part_of,
    rank,
    several_processes,
    whole,
    world_size,
)
from talos.errors import TalosRuntimeError, TalosValueError
from tests.distributed.processes import in_processes

PLACEMENTS = [
    (Shard(0),),
    (Shard(1),),
    (Replicate(),),
    (Replicate(), Shard(0)),
    (Shard(0), Shard(1)),
]


def parts(rows: int) -> list[Tensor]:
    """Take a tensor apart by every placement, and put it together again."""
    dense = torch.arange(rows * 3.0).view(rows, 3)
    held = []
    for placements in PLACEMENTS:
        sizes = (2, world_size() // 2) if len(placements) > 1 else (world_size(),)
        mesh = init_device_mesh("cpu", sizes)
        like = distribute_tensor(torch.zeros(rows, 3), mesh, placements)
        assert isinstance(like, DTensor)
        assert is_sharded(like)
        mask = part_of(dense % 2 == 0, like)
        part = part_of(dense, like)
        assert part.shape == local(like).shape == mask.shape
        assert torch.equal(whole(part.double(), like), dense.double())
        held.append(part.clone())
    return held


@pytest.mark.parametrize("rows", [5, 3])
def test_parts_of_all_ranks_are_the_whole(rows: int) -> None:
    found = in_processes(4, parts, rows)
    dense = torch.arange(rows * 3.0).view(rows, 3)
    assert torch.equal(torch.cat([each[0] for each in found]), dense)
    assert torch.equal(torch.cat([each[1] for each in found], 1), dense)
    assert all(torch.equal(each[2], dense) for each in found)
    assert len(found[3][0]) < len(found[0][0])  # uneven, of 3 rows empty


def test_without_processes_a_tensor_is_its_own_part() -> None:
    dense = torch.ones(2, 2)
    assert part_of(dense, torch.zeros(2, 2)) is whole(dense, torch.zeros(2, 2)) is dense
    assert local(dense) is dense
    assert (world_size(), rank(), several_processes(), is_sharded(dense)) == (1, 0, False, False)


def fail_on(failing: int) -> str:
    try:
        with errors_on_all_ranks():
            if rank() == failing:
                raise TalosValueError("lr must be positive, got -1")
    except (TalosRuntimeError, TalosValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    other = "TalosRuntimeError: rank 1 raised TalosValueError: lr must be positive, got -1"
    assert in_processes(3, fail_on, 1) == [
        other,
        "TalosValueError: lr must be positive, got -1",
        other,
    ]
    assert in_processes(2, fail_on, 9) == ["none", "none"]


def fail_outside(failing: int) -> str:
    try:
        with errors_on_all_ranks():
            if rank() == failing:
                raise TalosValueError("out must be a file, got none")
            with errors_on_all_ranks() as numbers:
                numbers.append(rank())
            return str(numbers)
    except (TalosRuntimeError, TalosValueError) as error:
        try:
            with errors_on_all_ranks():  # as a command does that words an error anew
                raise TalosRuntimeError(f"again: {error}") from error
        except TalosRuntimeError as raised:
            return str(raised)


def test_an_error_in_an_outer_block_reaches_ranks_in_an_inner_one() -> None:
    other = "again: rank 0 raised TalosValueError: out must be a file, got none"
    assert in_processes(3, fail_outside, 0)[1:] == [other, other]
    assert in_processes(2, fail_outside, 9) == ["[0, 1]", "[0, 1]"]


BROKEN = TalosValueError("the data must be whole, got a half")


def fail_twice() -> list[str]:
    said = []
    for _ in range(2):
        try:
            with errors_on_all_ranks(), errors_on_all_ranks():
                if rank() == 1:
                    raise BROKEN
        except (TalosRuntimeError, TalosValueError) as error:
            said.append(str(error))
    return said


def test_one_error_may_be_raised_again() -> None:
    text = "the data must be whole, got a half"
    remote = f"rank 1 raised TalosValueError: {text}"
    assert in_processes(2, fail_twice) == [[remote] * 2, [text] * 2]
