"""Options of the benches, what each result says about the machine, and the table at the end."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import measure
from benches.results_file import add_result, draw_costs
from benches.shapes import SHAPES
from benches.table import METHODS, Record, table_lines
from talos.app.costs import Cost
from talos.app.costs.results import table_lines as costs_lines

RECORDS = pytest.StashKey[list[Record]]()
COSTS = pytest.StashKey[list[tuple[str, str, list[dict[str, Any]]]]]()

# cuDNN's default, by which patch convolutions of float32 are not the matrix products beside them.
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "vit-b-32" if torch.cuda.is_available() else "minilm"
    parser.addoption(
        "--shape",
        action="append",
        choices=sorted(SHAPES),
        help=f"model whose tensors are used; may be given more than once (default: {default})",
    )
    parser.addoption(
        "--layers",
        type=int,
        help="layers of a tower that is scored (default: all on a GPU, some on the CPU)",
    )
    parser.addoption(
        "--dtype",
        action="append",
        choices=["fp32", "bf16"],
        help="of whole iterations, bf16 by autocast; may be given twice (default: both)",
    )
    parser.addoption("--batch", type=int, help="images or texts of a whole iteration")
    parser.addoption("--tokens", type=int, help="of a text of a whole iteration")
    parser.addoption("--rounds", type=int, default=3, help="turns of each form of an iteration")
    parser.addoption(
        "--compile",
        action="store_true",
        help="compiled forms of an iteration on the CPU too, where compiling takes minutes",
    )
    parser.addoption(
        "--out", type=Path, help="folder for a JSON an op, rewritten as each bench ends"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    config.stash[COSTS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`shape`, with its layers where `linear` is wanted too, or `tower`, from --shape."""
    on_gpu = torch.cuda.is_available()
    given = metafunc.config.getoption("--shape")
    names = given or ["vit-b-32" if on_gpu else "minilm"]
    if "linear" in metafunc.fixturenames:
        pairs = [(SHAPES[name], linear) for name in names for linear in SHAPES[name].linears]
        ids = [f"{shape.name}-{rows}x{columns}" for shape, (rows, columns) in pairs]
        metafunc.parametrize(("shape", "linear"), pairs, ids=ids, scope="module")
    elif "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", [SHAPES[name] for name in names], ids=names, scope="module")
    if "trained" in metafunc.fixturenames:
        trained = given or (sorted(SHAPES) if on_gpu else ["vit-b-32"])
        dtypes = metafunc.config.getoption("--dtype") or ["fp32", "bf16"]
        metafunc.parametrize(("trained", "dtype"), [(n, d) for n in trained for d in dtypes])
    if "tower" in metafunc.fixturenames:
        towers = given or (["vit-b-32"] if on_gpu else ["minilm", "vit-b-32"])
        metafunc.parametrize("tower", towers, indirect=True, scope="module")


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Bytes a second of a copy on the bench's device."""
    return measure.copy_bandwidth(measure.target_device())


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Record], dict[str, object]]:
    """Keeps a record for the table and, with its machine, for the op's file."""
    config = request.config

    def keep_record(record: Record) -> dict[str, object]:
        config.stash[RECORDS].append(record)
        result = record.as_dict() | measure.machine()
        if config.getoption("--out"):
            add_result(config.getoption("--out"), result)
        return result

    return keep_record


@pytest.fixture
def keep_costs(
    request: pytest.FixtureRequest,
) -> Callable[[str, str, list[Cost]], None]:
    """Keeps the costs of one workload, by model and label, as `keep` does records; draws them."""
    config = request.config
    out: Path | None = config.getoption("--out")

    def keep_them(model: str, label: str, costs: list[Cost]) -> None:
        config.stash[COSTS].append((model, label, [cost.as_dict() for cost in costs]))
        for cost in costs:
            record = Record(
                op=METHODS,
                shape=label,
                form=cost.title,
                seconds=cost.total,
                spread=cost.spreads[2],
                state_bytes=cost.memory.state,
                peak_bytes=cost.memory.peak,
            )
            result = record.as_dict() | {"model": model, "cost": cost.as_dict()}
            if out is not None:
                add_result(out, result | measure.machine())
        if out is not None:
            draw_costs(out, model, label, [cost.as_dict() for cost in costs])

    return keep_them


@pytest.fixture
def measured(
    keep: Callable[[Record], dict[str, object]], benchmark: Any, bandwidth: float
) -> Callable[..., None]:
    """Times a form that was checked, and keeps the result: table, `extra_info`, file.

    Called with what `Record` needs besides the times, and `step`, the closure to time.
    """

    def measure_and_keep(step: Callable[[], object], **about: Any) -> None:
        start = measure.clock()
        peak = measure.peak_bytes(step)
        if measure.clock() - start < measure.SLOW_SECONDS:
            start = measure.clock()
            step()
        first = measure.clock() - start
        calls = measure.calls_for(first, measure.target_device().type)
        rounds = measure.rounds_for(first * calls)
        warmup = min(1, rounds - 1)  # what runs once has run before, where its peak was measured
        benchmark.pedantic(step, rounds=rounds, iterations=calls, warmup_rounds=warmup)
        if benchmark.disabled:
            return
        stats = benchmark.stats.stats
        times = {"seconds": stats.median, "spread": stats.iqr}
        result = keep(Record(bandwidth=bandwidth, peak_bytes=peak, **times, **about))
        benchmark.extra_info.update(result)

    return measure_and_keep


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Each bench starts with the memory of the one before it given back."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The machine's own facts in place of its host name."""
    machine_info.clear()
    machine_info.update(measure.machine())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if records:
        terminalreporter.section("ratios")
        for line in table_lines(records):
            terminalreporter.write_line(line)
    for model, label, forms in config.stash[COSTS]:
        terminalreporter.section(label)
        for line in costs_lines(forms, model):
            terminalreporter.write_line(line)
