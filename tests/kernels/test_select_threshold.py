"""select_threshold against sorting the concatenation, on every backend and over processes."""

import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from talos_kernels import TalosTypeError, TalosValueError, Threshold, _ops, select_threshold
from talos_kernels.select_threshold import score_histogram_reference
from tests.cases import DTYPES, assert_bit_equal

ROOT = Path(__file__).parents[2]
HISTOGRAMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "op": torch.ops.talos.score_histogram,
    "reference": score_histogram_reference,
}
if importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("talos_kernels.triton.select_threshold")
    HISTOGRAMS["triton"] = triton.score_histogram

module = importlib.import_module("talos_kernels.select_threshold")
FLOATS = (*DTYPES, torch.float64)
SIZES = ((3, 5), (), (0,), (97,), (2049,), (0, 4), (1,))
largest_or_lowest = pytest.mark.parametrize("largest", [False, True], ids=["lowest", "largest"])


@pytest.fixture(params=list(HISTOGRAMS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What counts behind the public function; Triton's kernels in its interpreter."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("serves the op on this device")
        monkeypatch.setitem(module.DIGITS, torch.float32, module.GPU_DIGITS)
    histogram = SimpleNamespace(score_histogram=HISTOGRAMS[request.param])
    monkeypatch.setattr(torch.ops, "talos", histogram)
    return str(request.param)


def expected(scores: Sequence[Tensor], k: int, largest: bool = False) -> list[Tensor]:
    """The k first of a stable sort of the concatenation, cut up again."""
    flat = torch.cat([score.double().flatten() for score in scores])
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.sort(stable=True, descending=largest).indices[:k]] = True
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def selected(scores: Sequence[Tensor], k: int, largest: bool = False) -> list[Tensor]:
    threshold = select_threshold(scores, k, largest)
    return [threshold.select(i, score) for i, score in enumerate(scores)]


def check(scores: Sequence[Tensor], k: int, largest: bool = False) -> None:
    for ours, wanted in zip(
        selected(scores, k, largest), expected(scores, k, largest), strict=True
    ):
        assert torch.equal(ours, wanted)


def some_scores(dtype: torch.dtype, sizes: Sequence[tuple[int, ...]] = SIZES) -> list[Tensor]:
    return [torch.randn(size).square().to(dtype) for size in sizes]


@largest_or_lowest
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_selection_is_that_of_a_stable_sort(
    dtype: torch.dtype, largest: bool, backend: str
) -> None:
    scores = some_scores(dtype)
    n = sum(score.numel() for score in scores)
    for k in (0, 1, n // 10, n - 1, n):
        check(scores, k, largest)


def test_the_digits_are_all_bits_but_the_sign() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert module._digits(torch.float32, gpu) == module.GPU_DIGITS != module.DIGITS[torch.float32]
    assert max(module.GPU_DIGITS) <= 8
    for device in (gpu, cpu):
        assert sum(module._digits(torch.float32, device)) == 31
        assert sum(module._digits(torch.float64, device)) == 63


def test_the_value_is_kthvalue(backend: str) -> None:
    scores = some_scores(torch.float32)
    flat = torch.cat([score.flatten() for score in scores])
    for k in (1, 2, 1000, flat.numel()):
        assert select_threshold(scores, k).value == flat.kthvalue(k).values
        assert select_threshold(scores, k, largest=True).value == flat.topk(k).values[-1]


@largest_or_lowest
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-149, torch.finfo(torch.float32).max])
def test_equal_scores_are_taken_in_order(value: float, largest: bool, backend: str) -> None:
    scores = [torch.full(size, value) for size in SIZES]
    for k in (0, 1, 15, 16, 17, 113, 114, 2000, 2162, 2163):
        check(scores, k, largest)


@largest_or_lowest
def test_zeros_of_both_signs_are_equal(largest: bool, backend: str) -> None:
    zeros = torch.tensor([0.0, -0.0, -0.0, 0.0, -0.0, 1.0])
    for dtype in FLOATS:
        for k in range(13):
            check([zeros.to(dtype), zeros.to(dtype)], k, largest)


