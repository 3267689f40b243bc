"""The Triton launchers against the references: on a GPU, or in Triton's interpreter."""

import contextlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch import Tensor

from talos_kernels import Index, TensorIndex
from talos_kernels.add_delta import add_delta_reference
from talos_kernels.gather_grad import gather_grad_reference, scatter_reference
from talos_kernels.sparse_adam import sparse_adam_reference
from talos_kernels.triton import add_delta, gather_grad, launch, sparse_adam
from tests.cases import CASES, MANY, SEGMENT_SIZE, Case, assert_bit_equal, assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter takes some 50 ms a block: of many blocks, one bitmap is enough.
SMALL = tuple(
    case
    for case in CASES
    if max(case.sizes) <= SEGMENT_SIZE + 1 and case.name not in {"n65537-d0.1", "n65537-d1"}
)
ENCODINGS = MANY[0]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
cases = pytest.mark.parametrize("case", SMALL, ids=str)


def pack(case: Case) -> Index:
    return Index.pack([TensorIndex.encode(mask) for mask in case.masks()])


def buffers(index: Index) -> list[Tensor]:
    return index.to(DEVICE).buffers


def poisoned(tensors: Sequence[Tensor], case: Case) -> list[Tensor]:
    """The tensors with NaN wherever nothing is selected."""
    return [
        tensor.masked_fill(~mask, torch.nan)
        for tensor, mask in zip(tensors, case.masks(), strict=True)
    ]


def assert_unselected_keep_bits(
    after: Sequence[Tensor], before: Sequence[Tensor], case: Case
) -> None:
    for new, old, mask in zip(after, before, case.masks(), strict=True):
        assert_bit_equal(new.cpu()[~mask], old[~mask])


@dataclass
class Step:
    """The arguments of one optimizer step; `run` steps a copy of them and returns it."""

    params: list[Tensor]
    grads: list[Tensor]
    index: Index
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    steps: Tensor
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip_factor: Tensor | None = None
    seed: int = 0

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype = FP32, master: bool = False, **options) -> "Step":
        index, params = pack(case), case.tensors(dtype)
        selected = [param[mask] for param, mask in zip(params, case.masks(), strict=True)]
        return cls(
            params,
            poisoned(case.tensors(dtype, seed=2), case),
            index,
            torch.randn(index.nnz),
            torch.rand(index.nnz),
            torch.cat(selected).float() if master else None,
            torch.tensor([0.0, 1.0, 4999.0, 6.0, 2.0])[: len(params)],
            **options,
        )

    def written(self) -> list[Tensor]:
        state = [self.exp_avg, self.exp_avg_sq, self.steps, self.master]
        return [*self.params, *(tensor for tensor in state if tensor is not None)]

    def run(self, device: torch.device | None) -> "Step":
        """With the kernel on `device`, with the reference on the CPU where that is None."""

        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device or "cpu", copy=True)

        step = replace(
            self,
            params=[copied(param) for param in self.params],
            exp_avg=copied(self.exp_avg),
            exp_avg_sq=copied(self.exp_avg_sq),
            master=copied(self.master),
            steps=copied(self.steps),
        )
        op = sparse_adam_reference if device is None else sparse_adam.sparse_adam_
        op(
            step.params, [copied(grad) for grad in self.grads],
            self.index.to(device or "cpu").buffers, step.exp_avg, step.exp_avg_sq, step.master,
            step.steps,
            copied(torch.tensor(self.lr, dtype=torch.float64)), *self.betas, 1e-8,
            self.weight_decay, self.maximize, copied(self.grad_scale), copied(self.found_inf),
            copied(self.clip_factor), self.seed,
        )  # fmt: skip
        return step

    def check(self) -> "Step":
        """One step by the kernel, compared with the reference's."""
        actual, expected = self.run(DEVICE), self.run(None)
        for ours, reference in zip(actual.written(), expected.written(), strict=True):
            assert_close(ours.cpu(), reference)
        return actual


@cases
def test_step_is_the_references(case: Case) -> None:
    step = Step.of(case)
    assert_unselected_keep_bits(step.check().params, step.params, case)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("master", [False, True], ids=["no-master", "master"])
def test_step_of_16_bit_weights(dtype: torch.dtype, master: bool) -> None:
    step = Step.of(ENCODINGS, dtype, master)
    for _ in range(3):  # from the second step on, masters are no longer what is stored
        after = step.check()
        assert_unselected_keep_bits(after.params, step.params, ENCODINGS)
        step = replace(step, params=[p.cpu() for p in after.params], steps=after.steps.cpu())
        if master:
            step = replace(step, master=after.master.cpu())


