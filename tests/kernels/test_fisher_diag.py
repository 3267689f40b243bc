"""Squares of per-sample gradients: every backend against autograd in float64 and the reference."""

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from talos_kernels import (
    TalosTypeError,
    TalosValueError,
    _ops,
    fisher_diag_,
    fisher_diag_embedding_,
    fisher_diag_vector_,
)
from talos_kernels.fisher_diag import fisher_diag_reference
from tests.cases import DTYPES, assert_bit_equal, assert_close

# [outer, samples, inner] and features O, I; sizes straddle the tiles of every kernel.
SHAPES = (
    ((1, 3, 5), (7, 11)),
    ((4, 3, 1), (100, 193)),
    ((2, 3, 2), (50, 48)),
    ((1, 2, 65), (130, 40)),
    ((1, 5, 1), (9, 70)),
    ((1, 1, 1), (1, 1)),
    ((1, 17, 1), (65, 3)),
    ((1, 2, 33), (385, 192)),
    ((1, 3, 16), (128, 64)),
)
EMPTY = (((1, 5, 0), (3, 3)), ((0, 2, 3), (4, 5)), ((1, 0, 3), (4, 5)), ((1, 2, 3), (0, 5)))
Layer = tuple[Tensor, Tensor, Tensor]
Op = Callable[[list[Tensor], list[Tensor], list[Tensor], float], None]


