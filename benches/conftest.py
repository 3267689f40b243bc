"""Options of the benches, the machine's facts in each result, and the tables at the end."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import measure
from benches.figures import draw_costs
from benches.iterations import Cost
from benches.results import METHODS, Record, add_result, costs_lines, table_lines
from benches.shapes import SHAPES
from benches.work import Work

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
        "--model",
        help="a folder or hub name of transformers: only whole iterations of this model",
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
        "--form",
        action="append",
        help="of an iteration, by name; may be given again (default: all)",
    )
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only what takes --model, if that is given."""
    if config.getoption("--model") is not None:
        if config.getoption("--shape") or config.getoption("--layers"):
            raise pytest.UsageError("--model must come without --shape and --layers")
        items[:] = [each for each in items if "trained" in getattr(each, "fixturenames", ())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make `shape`, `linear`, `trained` and `tower` of --shape."""
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
        own = metafunc.config.getoption("--model")
        trained = [own] if own else given or (sorted(SHAPES) if on_gpu else ["vit-b-32"])
        dtypes = metafunc.config.getoption("--dtype") or ["fp32", "bf16"]
        metafunc.parametrize(("trained", "dtype"), [(n, d) for n in trained for d in dtypes])
    if "tower" in metafunc.fixturenames:
        towers = given or (["vit-b-32"] if on_gpu else ["minilm", "vit-b-32"])
        metafunc.parametrize("tower", towers, indirect=True, scope="module")


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Return the bytes a second of a copy on the bench's device."""
    return measure.copy_bandwidth(measure.target_device())


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Record], dict[str, object]]:
    """Keep a record for the table and, with its machine, for the op's file."""
    config = request.config

    def keep_record(record: Record) -> dict[str, object]:
        config.stash[RECORDS].append(record)
        result = record.as_dict() | measure.machine()
        if config.getoption("--out"):
            add_result(config.getoption("--out"), result)
        return result

    return keep_record


@pytest.fixture
def keep_costs(request: pytest.FixtureRequest) -> Callable[[str, str, list[Cost]], None]:
    """Keep and draw the costs of one workload, by model and label."""
    config = request.config
    out: Path | None = config.getoption("--out")

    def keep_them(model: str, label: str, costs: list[Cost]) -> None:
        forms = [cost.as_dict() for cost in costs]
        config.stash[COSTS].append((model, label, forms))
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
        if out is not None and config.getoption("--form") is None:
            draw_costs(out, model, label, forms)

    return keep_them


@pytest.fixture
def measured(
    keep: Callable[[Record], dict[str, object]], benchmark: Any, bandwidth: float
) -> Callable[..., None]:
    """Check and time a form, and keep the result; `about` are further fields of `Record`."""

    def measure_and_keep(work: Work, **about: Any) -> None:
        step = work.step
        work.check()
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
        about |= work.about | {"seconds": stats.median, "spread": stats.iqr}
        result = keep(Record(bandwidth=bandwidth, peak_bytes=peak, **about))
        benchmark.extra_info.update(result)

    return measure_and_keep


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Free the memory of a bench before the next one starts."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace the host's name by the machine's facts."""
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