def test_master_restarts_where_somebody_else_wrote() -> None:
    step = Step.of(ENCODINGS, BF16, master=True, lr=1e-6, weight_decay=0.0)
    step.master += 1e-5 * torch.randn(step.index.nnz)
    step.params[0][::2] = 3.0
    assert torch.equal(step.check().params[0][::2].cpu(), step.params[0][::2])


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.5)},
        {"betas": (0.5, 0.0)},
        {"betas": (0.3, 0.99999)},
        {"grad_scale": torch.tensor(65536.0)},
        {"grad_scale": torch.tensor([3.0]), "maximize": True, "found_inf": torch.zeros(1)},
        {"lr": 0.0},
        {"clip_factor": torch.tensor(0.3), "grad_scale": torch.tensor(3.0)},
    ],
    ids=str,
)
def test_step_options(options: dict[str, object]) -> None:
    Step.of(ENCODINGS, **options).check()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_step_takes_compact_gradients_beside_dense_ones(dtype: torch.dtype) -> None:
    dense = Step.of(ENCODINGS, dtype)
    masks = ENCODINGS.masks()
    mixed = [
        grad[mask] if i % 2 else grad
        for i, (grad, mask) in enumerate(zip(dense.grads, masks, strict=True))
    ]
    compact = [grad[mask] for grad, mask in zip(dense.grads, masks, strict=True)]
    expected = dense.run(DEVICE).written()
    for grads in (mixed, compact):
        actual = replace(dense, grads=grads).run(DEVICE).written()
        for ours, theirs in zip(actual, expected, strict=True):
            assert_bit_equal(ours, theirs)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
def test_bf16_moments_have_the_bits_of_the_reference(seed: int) -> None:
    step = Step.of(ENCODINGS, BF16, master=True, seed=seed)
    moments = {name: getattr(step, name).bfloat16() for name in ("exp_avg", "exp_avg_sq")}
    step = replace(step, **moments)
    actual, expected = step.run(DEVICE), step.run(None)
    for name in moments:
        assert_close(getattr(actual, name).cpu(), getattr(expected, name), dtype=BF16)
    for ours, reference in zip(actual.params, expected.params, strict=True):
        assert_close(ours.cpu(), reference)


def test_step_of_16_bit_weights_with_float32_gradients() -> None:
    step = Step.of(ENCODINGS, BF16, master=True)
    replace(step, grads=[grad.float() * 1.001 for grad in step.grads]).check()


def test_found_inf_changes_nothing() -> None:
    step = Step.of(ENCODINGS, BF16, master=True, found_inf=torch.ones(1))
    for after, before in zip(step.run(DEVICE).written(), step.written(), strict=True):
        assert_bit_equal(after.cpu(), before)


def test_tensor_without_gradient_keeps_its_state() -> None:
    step = Step.of(ENCODINGS)
    step.grads[1] = torch.zeros(0)
    after, entries = step.check(), step.index.slices[1]
    assert_bit_equal(after.params[1].cpu(), step.params[1])
    assert_bit_equal(after.exp_avg[entries].cpu(), step.exp_avg[entries])
    assert not torch.equal(after.params[2].cpu(), step.params[2])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_dtype_of_a_missing_gradient_says_nothing(dtype: torch.dtype) -> None:
    step = Step.of(ENCODINGS, dtype)
    missing = torch.empty(0, dtype=BF16 if dtype == FP32 else FP32)
    replace(step, grads=[missing, *step.grads[1:]]).check()


@pytest.mark.parametrize(
    ("case", "accumulate"), [*((case, False) for case in SMALL), (ENCODINGS, True)], ids=str
)
def test_gather_is_the_references(case: Case, accumulate: bool) -> None:
    index, grads = pack(case), poisoned(case.tensors(BF16, seed=2), case)
    before = torch.randn(index.nnz) if accumulate else torch.empty(index.nnz)
    expected, out = before.clone(), before.to(DEVICE, copy=True)
    gather_grad_reference(expected, grads, index.buffers, accumulate)
    on_device = [grad.to(DEVICE) for grad in grads]
    gather_grad.gather_grad_(out, on_device, buffers(index), accumulate)
    assert_bit_equal(out.cpu(), expected)


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_missing_gradient_counts_as_zero(accumulate: bool) -> None:
    index, grads = pack(ENCODINGS), ENCODINGS.tensors()
    grads[0] = torch.zeros(0, dtype=BF16)  # whose dtype says nothing
    grads[2] = torch.zeros(0)
    expected = torch.randn(index.nnz)
    out = expected.to(DEVICE, copy=True)
    gather_grad_reference(expected, grads, index.buffers, accumulate)
    on_device = [grad.to(DEVICE) for grad in grads]
    gather_grad.gather_grad_(out, on_device, buffers(index), accumulate)
    assert_bit_equal(out.cpu(), expected)


@cases
def test_scatter_is_the_references(case: Case) -> None:
    index, params = pack(case), case.tensors(BF16)
    values = torch.randn(index.nnz)
    ours = [param.to(DEVICE, copy=True) for param in params]
    gather_grad.scatter_(ours, buffers(index), values.to(DEVICE))
    assert_unselected_keep_bits(ours, params, case)
    scatter_reference(params, index.buffers, values)
    for actual, expected in zip(ours, params, strict=True):
        assert_bit_equal(actual.cpu(), expected)