@largest_or_lowest
def test_neighbouring_floats_are_told_apart(largest: bool, backend: str) -> None:
    """Denormals, both sides of each digit's end, and the largest floats."""
    ends = [0, 1, 2, 1023, 1024, 1025, (1 << 20) - 1, 1 << 20, 0x7FFFFF, 0x800000, 0x3F800000]
    bits = torch.tensor([*ends, 0x3F7FFFFF, 0x3F800001, 0x7F7FFFFE, 0x7F7FFFFF], dtype=torch.int32)
    scores = [bits.view(torch.float32)[torch.randperm(len(bits))] for _ in range(2)]
    for k in range(2 * len(bits) + 1):
        check(scores, k, largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@largest_or_lowest
def test_every_16_bit_score(dtype: torch.dtype, largest: bool) -> None:
    every = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    scores = [every[torch.randperm(every.numel())] for _ in range(3)]
    for k in (1, 2, 3, 4, 3071, 50_000, 3 * every.numel() - 1):
        check(scores, k, largest)


@largest_or_lowest
def test_the_infinity_that_sorts_last_is_never_selected(largest: bool, backend: str) -> None:
    infinity = -math.inf if largest else math.inf
    for dtype in FLOATS:
        scores = some_scores(dtype)
        for score in scores:
            score.masked_fill_(torch.rand(score.shape) < 0.7, infinity)
        scores[3].fill_(infinity)
        eligible = sum(int(score.isfinite().sum()) for score in scores)
        for k in (0, 1, eligible // 2, eligible):
            check(scores, k, largest)
        with pytest.raises(
            TalosValueError, match=f"k must be at most {eligible}, .*{eligible + 1}"
        ):
            select_threshold(scores, eligible + 1, largest)


@largest_or_lowest
def test_scores_of_several_dtypes(largest: bool, backend: str) -> None:
    for dtypes in (DTYPES, (torch.bfloat16, torch.float64)):
        scores = [torch.rand(500).to(dtype) for dtype in (*dtypes, *dtypes)]
        for k in (1, 77, 500, 999, 1500):
            check(scores, k, largest)


def test_other_strides(backend: str) -> None:
    base = torch.rand(60, 40)
    scores = [base.T, base[::3, 1::2], base[0, 0], torch.rand(7).expand(5, 7)]
    for k in (1, 100, 1000, 2800):
        check(scores, k)
    assert all(
        chosen.shape == score.shape
        for chosen, score in zip(selected(scores, 100), scores, strict=True)
    )


def test_nothing_to_select_from(backend: str) -> None:
    assert select_threshold([], 0).value == 0.0
    check([torch.zeros(0), torch.zeros(2, 0)], 0)
    with pytest.raises(TalosValueError, match="k must be at most 0"):
        select_threshold([torch.zeros(0)], 1)


@largest_or_lowest
@given(
    rows=st.lists(
        st.lists(
            st.one_of(
                st.sampled_from([0.0, -0.0, 1.0, 2.0**-149]),
                st.floats(min_value=0.0, allow_infinity=False, allow_nan=False, width=32),
            ),
            max_size=20,
        ),
        min_size=1,
        max_size=5,
    ),
    share=st.floats(0.0, 1.0),
)
def test_any_scores(largest: bool, rows: list[list[float]], share: float) -> None:
    scores = [torch.tensor(row) for row in rows]
    check(scores, int(share * sum(map(len, rows))), largest)


@pytest.mark.parametrize("bad", [math.nan, -1.0, -math.inf, -(2.0**-149)])
def test_what_is_no_score_is_named(bad: float, backend: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = [torch.rand(3, dtype=dtype), torch.rand(2100, dtype=dtype)]
        scores[1][[4, 2099]] = bad
        if bad and scores[1][4] == 0:
            continue  # too small for the dtype
        match = r"scores\['w'\] must be finite and not negative, got 2 entries"
        for k in (0, 1, 5000):
            with pytest.raises(TalosValueError, match=match):
                select_threshold(scores, k, names=["v", "w"])
        with pytest.raises(TalosValueError, match=r"scores\[1\] must be finite"):
            select_threshold(scores, 1)
    if not math.isinf(bad):
        with pytest.raises(TalosValueError, match=r"scores\[0\] must be finite"):
            select_threshold([torch.tensor([bad])], 0, largest=True)


def test_each_infinity_is_excluded_on_one_side_only(backend: str) -> None:
    for dtype in FLOATS:
        for sign, largest in ((1, True), (-1, False)):
            score = torch.tensor([1.0, sign * math.inf], dtype=dtype)
            with pytest.raises(TalosValueError, match=r"scores\[0\] must be finite .* got 1"):
                select_threshold([score], 1, largest)


@pytest.mark.parametrize(
    ("scores", "options", "error", "match"),
    [
        ([torch.ones(2)], {"k": -1}, TalosValueError, "k must be an integer of at least 0, got -1"),
        ([torch.ones(2)], {"k": 1.0}, TalosValueError, "k must be an integer .* got 1.0"),
        ([torch.ones(2)], {"k": True}, TalosValueError, "k must be an integer .* got True"),
        ([torch.ones(2)], {"k": 1, "names": []}, TalosValueError, "names must hold 1 entries"),
        ([torch.ones(2).int()], {"k": 1}, TalosTypeError, r"scores\[0\] must be float32.*int32"),
        (
            [torch.ones(2), torch.ones(2, device="meta")],
            {"k": 1},
            TalosValueError,
            r"scores\[1\] must be on cpu, got meta",
        ),
    ],
)
def test_bad_arguments_are_refused(
    scores: list[Tensor], options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        select_threshold(scores, **options)


def digits(scores: Sequence[Tensor], largest: bool = False) -> Iterator[tuple[object, ...]]:
    """Arguments of the low-level op: each pass, with prefixes that some entries have and none."""
    for shift, bits in ((20, 11), (10, 10), (0, 10), (24, 7), (16, 8), (0, 8), (3, 0)):
        found = score_histogram_reference(scores, torch.tensor(0), shift + bits, 11, largest)[0]
        for prefix in {0, int(found.argmax()), 1010}:
            yield scores, torch.tensor(prefix), shift, bits, largest


@largest_or_lowest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["op", "triton"])
def test_counts_are_the_references(dtype: torch.dtype, largest: bool, name: str) -> None:
    scores = some_scores(dtype, ((66_001,), (0,), (31,), (33,), ()))
    scores[0][7:100] = 0.5
    scores[0][[0, 5, 9, 11]] = torch.tensor([math.nan, math.inf, -math.inf, -1.0]).to(dtype)
    scores[3][:] = torch.tensor(-1.0)
    for arguments in digits(scores, largest):
        counts, refused = HISTOGRAMS[name](*arguments)
        wanted, wanted_refused = score_histogram_reference(*arguments)
        assert_bit_equal(counts, wanted)
        assert_bit_equal(refused, wanted_refused)
        assert refused.tolist()[2:] == [0, 33, 0]


@pytest.mark.slow
def test_two_runs_and_any_number_of_threads_agree() -> None:
    scores = some_scores(torch.float32, ((300, 1000), (70_000,)))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(
                [torch.cat(torch.ops.talos.score_histogram(*each)) for each in digits(scores)]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert_bit_equal(ours, first)


def compiled_differs() -> str:
    """Whether the compiled op counts otherwise than the reference; printed by a subprocess."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for largest in (False, True):
            for each in digits(some_scores(dtype, ((70_000,), (33,))), largest):
                ours, wanted = (
                    torch.ops.talos_C.score_histogram(*each),
                    HISTOGRAMS["reference"](*each),
                )
                if not all(map(torch.equal, ours, wanted)):
                    return f"{dtype} {largest} {each[1:]}"
    return "agrees"


@pytest.mark.slow
@pytest.mark.skipif(_ops.compiled_library is None, reason="talos_kernels/_C was not built")
@pytest.mark.parametrize("capability", ["avx2", "baseline"])
def test_every_instruction_set_counts_alike(capability: str) -> None:
    code = f"from {__name__} import compiled_differs; print(compiled_differs())"
    environment = os.environ | {"TALOS_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "agrees", done.stderr


@pytest.mark.slow
def test_opcheck() -> None:
    scores = some_scores(torch.float32)
    op = torch.ops.talos.score_histogram.default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(op, (scores, torch.tensor(0), 20, 11, False))


@pytest.mark.skipif(_ops.compiled_library is None, reason="talos_kernels/_C was not built")
@pytest.mark.parametrize(
    ("scores", "prefix", "bits", "match"),
    [
        ([torch.ones(2).double()], torch.tensor(0), 10, r"scores\[0\] must be float32, bfloat16"),
        (
            [torch.ones(2), torch.ones(2).half()],
            torch.tensor(0),
            10,
            r"scores\[1\] must have dtype",
        ),
        ([torch.ones(4)[::2]], torch.tensor(0), 10, r"scores\[0\] must be contiguous"),
        ([torch.ones(2)], torch.tensor(0.0), 10, "prefix must have dtype Long"),
        ([torch.ones(2)], torch.tensor([0, 1]), 10, "prefix must have 1 elements"),
        ([torch.ones(2)], torch.tensor(0), 12, "bits must .* end at bit 31 of a key, got 12 above"),
    ],
)
def test_the_compiled_op_refuses(
    scores: list[Tensor], prefix: Tensor, bits: int, match: str
) -> None:
    with pytest.raises(RuntimeError, match=match):
        torch.ops.talos_C.score_histogram(scores, prefix, 20, bits, False)


def test_a_threshold_is_a_value() -> None:
    scores = [torch.tensor([1.0, 0.0, torch.inf]), torch.tensor([[1.0, 2.0]])]
    assert select_threshold(scores, 3) == Threshold(1.0, False, None)
    assert select_threshold(scores, 2) == Threshold(1.0, False, (1, 0))


def shards(ranks: int) -> list[list[list[Tensor]]]:
    """Problems, each as the tensors' shards: [problem][tensor][rank], some of them empty."""
    torch.manual_seed(0)
    distinct = [torch.rand(n) for n in (1000, 7, 1, 0, 300)]
    tied = [torch.randint(3, (n,)).float() for n in (50, 2, 90)]
    half = [torch.rand(n).bfloat16() for n in (2000, 31)]
    return [
        [list(torch.tensor_split(tensor, ranks)) for tensor in tensors]
        for tensors in (distinct, tied, half)
    ]


def rank_of_a_group(rank: int, ranks: int, folder: str) -> None:
    """Selects from its shards of each problem and leaves what it found in `folder`."""
    where = Path(folder)
    dist.init_process_group("gloo", f"file://{where / 'store'}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    found = []
    for problem in shards(ranks):
        mine = [tensor[rank] for tensor in problem]
        n = sum(shard.numel() for tensor in problem for shard in tensor)
        for largest in (False, True):
            for k in (0, 1, n // 3, n - 1, n):
                threshold = select_threshold(mine, k, largest, dist.group.WORLD)
                found.append([threshold.select(i, shard) for i, shard in enumerate(mine)])
    messages = []
    for k, bad in ((10_000, 1.0), (1, math.nan)):  # only the last rank's shard is bad
        score = torch.tensor([bad if rank == ranks - 1 else 1.0, 2.0])
        try:
            select_threshold([torch.ones(1), score], k, group=dist.group.WORLD, names=["v", "w"])
        except TalosValueError as error:
            messages.append(str(error))
    torch.save((found, messages), where / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_group_selects_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    mp.spawn(rank_of_a_group, (ranks, str(tmp_path)), nprocs=ranks)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    at = 0
    for problem in shards(ranks):
        tensors = [torch.cat(tensor) for tensor in problem]
        n = sum(tensor.numel() for tensor in tensors)
        for largest in (False, True):
            for k in (0, 1, n // 3, n - 1, n):
                for i, wanted in enumerate(expected(tensors, k, largest)):
                    assert torch.equal(torch.cat([found[at][i] for found, _ in results]), wanted)
                at += 1
    total = 3 * ranks
    for _, messages in results:
        assert [message.split("; ")[0] for message in messages] == [
            f"k must be at most {total}, the number of entries that are not excluded, got 10000",
            "scores['w'] must be finite and not negative, got 1 entries that are not",
        ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@largest_or_lowest
def test_magnitudes_are_compared_without_a_copy_of_all(largest: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator).mul(8).round().to(dtype) for size in SIZES]
    before = [each.clone() for each in values]
    for k in (0, 1, 100, 1500, sum(each.numel() for each in values)):
        threshold = select_threshold(values, k, largest, magnitudes=True)
        chosen = [threshold.select(i, each.abs()) for i, each in enumerate(values)]
        wanted = expected([each.abs() for each in values], k, largest)
        assert all(map(torch.equal, chosen, wanted))
    for each, old in zip(values, before, strict=True):
        assert_bit_equal(each, old)
    with pytest.raises(TalosValueError, match=r"scores\[1\] must be finite"):
        select_threshold([values[0], torch.tensor([torch.nan])], 1, largest, magnitudes=True)
