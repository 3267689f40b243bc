"""A weight gradient at its selected entries: every backend against autograd in float64."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talos_kernels import Index, TalosTypeError, TalosValueError, TensorIndex, gather_grad_, sddmm_
from talos_kernels.sddmm import sddmm_reference
from tests.cases import DENSITIES, DTYPES, REDUCTION_TOLERANCES, assert_bit_equal, dense_mask

# Tokens, rows, columns: odd ones, one tile, several, rows that begin inside words and blocks.
SHAPES = ((5, 7, 11), (33, 70, 200), (64, 128, 64), (1, 1, 1), (3, 100, 257))
Operands = tuple[Tensor, Tensor, Tensor, Index]
Op = Callable[[Tensor, Tensor, Tensor, list[Tensor], bool], None]


def operands(
    shape: tuple[int, int, int], density: float, dtype: torch.dtype, seed: int = 0
) -> Operands:
    """dY, X, the mask and its index."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rows, cols = shape
    dy, x = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (rows, cols))
    mask = dense_mask(rows * cols, density, generator).view(rows, cols)
    return dy, x, mask, Index.pack([TensorIndex.encode(mask)])


def by_autograd(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """The weight gradient of a linear layer in float64, its selected entries."""
    weight = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.linear(x.double(), weight)
    (gradient,) = torch.autograd.grad(y, weight, dy.double())
    return gradient[mask]


def triton(out: Tensor, dy: Tensor, x: Tensor, index: list[Tensor], accumulate: bool) -> None:
    from talos_kernels.triton.sddmm import sddmm_ as launch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = out.to(device)
    buffers = [buffer.to(device) for buffer in index]
    launch(there, dy.to(device), x.to(device), buffers, accumulate)
    out.copy_(there)


BACKENDS: dict[str, Op] = {"reference": sddmm_reference, "op": torch.ops.talos.sddmm_}
if importlib.util.find_spec("triton") is not None:
    BACKENDS["triton"] = triton


@pytest.fixture(params=BACKENDS)
def op(request: pytest.FixtureRequest) -> Op:
    return BACKENDS[request.param]


def assert_sum_is_close(actual: Tensor, expected: Tensor, terms: int) -> None:
    """Bounds by the sums' spread: products of normal numbers, as many as there are tokens."""
    row = REDUCTION_TOLERANCES[torch.float32]
    spread = max(terms, 1) ** 0.5
    torch.testing.assert_close(
        actual.double(), expected, rtol=row.rtol, atol=row.atol + 2.0**-20 * spread
    )


@pytest.fixture
def allow_tf32() -> Iterator[Callable[[bool], None]]:
    before = torch.backends.cuda.matmul.allow_tf32

    def allow(allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allowed

    yield allow
    allow(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_entries_are_those_of_the_gradient(op: Op, density: float, dtype: torch.dtype) -> None:
    # The interpreter takes a while for a tile: all shapes with one dtype, two with the others.
    for shape in SHAPES if dtype == torch.float32 else SHAPES[:2]:
        dy, x, mask, index = operands(shape, density, dtype)
        wanted = by_autograd(dy, x, mask)
        out = torch.empty(index.nnz)
        op(out, dy, x, index.buffers, False)
        assert_sum_is_close(out, wanted, shape[0])
        before = torch.randn(index.nnz)
        more = before.clone()
        op(more, dy, x, index.buffers, True)
        assert_bit_equal(more, before + out)


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_no_tokens_and_no_entries(op: Op, density: float) -> None:
    for shape in ((0, 70, 40), (4, 0, 5), (4, 5, 0)):
        dy, x, _, index = operands(shape, density, torch.float32)
        out = torch.empty(index.nnz)
        op(out, dy, x, index.buffers, False)
        assert_bit_equal(out, torch.zeros(index.nnz))
        kept = torch.ones(index.nnz)
        op(kept, dy, x, index.buffers, True)
        assert_bit_equal(kept, torch.ones(index.nnz))


def test_segments_of_a_sparse_index(op: Op) -> None:
    """Two and a half segments of 16-bit positions, the second empty, the last cut by the end."""
    dy, x, _, _ = operands((3, 641, 256), 0.0, torch.float32)
    mask = torch.zeros(641, 256, dtype=torch.bool)
    mask.view(-1)[torch.tensor([0, 31, 2047, 2048, 65535, 2 * 65536, 641 * 256 - 1])] = True
    mask[:9] |= torch.rand(9, 256) < 0.5  # more than a chunk of 512
    index = Index.pack([TensorIndex.encode(mask)])
    assert index.positions.numel() > 512
    out = torch.empty(index.nnz)
    op(out, dy, x, index.buffers, False)
    assert_sum_is_close(out, by_autograd(dy, x, mask), 3)


def test_rows_without_selected_entries_do_not_matter(op: Op) -> None:
    """As those of a fused weight's values."""
    dy, x, mask, _ = operands((4, 192, 64), 0.3, torch.float32)
    mask[64:] = False
    index = Index.pack([TensorIndex.encode(mask)])
    wanted = by_autograd(dy, x, mask)
    dy[:, 64:] = torch.nan
    out = torch.empty(index.nnz)
    op(out, dy, x, index.buffers, False)
    assert_sum_is_close(out, wanted, 4)


def test_autocast_rounds_nothing(op: Op) -> None:
    dy, x, _, index = operands((4, 40, 60), 0.3, torch.float32)
    out, under = torch.empty(2, index.nnz).unbind()
    op(out, dy, x, index.buffers, False)
    with torch.autocast("cpu", torch.bfloat16):
        op(under, dy, x, index.buffers, False)
    assert_bit_equal(under, out)


def test_two_runs_have_the_same_bits(op: Op) -> None:
    runs = []
    for _ in range(2):
        dy, x, _, index = operands(SHAPES[1], 0.3, torch.float32)
        out = torch.empty(index.nnz)
        op(out, dy, x, index.buffers, False)
        runs.append(out)
    assert_bit_equal(*runs)


@given(
    st.integers(0, 40), st.integers(1, 90), st.integers(1, 90), st.sampled_from([0.03, 0.5, 1.0])
)
def test_it_is_the_gather_of_the_product(tokens: int, rows: int, cols: int, density: float) -> None:
    dy, x, _, index = operands((tokens, rows, cols), density, torch.float32, seed=rows)
    out, gathered = torch.empty(2, index.nnz).unbind()
    sddmm_(out, dy, x, index)
    gather_grad_(gathered, [dy.double().T.matmul(x.double()).float()], index)
    assert_sum_is_close(out, gathered.double(), tokens)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 150), st.sampled_from([0.03, 0.5]))
def test_rows_may_begin_at_any_bit(rows: int, cols: int, density: float) -> None:
    """With one token of ones an entry is its column, so a wrong rank is seen."""
    _, _, mask, index = operands((1, rows, cols), density, torch.float32, seed=cols)
    out = torch.empty(index.nnz)
    x = torch.arange(cols).float()[None]
    triton(out, torch.ones(1, rows), x, index.buffers, False)
    assert_bit_equal(out, x.expand(rows, cols)[mask])


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
def test_every_tile_and_number_of_parts(
    precision: str, allow_tf32: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from talos_kernels.triton import sddmm

    dtype = torch.bfloat16 if precision == "half" else torch.float32
    allow_tf32(precision == "tf32")
    dy, x, mask, index = operands((150, 70, 131), 0.4, dtype)
    wanted, asked = by_autograd(dy, x, mask), []
    exact = precision != "tf32" or not torch.cuda.is_available()
    for choice in itertools.product(sddmm.CONFIGS[precision], (1, 2, 5)):  # 5: some have no tokens
        monkeypatch.setattr(
            sddmm, "plan", lambda *args, choice=choice: asked.append(args) or choice
        )
        out, again, more = torch.empty(3, index.nnz).unbind()
        before = torch.randn(index.nnz)
        triton(out, dy, x, index.buffers, False)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-4 if exact else 0.2)
        triton(again, dy, x, index.buffers, False)
        assert_bit_equal(again, out)
        triton(more.copy_(before), dy, x, index.buffers, True)
        assert_bit_equal(more, before + out)
    (args,) = {args[:6] for args in asked}
    assert args == (precision, 150, 70, 131, 1.0, index.nnz)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_the_precision_may_be_set_by_either_api(allow_tf32: Callable[[bool], None]) -> None:
    from talos_kernels.triton.launch import tf32_allowed

    for allowed in (True, False):
        allow_tf32(allowed)
        assert tf32_allowed() is allowed
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert tf32_allowed() is (precision == "tf32")
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_rows_too_wide_for_ranks_of_32_bits_take_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from talos_kernels.triton import sddmm

    dy, x, mask, index = operands((6, 10, 12), 0.5, torch.float32)
    monkeypatch.setattr(sddmm, "WIDEST", 12)
    monkeypatch.setattr(sddmm, "launch", pytest.fail)
    out = torch.empty(index.nnz)
    triton(out, dy, x, index.buffers, False)
    assert_sum_is_close(out, by_autograd(dy, x, mask), 6)


def test_strided_rows_and_operands_that_require_a_gradient() -> None:
    dy, x, mask, index = operands((6, 10, 12), 0.5, torch.float32)
    wanted = by_autograd(dy, x, mask)
    apart = torch.empty(6, 24)
    apart[:, 3:13] = dy
    for rows in (apart[:, 3:13], dy.T.contiguous().T, dy.clone().requires_grad_()):
        out = torch.empty(index.nnz)
        sddmm_(out, rows, x, index)
        assert_sum_is_close(out, wanted, 6)
        assert not out.requires_grad


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_rows_apart_in_memory_are_read_in_place() -> None:
    dy, x, mask, index = operands((6, 10, 12), 0.5, torch.float32)
    apart, inputs = torch.empty(6, 24)[:, 3:13], torch.empty(6, 17)[:, 1:13]
    out = torch.empty(index.nnz)
    triton(out, apart.copy_(dy), inputs.copy_(x), index.buffers, False)
    assert_sum_is_close(out, by_autograd(dy, x, mask), 6)


@pytest.mark.slow
def test_opcheck() -> None:
    dy, x, _, index = operands((3, 40, 60), 0.3, torch.float32)
    args = (torch.zeros(index.nnz), dy, x, index.buffers, False)
    torch.library.opcheck(torch.ops.talos.sddmm_.default, args)


def test_autograd_is_told_of_the_write() -> None:
    dy, x, _, index = operands((3, 4, 6), 0.5, torch.float32)
    out = torch.zeros(index.nnz)
    version = out._version
    sddmm_(out, dy, x, index)
    assert out._version > version


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"index": Index.pack([])}, TalosValueError, "index must hold one tensor, got 0"),
        ({"dy": torch.zeros(1, 3, 2)}, TalosValueError, "dy must be dense of 2 dimensions"),
        ({"x": torch.zeros(3, 5).to_sparse()}, TalosValueError, "x must be dense of 2 dim"),
        ({"dy": torch.zeros(3, 2).double()}, TalosTypeError, "dy must be float32, bfloat16 or"),
        ({"x": torch.zeros(3, 5).half()}, TalosTypeError, "x must be torch.float32 as dy is"),
        ({"x": torch.zeros(4, 5)}, TalosValueError, "x must have the 3 rows of dy, got 4"),
        ({"x": torch.zeros(3, 4)}, TalosValueError, "index must be of 2 x 4 entries"),
        ({"x": torch.zeros(3, 5, device="meta")}, TalosValueError, "x must be on the index's dev"),
        ({"out": torch.zeros(9)}, TalosValueError, r"contiguous of shape \(10,\)"),
        ({"out": torch.zeros(10).bfloat16()}, TalosTypeError, "out must be torch.float32"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, object], error: type[Exception], match: str
) -> None:
    good = {"out": torch.full((10,), 7.0), "dy": torch.zeros(3, 2), "x": torch.zeros(3, 5)}
    index = Index.pack([TensorIndex.encode(torch.ones(2, 5) > 0)])
    with pytest.raises(error, match=match):
        sddmm_(**{**good, "index": index, **changes})
    assert_bit_equal(good["out"], torch.full((10,), 7.0))