@cases
def test_add_delta_is_the_references_and_reverts_exactly(case: Case) -> None:
    index, params = pack(case), case.tensors()
    values = torch.randn(index.nnz).half().to(DEVICE)
    saved, expected_saved = (torch.empty(index.nnz) for _ in range(2))
    saved = saved.to(DEVICE)
    ours, expected = [p.to(DEVICE, copy=True) for p in params], [p.clone() for p in params]
    add_delta.add_delta_(ours, buffers(index), values, 0.3, saved)
    add_delta_reference(expected, index.buffers, values.cpu(), 0.3, expected_saved)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_bit_equal(actual.cpu(), wanted)
    assert_bit_equal(saved.cpu(), expected_saved)
    gather_grad.scatter_(ours, buffers(index), saved)
    for actual, param in zip(ours, params, strict=True):
        assert_bit_equal(actual.cpu(), param)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_add_delta_to_16_bit_weights(dtype: torch.dtype) -> None:
    index, params = pack(ENCODINGS), ENCODINGS.tensors(dtype)
    values = torch.randn(index.nnz)
    ours = [param.to(DEVICE, copy=True) for param in params]
    add_delta.add_delta_(ours, buffers(index), values.to(DEVICE), -0.7, None)
    add_delta_reference(params, index.buffers, values, -0.7, None)
    for actual, expected in zip(ours, params, strict=True):
        assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("encoding", ["bitmap", "u16"])
def test_offsets_past_32_bits(encoding: str) -> None:
    """Block number 2^30 of a tensor that begins far below the one that is there."""
    density = 0.5 if encoding == "bitmap" else 0.01
    case = Case("far", (2048,), (density,))
    index, params = pack(case), case.tensors()
    words, positions, starts, table, programs = index.buffers
    (numel, code, rank, data, start) = table[0].tolist()
    block, size, step = 2**30, 2048 if encoding == "bitmap" else 65536, 64
    data -= block * step if encoding == "bitmap" else 0
    table = torch.tensor([[block * size + numel, code, rank, data, start - block]])
    programs = torch.tensor([[0, block]], dtype=torch.int32)
    near = params[0].to(DEVICE, copy=True)
    address = torch.tensor([near.data_ptr() - block * size * near.element_size()])
    on_device = (t.to(DEVICE) for t in (words, positions, starts, table, programs, address))
    values = torch.randn(index.nnz)
    gather_grad.scatter_kernel[(1,)](*on_device, values.to(DEVICE), PARAM_DTYPE=tl.float32)
    scatter_reference(params, index.buffers, values)
    assert_bit_equal(near.cpu(), params[0])


def test_captured_addresses_are_exact() -> None:
    addresses = [2**53 + 1, 0, 2**62 + 3, 2**47 - 1]
    assert launch.captured_table(addresses, DEVICE).tolist() == addresses


@pytest.mark.parametrize("trees", [False, True], ids=["usual", "graph trees"])
def test_no_table_is_kept_in_the_pool_of_inductors_graph_trees(
    trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lend it to the thread that warms up; this says which thread allocates."""
    allocate, threads = torch.empty, []

    def empty(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        threads.append(threading.current_thread())
        return allocate(*sizes, dtype=dtype)

    stream = SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_tables", {})
    name = "torch._inductor.cudagraph_trees"
    if trees:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    else:
        monkeypatch.delitem(sys.modules, name, raising=False)
    table = launch.integer_table((5, 6), torch.device("cuda", 0))
    assert table.tolist() == [5, 6]
    assert launch.integer_table((5, 6), torch.device("cuda", 0)) is table
    (thread,) = threads
    assert (thread is threading.current_thread()) is not trees


def test_address_table() -> None:
    present, absent = torch.zeros(3, device=DEVICE), torch.zeros(0, device=DEVICE)
    table = launch.address_table([present, absent], [absent, present])
    assert table.tolist() == [[present.data_ptr(), 0], [0, present.data_ptr()]]


@pytest.mark.gpu
def test_captured_graph_reads_its_own_table() -> None:
    index, params = pack(ENCODINGS), [p.to(DEVICE) for p in ENCODINGS.tensors()]
    values, on_device = torch.randn(index.nnz, device=DEVICE), buffers(index)
    gather_grad.scatter_(params, on_device, values)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_grad.scatter_(params, on_device, values)
    launch._tables.clear()
    values.normal_()
    graph.replay()
    expected = ENCODINGS.tensors()
    scatter_reference(expected, index.buffers, values.cpu())
    for actual, wanted in zip(params, expected, strict=True):
        assert_bit_equal(actual.cpu(), wanted)