def layer(
    rows: tuple[int, int, int], features: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(features, generator=generator)
    dy, x = (torch.randn(*rows, width, generator=generator).to(dtype) for width in features)
    return score, dy, x


def by_autograd(score: Tensor, dy: Tensor, x: Tensor, share: float) -> Tensor:
    """The score with each sample's gradient from autograd, float64."""
    total = score.double()
    for sample in range(dy.shape[1]):
        weight = torch.zeros(score.shape, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.linear(x[:, sample].double(), weight)
        (gradient,) = torch.autograd.grad(y, weight, dy[:, sample].double())
        total = total + share * gradient.square()
    return total


def compiled(scores: list[Tensor], dys: list[Tensor], xs: list[Tensor], share: float) -> None:
    torch.ops.talos_C.fisher_diag_(scores, dys, xs, share)


def triton(scores: list[Tensor], dys: list[Tensor], xs: list[Tensor], share: float) -> None:
    from talos_kernels.triton.fisher_diag import fisher_diag_ as launch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = [score.to(device) for score in scores]
    launch(there, [dy.to(device) for dy in dys], [x.to(device) for x in xs], share)
    for score, result in zip(scores, there, strict=True):
        score.copy_(result)


BACKENDS: dict[str, Op] = {"reference": fisher_diag_reference}
if _ops.compiled_library is not None:
    BACKENDS["compiled"] = compiled
if importlib.util.find_spec("triton") is not None:
    BACKENDS["triton"] = triton


@pytest.fixture(params=BACKENDS)
def op(request: pytest.FixtureRequest) -> Op:
    return BACKENDS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_sums_of_squares_of_the_gradients_of_samples(op: Op, dtype: torch.dtype) -> None:
    layers = [layer(*shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    expected = [by_autograd(*each, 0.5) for each in layers]
    op(*(list(each) for each in zip(*layers, strict=True)), 0.5)
    for (score, _, _), wanted in zip(layers, expected, strict=True):
        assert_close(score, wanted, reduction=True, dtype=torch.float32)


@pytest.mark.parametrize(("rows", "features"), EMPTY)
def test_no_rows_add_nothing(op: Op, rows: tuple[int, int, int], features: tuple[int, int]) -> None:
    score, dy, x = layer(rows, features, torch.float32)
    before = score.clone()
    op([score], [dy], [x], 1.0)
    assert_bit_equal(score, before)


def test_strided_rows_and_a_part_of_a_score(op: Op) -> None:
    whole = torch.rand(12, 24)
    before = whole.clone()
    dy, x = torch.randn(3, 4, 10, 16)[1:2, ..., 2:9], torch.randn(1, 4, 10, 24)
    expected = by_autograd(whole[3:10], dy, x, 1.0)
    op([whole[3:10]], [dy], [x], 1.0)
    assert_close(whole[3:10], expected, reduction=True, dtype=torch.float32)
    assert_bit_equal(whole[:3], before[:3])
    assert_bit_equal(whole[10:], before[10:])


def test_two_runs_have_the_same_bits(op: Op) -> None:
    runs = []
    for _ in range(2):
        layers = [layer(*shape, torch.float32) for shape in SHAPES[:5]]
        op(*(list(each) for each in zip(*layers, strict=True)), 1.0)
        runs.append([score for score, _, _ in layers])
    for one, other in zip(*runs, strict=True):
        assert_bit_equal(one, other)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(threads: Callable[[int], None]) -> None:
    runs = []
    for count in (1, 2, 5):
        threads(count)
        score, dy, x = layer((1, 3, 20), (400, 400), torch.float32)
        fisher_diag_([score], [dy], [x])
        runs.append(score)
    assert_bit_equal(runs[0], runs[1])
    assert_bit_equal(runs[0], runs[2])


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_samples_are_split_into_slabs_where_tiles_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    from talos_kernels.triton import fisher_diag

    monkeypatch.setattr(fisher_diag, "processors", lambda device: 8)
    layers = [layer(*SHAPES[i], torch.float32, i) for i in (0, 3, 1)]
    expected = [by_autograd(*each, 0.5) for each in layers]
    triton(*(list(each) for each in zip(*layers, strict=True)), 0.5)
    for (score, _, _), wanted in zip(layers, expected, strict=True):
        assert_close(score, wanted, reduction=True, dtype=torch.float32)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("tokens", [16, 17, 50, 64, 65, 77, 130])
@pytest.mark.parametrize("slabs", [1, 2])
def test_samples_of_one_step_and_of_several(
    tokens: int, slabs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched alone, so that its own samples decide how deep a step is."""
    from talos_kernels.triton import fisher_diag

    monkeypatch.setattr(fisher_diag, "processors", lambda device: slabs)
    score, dy, x = layer((1, 5, tokens), (130, 40), torch.bfloat16)
    expected = by_autograd(score, dy, x, 0.5)
    triton([score], [dy], [x], 0.5)
    assert_close(score, expected, reduction=True, dtype=torch.float32)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_unit_cuts_off_what_tf32_does_not_hold(
    dtype: torch.dtype, allowed: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of squares, where torch may not; the interpreter keeps all bits whatever it is told."""
    from talos_kernels.triton import fisher_diag

    given = []
    kernel = {(1,): lambda *_, **options: given.append(options["PRECISION"])}
    monkeypatch.setattr(fisher_diag, "fisher_diag_kernel", kernel)
    monkeypatch.setattr(fisher_diag, "tf32_allowed", lambda: allowed)
    monkeypatch.setattr(fisher_diag, "architecture", lambda: (backend, 90))
    triton(*([each] for each in layer((1, 5, 1), (9, 16), dtype)), 1.0)
    if dtype == torch.float32:
        assert given == ["tf32" if allowed else "ieee"]
    else:
        assert given == ["tf32x3" if backend == "cuda" else "ieee"]


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_slabs_fill_whole_waves() -> None:
    from talos_kernels.triton.fisher_diag import slab_count

    assert slab_count(128, 264 // 64) == 4
    assert slab_count(128, 264 // 109) == 2  # a third would begin a third wave
    assert slab_count(128, 264 // 300) == 1
    for samples in range(1, 20):
        for wanted in range(25):
            slabs = slab_count(samples, wanted)
            assert 1 <= slabs <= max(wanted, 1)
            assert (slabs - 1) * -(-samples // slabs) < samples  # the last one is not empty


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_a_step_takes_as_many_tokens_as_cost_least() -> None:
    from talos_kernels.triton.fisher_diag import CONFIGS, token_block

    chosen = {tokens: token_block(tokens, CONFIGS["half"].tokens) for tokens in (1, 16, 17, 50, 64)}
    assert chosen == {1: 16, 16: 16, 17: 32, 50: 64, 64: 64}  # one step a sample
    assert [token_block(tokens, CONFIGS["half"].tokens) for tokens in (77, 96, 128, 257)] == [
        32, 32, 64, 64,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(_ops.compiled_library is None, reason="csrc/ was not built")
def test_every_instruction_set(capability: str, tmp_path: object) -> None:
    import subprocess
    import sys

    code = """
import torch
from tests.kernels.test_fisher_diag import SHAPES, by_autograd, compiled, layer
from tests.cases import assert_close
for dtype in (torch.float32, torch.bfloat16):
    for rows, features in SHAPES:
        score, dy, x = layer(rows, features, dtype)
        expected = by_autograd(score, dy, x, 0.5)
        compiled([score], [dy], [x], 0.5)
        assert_close(score, expected, reduction=True, dtype=torch.float32)
"""
    environment = os.environ | {"TALOS_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_float64_is_multiplied_in_float64() -> None:
    score, dy, x = layer((1, 4, 6), (5, 7), torch.float64)
    dy[0, 0, 0] = 1e-30
    expected = by_autograd(score, dy, x, 1.0)
    fisher_diag_([score], [dy], [x])
    assert_close(score, expected, dtype=torch.float32)


def test_features_apart_in_memory_are_taken_as_they_are() -> None:
    score, dy, x = layer((1, 3, 4), (6, 5), torch.float32)
    expected = by_autograd(score, dy, x, 1.0)
    fisher_diag_([score], [dy.transpose(2, 3).contiguous().transpose(2, 3)], [x])
    assert_close(score, expected, reduction=True)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_order_of_samples_and_tokens_does_not_matter(
    rows: tuple[int, int, int], features: tuple[int, int]
) -> None:
    score, dy, x = layer(rows, features, torch.float32)
    samples, tokens = torch.randperm(rows[1]), torch.randperm(rows[2])
    mixed = score.clone()
    fisher_diag_([score], [dy], [x])
    fisher_diag_([mixed], [dy[:, samples][:, :, tokens]], [x[:, samples][:, :, tokens]])
    assert_close(mixed, score, reduction=True)


def test_vectors() -> None:
    score, dy, _ = layer((2, 3, 4), (10, 1), torch.bfloat16)
    vector = score[:, 0].clone()
    expected = vector.double() + 0.5 * dy.double().sum((0, 2)).square().sum(0)
    fisher_diag_vector_(vector, dy, share=0.5)
    assert_close(vector, expected, reduction=True, dtype=torch.float32)


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("rows", [(1, 3, 8), (8, 3, 1), (2, 2, 3)])
def test_embeddings(rows: tuple[int, int, int], padding_idx: int | None) -> None:
    score, dy, _ = layer(rows, (5, 4), torch.float32)
    score, dy = torch.rand(7, 5), dy
    ids = torch.randint(7, rows)
    expected = score.double()
    for sample in range(rows[1]):
        table = torch.zeros(7, 5, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.embedding(ids[:, sample], table, padding_idx)
        (gradient,) = torch.autograd.grad(y, table, dy[:, sample].double())
        expected = expected + 0.5 * gradient.square()
    fisher_diag_embedding_(score, dy, ids, share=0.5, padding_idx=padding_idx)
    assert_close(score, expected, reduction=True, dtype=torch.float32)


def test_embedding_of_nothing() -> None:
    score = torch.ones(3, 2)
    fisher_diag_embedding_(score, torch.zeros(1, 2, 0, 2), torch.zeros(1, 2, 0, dtype=torch.long))
    assert score.tolist() == [[1, 1]] * 3


@pytest.mark.slow
def test_opcheck() -> None:
    score, dy, x = layer((1, 3, 4), (6, 5), torch.float32)
    torch.library.opcheck(torch.ops.talos.fisher_diag_, ([score], [dy], [x], 0.5))


def test_autograd_is_told_of_the_write() -> None:
    score, dy, x = layer((1, 3, 4), (6, 5), torch.float32)
    version = score._version
    fisher_diag_([score], [dy], [x])
    assert score._version > version


def refused(change: Callable[[list[Tensor]], object]) -> list[Tensor]:
    tensors = [*layer((1, 3, 4), (6, 5), torch.float32)]
    change(tensors)
    return tensors


def put(position: int, tensor: Tensor) -> Callable[[list[Tensor]], object]:
    return lambda tensors: tensors.__setitem__(position, tensor)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (put(0, torch.zeros(6, 5).half()), TalosTypeError, r"scores\[0\] must be float32"),
        (put(0, torch.zeros(6)), TalosValueError, r"scores\[0\] must have 2 dimensions"),
        (put(0, torch.zeros(5, 6).T), TalosValueError, "columns of a row next to each other"),
        (
            put(0, torch.zeros(7, 5)),
            TalosValueError,
            r"dys\[0\] must be \[outer, samples, inner, 7",
        ),
        (put(1, torch.zeros(3, 4, 6)), TalosValueError, r"dys\[0\] must be \[outer, samples"),
        (put(1, torch.zeros(1, 3, 4, 6).int()), TalosTypeError, r"dys\[0\] must be float32, bf"),
        (put(2, torch.zeros(1, 3, 5, 5)), TalosValueError, r"xs\[0\] must have the rows of dys"),
        (put(2, torch.zeros(1, 3, 4, 5).half()), TalosTypeError, r"xs\[0\] must be torch.float32"),
        (put(0, torch.zeros(6, 5, device="meta")), TalosValueError, r"scores\[0\] must be on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_write(
    change: Callable[[list[Tensor]], object], error: type[Exception], message: str
) -> None:
    score, dy, x = refused(change)
    before = score.clone()
    with pytest.raises(error, match=message.replace("bf", "bfloat16")):
        fisher_diag_([score], [dy], [x])
    if not score.is_meta:
        assert_bit_equal(score, before)


def test_lists_of_unequal_length_are_refused() -> None:
    score, dy, x = layer((1, 3, 4), (6, 5), torch.float32)
    with pytest.raises(TalosValueError, match="equally long, got 1, 1 and 2"):
        fisher_diag_([score], [dy], [x, x])
    fisher_diag_([], [], [])


@pytest.mark.parametrize("ids", [torch.full((1, 3, 4), 7), torch.full((1, 3, 4), -1)])
def test_ids_outside_of_the_table_are_refused(ids: Tensor) -> None:
    score = torch.zeros(7, 5)
    with pytest.raises(TalosValueError, match="ids must lie in 0 to 6"):
        fisher_diag_embedding_(score, torch.zeros(1, 3, 4, 5), ids)
    with pytest.raises(TalosValueError, match=r"ids must be \[1, 3, 4\]"):
        fisher_diag_embedding_(score, torch.zeros(1, 3, 4, 5), ids[0])


@pytest.mark.parametrize("tokens", [1, 6, 40], ids=lambda tokens: f"{tokens} tokens")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_gradient_add_nothing(dtype: torch.dtype, tokens: int) -> None:
    score, dy, x = layer((2, 5, tokens), (60, 200), dtype)
    padding = torch.rand(2, 5, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    padding[:, 2] = True  # a sample of padding alone
    padding[0, 0, 0] = False
    dy[padding] = 0
    dy[0, 0, 0, :50] = 0  # zero in one chunk of features, not in all
    expected = by_autograd(score, dy, x, 0.5)
    fisher_diag_([score], [dy], [x], share=0.5)
    assert_close(score, expected, reduction=True, dtype=torch.float32)
